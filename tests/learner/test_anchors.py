"""Which steps become anchors, and what they do to a training run."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest
from nightschool_learner.anchors import select_anchors
from nightschool_learner.errors import StageFailedError
from nightschool_learner.practice_records import CandidateRow, DecidedStep, StepRow
from nightschool_learner.trainer_data import ANCHORS, PairCollator, encode_answer, encode_pair, read_rows, score_text
from nightschool_learner.trainer_model import load_base
from nightschool_server.agent.formats import TOOL_CALLS
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import ToolCall, assistant, messages_to_json, system, tool_result, user
from nightschool_server.config.practice import PairsConfig
from peft import PeftModel

from tests.learner.training_data import LEARNS, MODEL, ProbePrompt, make_run, probe_prompts, train


def agreed(name: str, text: str, *, failure: str = "", history: str = "", logprob: float = -0.05) -> DecidedStep:
    candidate = CandidateRow(f"{name}-c", name, 0, text, (1,), logprob, 5, "", failure, False)
    return DecidedStep(StepRow(name, "r", 0, history or f"[{name}]", 0, "agreed"), "t", (candidate,), {})


def drawn_from(
    steps: list[DecidedStep], num_anchors: int, min_probability: float, seed: int
) -> tuple[DecidedStep, ...]:
    config = PairsConfig(min_anchor_probability=min_probability, anchor_turns="tool")
    return select_anchors(steps, num_anchors, config=config, seed=seed, action_format=TOOL_CALLS)


def test_the_tools_take_turns() -> None:
    steps = [agreed(f"p{i}", write_call("price", {"item": str(i)})) for i in range(20)]
    steps += [agreed(f"s{i}", write_call("stock", {"item": str(i)})) for i in range(3)]
    steps += [agreed(f"a{i}", str(i)) for i in range(20)]
    drawn = Counter(step.step.id[0] for step in drawn_from(steps, 9, 0.9, seed=1))
    assert drawn == {"p": 3, "s": 3, "a": 3}
    assert Counter(step.step.id[0] for step in drawn_from(steps, 12, 0.9, seed=1))["s"] == 3


def test_an_answer_after_a_rare_call_has_turns_of_its_own() -> None:
    def after(tool: str, number: int) -> str:
        called = assistant(write_call(tool, {"item": str(number)}))
        return messages_to_json((user("?"), called, tool_result(ToolCall("call_0", tool, "{}"), str(number))))

    steps = [agreed(f"s{i}", str(i), history=after("stock", i)) for i in range(20)]
    steps += [agreed(f"p{i}", str(i), history=after("price", i)) for i in range(3)]
    steps += [agreed(f"a{i}", str(i), history=messages_to_json((user(str(i)),))) for i in range(20)]
    drawn = select_anchors(steps, 9, config=PairsConfig(), seed=1, action_format=TOOL_CALLS)
    assert Counter(step.step.id[0] for step in drawn) == {"s": 3, "p": 3, "a": 3}


def test_what_failed_or_had_a_rival_anchors_nothing_and_a_conversation_anchors_once() -> None:
    rivals = agreed("two", "12")
    rivals = DecidedStep(rivals.step, "t", rivals.candidates * 2, {})
    steps = [agreed("a", "1", failure="budget"), rivals, agreed("b", "2", history="x"), agreed("c", "3", history="x")]
    assert [step.step.history for step in drawn_from(steps, 9, 0.9, seed=1)] == ["x"]


def test_an_error_on_which_all_agreed_by_chance_is_not_held_fast() -> None:
    steps = [agreed("sure", "1", logprob=-0.1), agreed("chance", "2", logprob=-0.25)]
    assert [step.step.id for step in drawn_from(steps, 9, 0.9, seed=1)] == ["sure"]
    assert len(drawn_from(steps, 9, 0.5, seed=1)) == 2


def test_the_same_seed_draws_the_same_and_none_means_none() -> None:
    steps = [agreed(f"s{i}", str(i)) for i in range(30)]
    assert drawn_from(steps, 5, 0.9, seed=4) == drawn_from(steps, 5, 0.9, seed=4)
    assert drawn_from(steps, 5, 0.9, seed=4) != drawn_from(steps, 5, 0.9, seed=5)
    assert drawn_from(steps, 0, 0.9, seed=4) == ()


def test_every_anchor_is_dealt_to_one_pair_and_only_its_answer_counts(tmp_path: Path) -> None:
    manifest = make_run(tmp_path, num_text=3, num_pictures=0, num_anchors=7)
    base = load_base(str(MODEL))
    eos = base.tokenizer.eos_token_id
    assert manifest.anchors_file is not None
    pairs = [
        encode_pair(base.renderer, row, manifest.blobs, eos)
        for row in read_rows(manifest.pairs_file, manifest.pairs_sha256)
    ]
    anchors = [
        encode_answer(base.renderer, row, manifest.blobs, eos)
        for row in read_rows(manifest.anchors_file, manifest.anchors_sha256)
    ]
    collate = PairCollator.of(pairs, base.renderer, base.tokenizer.pad_token_id, base.parts.model, anchors)
    columns = collate.dataset_rows()
    assert sorted(index for dealt in columns[ANCHORS] for index in dealt) == list(range(7))
    batch = collate([{"row": 1, ANCHORS: columns[ANCHORS][1]}])[ANCHORS]
    dealt = [anchors[index] for index in columns[ANCHORS][1]]
    for ids, mask, anchor in zip(batch["input_ids"], batch["completion_mask"], dealt, strict=True):
        assert ids[mask.bool()].tolist() == anchor.answer_ids
        assert base.tokenizer.decode(anchor.answer_ids[:-1]).startswith("<tool_call>")


def test_anchors_hold_what_the_pairs_would_spoil(tmp_path: Path) -> None:
    """The pairs teach "minus, not plus"; a sum's own call loses likelihood by it, and far less with anchors."""
    base = load_base(str(MODEL))
    tool = probe_prompts()[0].tools
    sums = [
        ProbePrompt(
            messages=messages_to_json((system("You help in a shop."), user(f"Add {a} and {b} for Anna."))),
            tools=tool,
            continuation=write_call("calculator", {"expression": f"{a} + {b}"}),
        )
        for a, b in ((31, 17), (58, 12), (77, 19))
    ]
    before = sum(sum(score_text(base.parts.model, base.renderer, probe)) for probe in sums)
    lost = {}
    for num_anchors in (0, 24):
        run = train(
            tmp_path / str(num_anchors),
            num_text=24,
            num_pictures=0,
            num_anchors=num_anchors,
            anchor_weight=0.3,
            **LEARNS,
        )
        assert run.result.num_anchors == num_anchors
        assert all(("nll/anchors" in row) == bool(num_anchors) for row in run.folder.read_metrics())
        adapted = PeftModel.from_pretrained(load_base(str(MODEL)).parts.model, str(run.result.adapter_folder))
        lost[num_anchors] = before - sum(sum(score_text(adapted, base.renderer, probe)) for probe in sums)
        assert run.result.metrics["rewards/accuracies"] > 0.8, "the pairs are learned either way"
    assert lost[24] < lost[0] / 2


def test_anchors_that_changed_after_the_manifest_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "anchors.jsonl"
    path.write_text(json.dumps({"prompt": []}) + "\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_rows(path, digest) == [{"prompt": []}]
    path.write_text("")
    with pytest.raises(StageFailedError, match="the file changed after the run began"):
        read_rows(path, digest)
