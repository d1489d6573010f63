"""The registry on the real engine: adapters by peft, their logprobs by peft, requests that never notice a change."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from nightschool_server.adapters.folder import PROVENANCE_FILE
from nightschool_server.adapters.registry import AdapterRegistry
from nightschool_server.chat import messages_to_json, user
from nightschool_server.config.config import Config
from nightschool_server.engine import GenerateRequest, Prompt, Sampling
from nightschool_server.engines.transformers_engine import TransformersEngine, TransformersEngineConfig
from nightschool_server.errors import AdapterFormatError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.server.engine_reference import Reference
from tests.server.tiny_models import make_adapter, make_qwen2

QUESTION = "What is the price of seven red apples?"
ANSWER = "The price is three."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_qwen2(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture
async def engine(model: Path) -> AsyncIterator[TransformersEngine]:
    started = await TransformersEngine.start(TransformersEngineConfig(model=str(model), num_threads=1, num_slots=4))
    yield started
    await started.close()


@pytest_asyncio.fixture
async def registry(tmp_path: Path, engine: TransformersEngine) -> AsyncIterator[AdapterRegistry]:
    store = Store.open(Home(tmp_path / "home"))
    started = AdapterRegistry(store, store.home, engine, Config())
    await started.start()
    yield started
    await started.close()
    store.close()


def trained(model: Path, folder: Path, seed: int, *, recorded_from: Path | None = None, **changes: Any) -> Path:
    """An adapter with the probe that its trainer, or that of another one, recorded."""
    make_adapter(model, folder, seed, **changes)
    reference = Reference(model, {"probed": recorded_from or folder})
    prompt = Prompt((user(QUESTION),))
    tokens = reference.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    rows = reference.logprobs(prompt, tokens, "probed")
    probe = {
        "prompts": [{"messages": messages_to_json(prompt.messages), "tools": [], "continuation": ANSWER}],
        "logprobs": [[float(row[token]) for row, token in zip(rows, tokens, strict=True)]],
    }
    (folder / PROVENANCE_FILE).write_text(json.dumps({"probe": probe}))
    return folder


async def answer(registry: AdapterRegistry, engine: TransformersEngine, name: str) -> tuple[str, str]:
    """The adapter that a greedy request got, and its text."""
    async with registry.route(None, None) as lease:
        sampling = Sampling(max_tokens=24, temperature=0, ignore_eos=True)
        request = GenerateRequest(name, Prompt((user(QUESTION),)), sampling, lease.adapter)
        text = "".join([delta.text async for delta in engine.generate(request)])
        return lease.adapter, text


async def test_what_peft_recorded_the_engine_reproduces_and_what_another_recorded_it_does_not(
    model: Path, registry: AdapterRegistry, tmp_path: Path
) -> None:
    good = trained(model, tmp_path / "good", 1)
    view = await registry.import_adapter(good, "", "cli", "")
    assert (view.record.state, view.loaded) == ("candidate", True)
    mixed_up = trained(model, tmp_path / "mixed_up", 2, recorded_from=good)
    with pytest.raises(AdapterFormatError, match="off what the trainer recorded"):
        await registry.import_adapter(mixed_up, "", "cli", "")
    assert [view.record.state for view in registry.list()] == ["quarantined", "candidate"]


async def test_an_untrained_adapter_has_no_effect(model: Path, registry: AdapterRegistry, tmp_path: Path) -> None:
    folder = make_adapter(model, tmp_path / "untrained", 1, init_lora_weights=True)
    with pytest.raises(AdapterFormatError, match="no effect"):
        await registry.import_adapter(folder, "", "cli", "")


async def test_an_adapter_of_another_shape_is_refused(model: Path, registry: AdapterRegistry, tmp_path: Path) -> None:
    other = make_qwen2(tmp_path / "other", hidden_size=32, intermediate_size=48)
    with pytest.raises(AdapterFormatError, match="train on this base model"):
        await registry.import_adapter(make_adapter(other, tmp_path / "a", 1), "", "cli", "")


async def test_no_request_fails_or_mixes_adapters_while_the_pointer_moves(
    model: Path, registry: AdapterRegistry, engine: TransformersEngine, tmp_path: Path
) -> None:
    names = ["base"]
    for seed in (1, 2):
        names.append(
            (await registry.import_adapter(make_adapter(model, tmp_path / str(seed), seed), "", "cli", "")).record.name
        )
    expected: dict[str, str] = {}
    for name in names:
        await registry.promote(name, "cli", "", force=True)
        expected[name] = (await answer(registry, engine, f"alone {name}"))[1]
    assert len(set(expected.values())) == 3
    stop = asyncio.Event()
    answers: list[tuple[str, str]] = []

    async def traffic(client: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            answers.append(await answer(registry, engine, f"{client}-{number}"))

    clients = [asyncio.create_task(traffic(client)) for client in range(4)]
    for number in range(12):
        change = await registry.promote(names[number % 3], "cli", "", force=True)
        adapter, _ = await answer(registry, engine, f"after {number}")
        assert adapter == change.active
    stop.set()
    await asyncio.gather(*clients)
    assert {adapter for adapter, _ in answers} == set(names)
    assert all(text == expected[adapter] for adapter, text in answers)


async def test_the_lane_reaches_the_active_adapter_after_a_promotion_and_a_rollback(
    model: Path, registry: AdapterRegistry, engine: TransformersEngine, tmp_path: Path
) -> None:
    names = []
    for seed in (1, 2):
        folder = make_adapter(model, tmp_path / str(seed), seed)
        names.append((await registry.import_adapter(folder, "", "cli", "")).record.name)
    unmerged = {}
    for name in names:
        request = GenerateRequest(name, Prompt((user(QUESTION),)), Sampling(max_tokens=24, temperature=0), name)
        unmerged[name] = "".join([delta.text async for delta in engine.generate(request)])
    lane = registry._loaded.lane
    for name in names:
        await registry.promote(name, "cli", "", force=True)
        await lane.settle()
        assert engine.stats().merged == registry.active == name
        assert (await answer(registry, engine, "merged"))[1].startswith(unmerged[name])
    await registry.rollback(None, "cli", "")
    await lane.settle()
    assert engine.stats().merged == registry.active == names[0]
    assert (await answer(registry, engine, "back"))[1].startswith(unmerged[names[0]])
    await registry.rollback("base", "cli", "")
    await lane.settle()
    assert engine.stats().merged == "base"
    # Held by nobody and not merged any more, it can be deleted.
    await registry.delete(names[1], "cli")
    assert engine.stats().adapters == (names[0],)
