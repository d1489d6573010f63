"""The endpoint client against a real HTTP server: limits, retries, timeouts, broken answers, costs, and the key."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nightschool_learner.endpoint import Endpoint
from nightschool_learner.endpoint_records import EndpointCall, RoleCost, costs_of
from nightschool_learner.errors import EndpointError, StageFailedError
from nightschool_learner.openai_messages import to_openai
from nightschool_learner.rates import WINDOW_S, Gate, Window
from nightschool_learner.report.gather import build
from nightschool_learner.roles import open_role
from nightschool_server.chat import system, user
from nightschool_server.config.roles import EndpointConfig, RoleConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import ContextOverflowError
from pydantic import ValidationError

from tests.learner.endpoints import LocalEndpoint, endpoint
from tests.learner.practice_home import FakeSampler, cycle_on, open_home

KEY = "sk-the-secret-of-this-test"
PROMPT = Prompt((system("Be short."), user("What is it?")))
GREEDY = Sampling(max_tokens=8, temperature=0.0)
PNG = b"\x89PNG\r\n\x1a\n rest"


Client = tuple[Endpoint, list[EndpointCall], list[float]]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.fixture
def local() -> Iterator[LocalEndpoint]:
    with endpoint(lambda body: "a mug") as running:
        yield running


@asynccontextmanager
async def client(
    local: LocalEndpoint, **settings: Any
) -> AsyncIterator[tuple[Endpoint, list[EndpointCall], list[float]]]:
    """A client that rests on no clock; its calls and its rests."""
    calls: list[EndpointCall] = []
    rests: list[float] = []

    async def record(call: EndpointCall) -> None:
        calls.append(call)

    config = EndpointConfig(**{"base_url": local.url, "model": "judge", "key_env": "JUDGE_KEY", **settings})
    now = [0.0]

    async def rest(seconds: float) -> None:
        rests.append(seconds)
        now[0] += seconds

    async with Endpoint(config, "critic", {}.__getitem__, record, clock=lambda: now[0], sleep=rest) as made:
        yield made, calls, rests


async def ask(made: Endpoint) -> str:
    return (await made.sample(PROMPT, GREEDY, adapter="")).answers[0].text


async def test_a_call_is_answered_and_counted_with_what_it_cost(local: LocalEndpoint) -> None:
    async with client(local, prompt_price=2.0, completion_price=10.0) as (made, calls, _):
        samples = await made.sample(PROMPT, GREEDY, adapter="")
    assert [answer.text for answer in samples.answers] == ["a mug"]
    assert (samples.num_prompt_tokens, samples.num_completion_tokens) == (5, 2)
    [call] = calls
    assert (call.role, call.model, call.error, call.num_tries) == ("critic", "judge", "", 1)
    assert call.cost == pytest.approx((5 * 2.0 + 2 * 10.0) / 1e6)
    [sent] = local.seen
    assert (sent["path"], sent["model"], sent["max_tokens"], sent["temperature"]) == (
        "/v1/chat/completions",
        "judge",
        8,
        0,
    )
    assert local.keys == [f"Bearer {KEY}"]


@pytest.mark.parametrize("fault", ["500", "503", "429", "408", "garbage", "empty", "dies"])
async def test_what_may_pass_is_tried_again_after_a_growing_rest(local: LocalEndpoint, fault: str) -> None:
    local.faults = [fault, fault]
    async with client(local) as (made, calls, rests):
        assert await ask(made) == "a mug"
    assert [call.num_tries for call in calls] == [3]
    assert len(rests) == 2
    assert 0 < rests[0] < rests[1] <= 1.0


async def test_the_rest_that_the_endpoint_asks_for_holds_every_call(local: LocalEndpoint) -> None:
    local.faults = ["retry:17"]
    async with client(local) as (made, _, rests):
        assert await ask(made) == "a mug"
    assert rests == [17.0]


async def test_an_endpoint_that_asks_for_a_very_long_rest_has_failed(local: LocalEndpoint) -> None:
    local.faults = ["retry:86400"]
    async with client(local) as (made, calls, rests):
        with pytest.raises(EndpointError, match="HTTP 429"):
            await ask(made)
    assert (rests, [call.error for call in calls]) == ([], ["http_429"])


async def test_no_answer_in_time_is_a_failure_after_its_retries(local: LocalEndpoint) -> None:
    local.faults = ["hang", "hang"]
    async with client(local, timeout_s=0.05, max_retries=1) as (made, calls, _):
        with pytest.raises(EndpointError, match=r"no answer within 0\.05 s"):
            await ask(made)
    assert [(call.error, call.num_tries, call.prompt_tokens) for call in calls] == [("timeout", 2, 0)]


async def test_a_call_that_fails_is_one_error_and_many_in_a_row_end_the_cycle(local: LocalEndpoint) -> None:
    async with client(local, max_retries=0, max_failures=3) as (made, _, _):
        local.faults = ["500", "500"]
        for _ in range(2):
            with pytest.raises(EndpointError, match="HTTP 500"):
                await ask(made)
        assert await ask(made) == "a mug", "an answer in between starts the count anew"
        local.faults = ["500"] * 3
        for _ in range(2):
            with pytest.raises(EndpointError):
                await ask(made)
        with pytest.raises(StageFailedError, match="3 calls in a row failed"):
            await ask(made)


@pytest.mark.parametrize("status", ["401", "403", "404"])
async def test_a_wrong_key_or_address_is_not_tried_again_and_names_the_settings(
    local: LocalEndpoint, status: str
) -> None:
    local.faults = [status]
    async with client(local) as (made, _, _):
        with pytest.raises(StageFailedError, match="base_url, model and key_env"):
            await ask(made)
    assert len(local.seen) == 1


async def test_a_prompt_that_does_not_fit_is_the_prompt_s_fault(local: LocalEndpoint) -> None:
    local.faults = ["400:context_length_exceeded", "400"]
    async with client(local) as (made, _, _):
        with pytest.raises(ContextOverflowError):
            await ask(made)
        with pytest.raises(EndpointError, match="HTTP 400"):
            await ask(made)
    assert len(local.seen) == 2


async def test_no_more_calls_are_in_flight_than_allowed() -> None:
    """Eight callers, three at a time: the fourth call comes only when one of the first three has been answered."""
    arrived = asyncio.Queue[Callable[[], None]]()
    loop = asyncio.get_running_loop()

    def rule(body: dict[str, Any]) -> str:
        go = threading.Event()
        loop.call_soon_threadsafe(arrived.put_nowait, go.set)
        go.wait()
        return "x"

    with endpoint(rule) as local:
        async with client(local, concurrency=3) as (made, _, _):
            calls = [asyncio.create_task(ask(made)) for _ in range(8)]
            waiting = [await arrived.get() for _ in range(3)]
            for _ in range(5):
                assert arrived.empty()
                waiting.pop()()
                waiting.append(await arrived.get())
            for release in waiting:
                release()
            assert await asyncio.gather(*calls) == ["x"] * 8


async def test_the_key_is_in_no_log_line_and_in_no_row(
    local: LocalEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx", "httpx2", "httpcore", "httpcore2"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    store = open_home(tmp_path)
    cycle = cycle_on(store)
    local.faults = ["500", "401"]
    settings = EndpointConfig(base_url=local.url, model="judge", key_env="JUDGE_KEY", max_retries=0)
    role = RoleConfig(kind="endpoint", endpoint=settings)
    async with open_role(cycle, "writer", role, FakeSampler(lambda *_: "")) as model:
        with pytest.raises(EndpointError) as failed:
            await model.sampler.sample(PROMPT, GREEDY, adapter="")
        with pytest.raises(StageFailedError) as refused:
            await model.sampler.sample(PROMPT, GREEDY, adapter="")
        await model.sampler.sample(PROMPT, GREEDY, adapter="")
    assert len(local.keys) == 3
    assert caplog.records
    said = caplog.text + str(failed.value) + str(refused.value) + "".join(str(r.args) for r in caplog.records)
    assert KEY not in said
    store.checkpoint()
    assert holding(tmp_path, KEY) == []


def holding(folder: Path, text: str) -> list[Path]:
    """The files under `folder` that hold `text`."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


async def test_a_cycle_s_report_says_what_each_role_cost(local: LocalEndpoint, tmp_path: Path) -> None:
    store = open_home(tmp_path)
    cycle = cycle_on(store)
    local.faults = ["500"]
    for role, price in (("writer", 1.0), ("critic", 100.0)):
        settings = EndpointConfig(
            base_url=local.url, model=role, key_env="JUDGE_KEY", prompt_price=price, max_retries=0
        )
        config = RoleConfig(kind="endpoint", endpoint=settings)
        async with open_role(cycle, role, config, FakeSampler(lambda *_: "")) as model:
            for _ in range(2):
                try:
                    await model.sampler.sample(PROMPT, GREEDY, adapter="")
                except EndpointError:
                    assert role == "writer"
    assert costs_of(store, cycle.id) == [
        RoleCost("critic", local.url, "critic", 2, 0, 2, 10, 4, pytest.approx(1000e-6)),
        RoleCost("writer", local.url, "writer", 2, 1, 2, 5, 2, pytest.approx(5e-6)),
    ]
    assert [entry.role for entry in build(store, cycle.id).endpoints] == ["critic", "writer"]


async def test_a_role_is_the_served_model_an_adapter_of_it_or_an_endpoint(local: LocalEndpoint, tmp_path: Path) -> None:
    cycle = cycle_on(open_home(tmp_path))
    served = FakeSampler(lambda *_: "")
    for adapter, named in (("base", "base"), ("active", cycle.incumbent), ("0007-abc", "0007-abc")):
        async with open_role(cycle, "critic", RoleConfig(adapter=adapter), served) as model:
            assert (model.sampler, model.adapter, model.has_odds) == (served, named, True)
    settings = EndpointConfig(base_url=local.url, model="judge", key_env="JUDGE_KEY")
    async with open_role(cycle, "critic", RoleConfig(kind="endpoint", endpoint=settings), served) as model:
        assert model.name == f"judge@{local.url}"
        assert not model.has_odds


async def test_pictures_travel_inside_the_request(local: LocalEndpoint) -> None:
    sha256 = hashlib.sha256(PNG).hexdigest()
    told, asked = to_openai(Prompt((system("Look."), user("How many?", [sha256]))), {sha256: PNG}.__getitem__)
    assert told == {"role": "system", "content": "Look."}
    picture, text = asked["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,iVBORw0")
    assert text == {"type": "text", "text": "How many?"}


def test_a_role_s_endpoint_must_be_named() -> None:
    with pytest.raises(ValidationError, match="needs endpoint"):
        RoleConfig(kind="endpoint")


async def test_a_missing_key_says_which_variable(local: LocalEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(StageFailedError, match="JUDGE_KEY"):
        async with client(local):
            pass


def clock() -> tuple[Callable[[], float], Callable[[float], Awaitable[None]], list[float]]:
    """A clock that only sleeping moves, and the moments of the sleeps' ends."""
    now = [0.0]
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        now[0] += seconds
        woken.append(now[0])

    return lambda: now[0], sleep, woken


async def test_in_no_minute_begins_more_than_the_limit() -> None:
    read, sleep, _ = clock()
    window = Window(3, read, sleep)
    begun: list[float] = []
    for _ in range(10):
        await window.take(1)
        begun.append(read())
    for at in begun:
        assert sum(at <= other < at + WINDOW_S for other in begun) <= 3
    assert begun[-1] == 3 * WINDOW_S


async def test_tokens_are_corrected_by_what_a_call_took() -> None:
    read, sleep, woken = clock()
    window = Window(100, read, sleep)
    await window.take(90)
    window.correct(-80)
    await window.take(90)
    assert woken == []
    await window.take(5_000)
    assert woken == [WINDOW_S], "one that is larger than the limit goes alone"


async def test_without_a_limit_nobody_waits() -> None:
    read, sleep, woken = clock()
    window = Window(0, read, sleep)
    for _ in range(1000):
        await window.take(10**9)
    assert woken == []


async def test_a_shut_gate_opens_once_for_all() -> None:
    read, sleep, woken = clock()
    gate = Gate(read, sleep)
    gate.shut(5)
    gate.shut(2)
    for _ in range(3):
        await gate.passed()
    assert woken == [5.0]
