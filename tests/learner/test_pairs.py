"""Which preferences become pairs: the rules, on decided steps made by hand."""

from __future__ import annotations

from dataclasses import replace

from nightschool_learner.comparisons import Duels
from nightschool_learner.critique import Duel
from nightschool_learner.pairs import Pair, pairs_of, select
from nightschool_learner.practice_records import CandidateRow, DecidedStep, StepRow
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.config.practice import PairsConfig

NO_CAPS = PairsConfig(max_share_failed=1.0, max_per_step=99, max_per_task=99, max_per_tool=99)


def candidate(position: int, text: str = "", failure: str = "", step: str = "s") -> CandidateRow:
    text = text or f"answer {position}"
    return CandidateRow(f"{step}-c{position}", step, position, text, (1, 2), -1.0, 1, "", failure, False)


def won(winner: int, *losers: int, margin: float = 3.0) -> Duels:
    return {(min(winner, loser), max(winner, loser)): Duel(winner, margin=margin) for loser in losers}


def step(
    *candidates: CandidateRow,
    picked: int = 0,
    by: str = "critic",
    duels: Duels | None = None,
    name: str = "s",
    task: str = "t",
) -> DecidedStep:
    return DecidedStep(StepRow(name, "r", 0, f"[{name}]", picked, by), task, candidates, duels or {})


def kinds(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    return [(p.chosen, p.rejected, p.kind) for p in pairs]


def test_the_pick_is_paired_with_every_rival_that_lost_in_won() -> None:
    decided = step(candidate(0), candidate(1), candidate(2), picked=1, duels=won(1, 0, 2))
    assert kinds(pairs_of(decided)) == [("s-c1", "s-c0", "both_ran"), ("s-c1", "s-c2", "both_ran")]
    assert {pair.margin for pair in pairs_of(decided)} == {3.0}


def test_a_rival_that_was_not_beaten_in_both_orders_makes_no_pair() -> None:
    duels = won(0, 1)
    duels[0, 2] = Duel(None, "disagreement")
    assert kinds(pairs_of(step(candidate(0), candidate(1), candidate(2), duels=duels))) == [
        ("s-c0", "s-c1", "both_ran")
    ]


def test_a_fallback_or_an_agreement_makes_no_pair() -> None:
    duels = won(0, 1)
    for by in ("fallback", "agreed", ""):
        assert pairs_of(step(candidate(0), candidate(1), by=by, duels=duels)) == []


def test_a_failed_rival_loses_by_fact() -> None:
    decided = step(candidate(0), candidate(1, failure="parse"), by="facts")
    assert kinds(pairs_of(decided)) == [("s-c0", "s-c1", "ran_vs_failed")]


def test_a_pair_that_the_policy_has_settled_is_left_out_where_a_lead_is_set() -> None:
    slip, mistake = (replace(candidate(position), logprob=logprob) for position, logprob in ((1, -9.0), (2, -1.5)))
    steps = [step(candidate(0), slip, mistake, duels=won(0, 1, 2))]
    assert {pair.rejected: pair.lead for pair in pairs_of(steps[0])} == {"s-c1": 8.0, "s-c2": 0.5}
    assert len(select(steps, NO_CAPS, seed=1).pairs) == 2
    selection = select(steps, NO_CAPS.model_copy(update={"max_lead_nats": 3.0}), seed=1)
    assert [pair.rejected for pair in selection.pairs] == ["s-c2"]
    assert selection.dropped == {"settled": 1}


def test_pairs_against_failures_are_at_most_the_configured_share() -> None:
    steps = [
        step(
            candidate(0, step=f"f{i}"),
            candidate(1, failure="schema", step=f"f{i}"),
            by="facts",
            name=f"f{i}",
            task=f"t{i}",
        )
        for i in range(10)
    ]
    steps += [
        step(
            candidate(0, step=f"b{i}"),
            candidate(1, step=f"b{i}"),
            duels=won(0, 1),
            name=f"b{i}",
            task=f"u{i}",
        )
        for i in range(3)
    ]
    selection = select(steps, PairsConfig(max_share_failed=0.25), seed=1)
    assert [p.kind for p in selection.pairs].count("both_ran") == 3
    assert [p.kind for p in selection.pairs].count("ran_vs_failed") == 1
    assert selection.dropped["failed_cap"] == 9
    assert select(steps, PairsConfig(max_share_failed=0), seed=1).dropped["failed_cap"] == 10


def test_caps_per_step_task_and_tool_hold() -> None:
    wide = step(*[candidate(i) for i in range(6)], duels=won(0, 1, 2, 3, 4, 5))
    assert len(select([wide], NO_CAPS.model_copy(update={"max_per_step": 2}), seed=1).pairs) == 2
    assert len(select([wide], NO_CAPS.model_copy(update={"max_per_task": 3}), seed=1).pairs) == 3
    calling = [
        step(
            candidate(0, write_call("price", {"item": str(i)}), step=f"s{i}"),
            candidate(1, step=f"s{i}"),
            duels=won(0, 1),
            name=f"s{i}",
            task=f"t{i}",
        )
        for i in range(5)
    ]
    selection = select(calling, NO_CAPS.model_copy(update={"max_per_tool": 4}), seed=1)
    assert len(selection.pairs) == 4
    assert selection.dropped == {"tool_cap": 1}
    assert {pair.tool for pair in selection.pairs} == {"price"}


def test_the_same_preference_is_learned_once() -> None:
    twins = [
        DecidedStep(
            StepRow(name, "r", 0, "[same history]", 0, "critic"),
            name,
            (candidate(0, "Yes.", step=name), candidate(1, "No", step=name)),
            won(0, 1),
        )
        for name in ("a", "b")
    ]
    selection = select(twins, NO_CAPS, seed=1)
    assert len(selection.pairs) == 1
    assert selection.dropped == {"near_duplicate": 1}


def test_texts_that_differ_in_case_and_space_only_are_no_preference() -> None:
    decided = step(candidate(0, "Yes  sir"), candidate(1, "yes sir"), duels=won(0, 1))
    assert select([decided], NO_CAPS, seed=1).pairs == ()


def test_the_selection_is_the_same_for_the_same_seed() -> None:
    steps = [
        step(*[candidate(i, step=f"s{n}") for i in range(4)], duels=won(0, 1, 2, 3), name=f"s{n}", task="t")
        for n in range(6)
    ]
    config = NO_CAPS.model_copy(update={"max_per_task": 5})
    assert select(steps, config, seed=3).pairs == select(steps, config, seed=3).pairs
    assert select(steps, config, seed=3).pairs != select(steps, config, seed=4).pairs
