"""Settings of the learner's second half: training, evaluation, the gate and promotion.

`config.py` puts them together with the sections of practice (`practice.py`). Every field is documented
once, under it.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from nightschool_server.config.roles import RoleConfig

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TrainConfig(_Section):
    """How an adapter is trained. What a profile says stands where a setting of it is not given."""

    profile: Literal["card", "paper"] = "card"
    """`card`: rank 64, alpha 16 on every linear layer of the text tower. `paper`: rank 32 on q, k and v, DPO alone,
    once over the pairs, with a learning rate of 1e-6."""
    rank: Annotated[int, Field(ge=0, le=512)] = 0
    """Of the LoRA. 0 takes the profile's."""
    alpha: Annotated[float, Field(ge=0)] = 0.0
    """0 takes the profile's."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ()
    """Last names of linear layers of the text tower, e.g. ["q_proj"]. Empty takes the profile's."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak; by profile 5e-5 or 1e-6. LoRA wants more than full fine-tuning, a tiny model much more."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] | None = None
    """Of the learning rate; by profile `cosine`."""
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of all steps."""
    epochs: Positive | None = None
    """By profile 2 or 1."""
    batch_size: Positive = 8
    """Pairs of one forward."""
    accumulation: Positive = 1
    """Forwards of one optimizer step."""
    method: Literal["dpo", "sft", "kto"] = "dpo"
    """What is learned from: pairs (`dpo`), chosen answers alone (`sft`), or chosen and rejected answers each for
    itself (`kto`)."""
    use_feedback: bool = False
    """Learn from what callers said, too. `dpo`: corrections join the anchors. `sft`: corrections are answers to learn.
    `kto`: corrections and thumbs up are good answers, thumbs down bad ones."""
    loss: Literal[
        "sigmoid", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
        "sigmoid_norm",
    ] = "sigmoid"  # fmt: skip
    """Of a pair, by TRL's name for it: `sigmoid` is DPO, `ipo` holds the margin at 1 / (2 beta) a token, `robust` and
    `exo_pair` allow for a share of wrong pairs (`label_smoothing`)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """`robust` and `exo_pair`: the share of pairs that may be the wrong way round."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to its reference."""
    nll_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the chosen answer's mean NLL per token; by profile 0.2 or 0."""
    anchor_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the mean NLL of an anchor's answer (`learner.pairs.anchors_per_pair`); by profile 0.3 or 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    max_length: Annotated[int, Field(ge=16)] | None = None
    """Tokens of prompt and answer; a longer pair is dropped and counted, never cut. By profile 10,240."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """Compute activations again rather than keep them: less memory, a third more time. `auto`: on a GPU."""
    quantize: Literal["none", "nf4"] = "none"
    """`nf4`: train on a base model in 4 bits (QLoRA), which takes a quarter of its memory. Needs bitsandbytes."""
    checkpoint_steps: Positive = 50
    validation_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Of pairs and anchors, whole tasks at a time, that are held back (at least 4 pairs; none of fewer than 16). The
    weights that do best on them are kept; where none beat the start's, the cycle ends before evaluation. 0: none."""
    num_looks: Positive = 4
    """How often a run looks at what is held back, beside the look at its start."""
    patience: Annotated[int, Field(ge=0)] = 2
    """Looks in a row without a better one after which training ends. 0: it goes on to the end."""
    placement: Literal["auto", "separate", "split", "sleep", "remote"] = "auto"
    """Where training runs beside serving: on a device of its own, in a share of the engine's, on the engine's while it
    sleeps, or on another host. `auto`: `separate` where there is a device for it, else `split`."""
    device: Annotated[str, Field(pattern=r"^(|cpu|mps|cuda:\d+)$")] = ""
    """Of the training process, e.g. cuda:1. Empty: what the placement chooses."""
    memory_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """`split`: the trainer's share of the device's memory. 0: what `engine.memory_fraction` leaves."""
    nice: Annotated[int, Field(ge=0, le=19)] = 19
    """Niceness of the training process: it runs where nobody else wants the processor."""
    num_threads: Positive = 1
    """Torch threads of the training process."""
    num_processes: Positive = 1
    """Training processes side by side on one machine, a GPU each, by `accelerate launch`. Each takes `batch_size`
    pairs, so a step takes that many times as many."""
    max_restarts: Annotated[int, Field(ge=0)] = 2
    """How often a trainer that was killed (out of memory, say) is started again from its checkpoint."""
    num_probes: Annotated[int, Field(ge=0, le=32)] = 4
    """Prompts whose logprobs the trained model records, for the proof of effect."""
    on_alarm: Literal["report", "stop", "reject"] = "report"
    """What an alarm does: a line in the record; the end of training, which keeps the best weights before it; or the end
    of the cycle before it is evaluated."""
    max_chosen_fall: Annotated[float, Field(ge=0)] = 2.0
    """Alarm: nats that chosen answers lost against the reference, mean over the last quarter of the steps."""
    max_drift: Annotated[float, Field(gt=0)] = 200.0
    """Alarm: nats between policy and reference on an answer, chosen or rejected."""
    max_length_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Alarm: tokens of chosen over tokens of rejected answers."""
    max_margin: Annotated[float, Field(gt=0)] = 8.0
    """Alarm: mean reward margin, nats times beta, at which the pairs teach nothing more."""
    max_kl: Annotated[float, Field(gt=0)] = 0.5
    """Alarm: nats a token between policy and reference on held-back answers."""
    max_anchor_fall: Annotated[float, Field(gt=0)] = 0.5
    """Alarm: nats that held-back anchors' answers lost."""
    max_length_drift: Annotated[float, Field(gt=1)] = 1.5
    """Alarm: how many times as long, or as short, the answers to held-back prompts became."""

    @model_validator(mode="after")
    def _smoothing_fits_the_loss(self) -> Self:
        smooths = self.loss in ("robust", "exo_pair")
        if smooths != bool(self.label_smoothing):
            rule = "wants label_smoothing, the share of wrong pairs, e.g. 0.1" if smooths else "has no label_smoothing"
            raise ValueError(f"learner.train.loss = {self.loss!r} {rule}")
        if self.loss != "sigmoid" and self.method != "dpo":
            raise ValueError(f"learner.train.loss = {self.loss!r} is a loss of pairs, method {self.method!r} has none")
        if self.method == "kto" and self.batch_size == 1:
            raise ValueError("learner.train.method 'kto' compares the answers of a batch: set batch_size to 2 or more")
        return self


class EvaluateConfig(_Section):
    """How held-out tasks are answered."""

    concurrency: Positive = 32
    """Episodes in flight, both adapters together."""
    max_tokens: Positive = 256
    """Of one step; keep it equal to `agent.max_tokens`, so that what is measured is what is served."""
    max_task_tokens: Positive = 4096
    """Of all steps of one task; as `agent.max_task_tokens`."""
    num_tool_workers: Positive = 2
    """Processes that run the application's tools."""
    max_tasks: Annotated[int, Field(ge=0)] = 0
    """The first so many tasks by id; 0 takes all. Fewer than `gate.min_n` can never pass."""
    num_seeds: Annotated[int, Field(ge=0, le=64)] = 4
    """Sampled answers of a task beside the greedy one, the same seeds for both adapters: pass@1, pass@n and diversity
    come from them. 0: greedy answers alone; 1 says nothing of diversity."""
    max_sampled_tasks: Annotated[int, Field(ge=0)] = 64
    """How many tasks are sampled, spread evenly over the families; 0 takes all."""
    temperature: Annotated[float, Field(gt=0, le=4)] = 1.0
    """Of the sampled answers."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the sampled answers."""
    refusal_patterns: tuple[str, ...] = (
        r"\bI(?:'m| am) (?:sorry|unable|not able|afraid)\b",
        r"\bI (?:can(?:'|no)t|won't|will not|refuse)\b",
        r"\bas an AI\b",
    )
    """Regular expressions, case ignored: a final answer that matches one counts as a refusal."""

    @field_validator("refusal_patterns")
    @classmethod
    def _patterns_compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return patterns


class JudgeConfig(RoleConfig):
    """Who compares answers where held-out tasks have none of their own. Another than the training critic."""

    margin_nats: Annotated[float, Field(ge=0)] = 1.0
    """The winner's log odds, in either order, must reach this; else the two answers are tied."""
    rubric: Literal["step-1", "step-2"] = "step-2"
    """The wording; `step-1` is what the shop's model was trained on."""
    votes: Annotated[int, Field(ge=1, le=32)] = 1
    """Answers to each question, where the judge gives no odds: their mean counts."""
    max_comparisons: Annotated[int, Field(ge=0)] = 0
    """Questions in a cycle; where it is spent, answers are tied. 0: no bound."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """The same in tokens. 0: no bound."""
    max_cost: Annotated[float, Field(ge=0)] = 0.0
    """The same in money, by the endpoint's prices. 0: no bound."""


class GateConfig(_Section):
    """What a candidate must show to be promoted."""

    min_n: Positive = 200
    """Held-out tasks that both answered."""
    min_difference: Annotated[float, Field(ge=-1, le=1)] = 0.02
    """Of success rates, candidate minus incumbent; more than this."""
    max_p: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Of the exact McNemar test, two-sided."""
    min_interval_low: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """The lower end of the paired bootstrap interval; more than this."""
    interval_level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    early_stop: bool = False
    """Look at the results while they come in, and end the evaluation where the outcome is sure. The test is then an
    anytime-valid one, which needs more tasks for a small difference than McNemar's on the whole set."""
    first_look: Positive = 60
    """Tasks before the first look."""
    look_every: Positive = 40
    """Tasks between two looks."""
    futility_difference: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """A candidate that is surely less than this better is given up. 0: what the whole run can find."""
    max_futility_error: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The chance to give up one that is better by that much."""
    max_family_fall: Share = 0.15
    """How far a family of tasks may fall."""
    max_family_p: Share = 0.05
    """A family that falls at all with a McNemar p below this is refused, too."""
    non_inferiority: Literal["report", "require"] = "report"
    """Whether every family must be proven no worse than the incumbent by `non_inferiority_margin`, or this is only
    reported. Families that are too small to prove it are reported in either case."""
    non_inferiority_margin: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """By how much a family may be worse and still count as no worse."""
    max_non_inferiority_p: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Of Tango's score test, one-sided, for each family."""
    max_tool_error_rise: Share = 0.05
    """Of tool errors per step."""
    max_unreadable_rise: Share = 0.05
    """Of steps whose format could not be read."""
    max_unanswered_rise: Share = 0.05
    """Of the share of tasks that ended without a final answer or with one that could not be read."""
    max_refusal_rise: Share = 0.05
    """Of the share of tasks whose final answer is a refusal (`evaluate.refusal_patterns`)."""
    max_unsafe_rise: Share = 0.0
    """Of the share of tasks with an action that the application declares unsafe (`App(unsafe=[...])`)."""
    max_external_rise: Share = 0.1
    """Of the share of tasks in which a tool with external effects was called; it never runs in evaluation."""
    max_length_ratio: Annotated[float, Field(gt=0)] = 2.0
    """Completion tokens per step, candidate over incumbent."""
    max_ability_loss_nats: Annotated[float, Field(ge=0)] = 0.2
    """By how many nats a token neutral text may be less likely than to the base model."""
    max_ability_base_nats: Annotated[float, Field(ge=0)] = 5.0
    """Where the base model itself finds that text less likely than this, nats a token, it has no general ability to
    lose, and the number is only reported."""
    judge: JudgeConfig = JudgeConfig()
    allow_training_critic: bool = False
    """Let the critic that made the preferences also judge what came of them. It stands in the evaluation."""
    min_win_rate: Share = 0.5
    """The judge's win rate, ties counting half, must be above this."""
    max_pass_at_n_fall: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How far pass@n of the sampled answers may fall. 1: it is only reported."""


class PromoteConfig(_Section):
    """What becomes of a candidate that passed."""

    approval: Literal["automatic", "manual"] = "automatic"
    """`manual` leaves it a candidate: an operator promotes it by hand."""
