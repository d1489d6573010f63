"""Equal actions are one candidate with a count."""

from __future__ import annotations

from nightschool_learner.actions import merge
from nightschool_learner.sampling import Sample, derive_seed
from nightschool_server.agent.formats import TOOL_CALLS
from nightschool_server.agent.toolcalls import write_call


def sample(text: str) -> Sample:
    return Sample(text, (1,), (-1.0,), (), "stop")


def test_the_same_call_in_other_words_is_the_same_action() -> None:
    a = write_call("price", {"item": "mug", "q": 1})
    b = "Let me look.\n" + write_call("price", {"q": 1, "item": "mug"})
    actions = merge([sample(a), sample(b), sample(a), sample("36"), sample(" 36 ")], TOOL_CALLS)
    assert [(action.sample.text, action.num_samples) for action in actions] == [(a, 3), ("36", 2)]


def test_other_arguments_or_answers_are_other_actions() -> None:
    texts = [write_call("price", {"item": "mug"}), write_call("price", {"item": "cup"}), "36", "37", "<tool_call>{"]
    assert len(merge([sample(text) for text in texts], TOOL_CALLS)) == 5


def test_seeds_of_different_uses_never_meet() -> None:
    seeds = {
        derive_seed(1, "step", slot, position, kind) for slot in range(50) for position in range(5) for kind in "ch"
    }
    assert len(seeds) == 500
    assert derive_seed(1, "step", 2, 3) == derive_seed(1, "step", 2, 3) != derive_seed(2, "step", 2, 3)
