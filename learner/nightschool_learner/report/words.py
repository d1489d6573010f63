"""The report's words: what the rows' short names mean to somebody who never saw the code."""

from __future__ import annotations

STAGES = {
    "seeds": ("Choosing requests", "Logged requests that their callers let the learner use; failures first."),
    "synthesize": ("Writing tasks", "The model wrote new tasks that are like the chosen requests."),
    "explore": (
        "Practising",
        "The model tried several actions at every step of every task, each in a copy of its own.",
    ),
    "critique": ("Comparing", "A critic compared what was tried. It runs while practice does, so their times overlap."),
    "pairs": ("Collecting preferences", "Steps with a sure winner became pairs: what was better, what was worse."),
    "train": ("Training", "A new adapter was trained on the pairs, starting from the one that served."),
    "evaluate": ("Testing", "The new adapter and the old one answered the same held-out tasks."),
    "promote": ("Deciding", "The gate held the results against its rules."),
}

LEFT_OUT = {
    "over_max": "more than the cycle may use",
    "reserved": "sessions that are kept apart for evaluation",
    "held_out": "the same as a held-out test task",
    "held_out_text": "contains a held-out test task",
    "held_out_ngram": "shares 13 words in a row with a held-out test task",
    "held_out_image": "uses the picture of a held-out test task",
    "held_out_similar": "nearly the same as a held-out test task",
    "held_out_image_similar": "its picture is nearly that of a held-out test task",
    "duplicate": "the same as another one",
    "duplicates": "the same as another one",
    "near_duplicate": "nearly the same as another one",
    "always_solved": "too easy: every attempt solved it alike",
    "never_solved": "out of reach: no attempt solved it, or no two agreed",
    "copy": "a copy of the example it was written from",
    "parse": "not in the form that was asked for",
    "length": "too short or too long",
    "plan_form": "not a task with a plan of its files",
    "plan_task": "not a task with a plan of its files: the task cannot be read",
    "plan_file": "a file was not planned as it must be",
    "plan_too_many": "more files than a task may have",
    "no_match": "no picture or file like the planned one was found",
    "unmade": "no program made the planned file",
    "unsolvable": "the verifier found that it cannot be done",
    "unverified": "the verifier's answer could not be read",
    "too_long": "longer than the model's context",
    "not_one_turn": "none or several questions in one conversation",
    "settled": "nothing to learn: the model is already sure of the better action",
    "simulated": "rests on the answer of a simulated tool",
    "step_cap": "enough from this step",
    "task_cap": "enough from this task",
    "tool_cap": "enough about this tool",
    "failed_cap": "enough pairs that only say that something crashed",
    "agreed": "all samples did the same",
    "fallback": "the critic was not sure",
    "unfinished": "never finished",
    "unpaired": "no pair came of it",
}

VERIFIED = {
    "keep": "the verifier found that it can be done",
    "repair": "the verifier repaired it",
    "unreadable": "the verifier's answer could not be read",
}

FAILURES = {
    "parse": "could not be read as an action",
    "schema": "a tool was called with wrong arguments",
    "execution": "a tool reported an error",
    "budget": "ran into the limit on its length",
    "refused": "wanted a tool that practice may not run",
}

ABSTENTIONS = {
    "malformed": "its answer could not be read",
    "margin": "it was not sure enough",
    "disagreement": "it preferred a place, not an action: the other order gave the other winner",
    "intransitive": "its preferences went round in a circle",
    "all_failed": "everything that was tried failed",
    "budget": "its budget was spent",
}

OUTCOMES = {
    "answered": "with an answer",
    "max_steps": "at the limit of steps",
    "max_tokens": "at the limit of tokens",
    "refused": "it wanted a tool that practice may not run",
    "budget": "the cycle's budget was spent",
}

PICKED_BY = {
    "agreed": "all samples did the same",
    "critic": "the critic chose",
    "facts": "only one action worked",
    "fallback": "nobody was sure: the most frequent action",
}

WHY_SEED = {
    "feedback": "a user said that the answer was bad",
    "tool_error": "a tool failed on the way",
    "unfinished": "it ended at a limit, without an answer",
    "traffic": "ordinary traffic",
}

RULES = {
    "tasks": "enough test tasks",
    "difference": "better by enough",
    "significance": "not by chance",
    "interval": "surely better",
    "families": "no kind of task got worse",
    "non-inferiority": "every kind proven no worse",
    "format": "still readable",
    "tool errors": "no more tool errors",
    "unanswered": "still answers",
    "refusals": "no more refusals",
    "unsafe actions": "nothing unsafe",
    "external calls": "no more calls to the outside",
    "length": "not long-winded",
    "general ability": "still knows other text",
}

CURVES: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "what training makes small; it should fall and level off", (("loss", "loss"),)),
    (
        "Better against worse",
        "how much likelier the better answers became than the worse ones; should rise",
        (("rewards/margins", "margin"),),
    ),
    (
        "Likelihood of the answers",
        "nats an answer; the better ones must not fall with the worse ones",
        (("logps/chosen", "better"), ("logps/rejected", "worse")),
    ),
    (
        "Away from the start",
        "change against the adapter that training began with",
        (("rewards/chosen", "better"), ("rewards/rejected", "worse")),
    ),
    ("Pairs ranked right", "share of a batch; 1 is all of them", (("rewards/accuracies", "share"),)),
    ("Entropy", "nats a token; a fall to 0 means that it became blind to everything else", (("entropy", "entropy"),)),
    ("Distance (KL)", "nats from the reference", (("kl", "KL"),)),
    ("Length of the answers", "tokens", (("length/chosen", "better"), ("length/rejected", "worse"))),
)
"""Title, what it says, and (metric, label) of each line; drawn where the trainer logged it."""

READINGS = {
    "learned": "something new is in its reach",
    "sharpened": "it does reliably what it could do now and then before",
    "narrowed": "something that was in its reach is lost",
    "worse": "it became worse",
    "unclear": "no sure change of what is in its reach",
}


def words_of(reason: str) -> str:
    """Why something was left out, in words; the name itself where none are known."""
    return LEFT_OUT.get(reason) or LEFT_OUT.get(reason.removesuffix("s")) or reason.replace("_", " ")
