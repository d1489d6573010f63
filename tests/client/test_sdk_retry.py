"""What is tried again, how often, and what never is."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from nightschool import (
    AsyncClient,
    CancelledError,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    RetryPolicy,
    UnavailableError,
)
from nightschool.retry import RetryBudget

from tests.client.conftest import DEADLINE_S
from tests.client.fake_replies import stream_events
from tests.client.fake_server import WAIT_S, FakeServer, abort, failing, retry_info

DOWN = failing(grpc.StatusCode.UNAVAILABLE)
BUSY = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", retry_info(0.001), reason="OVERLOADED")


def test_a_call_that_finds_no_engine_is_tried_again_under_one_request_id(client: Client, server: FakeServer) -> None:
    server.script["Generate"].extend([DOWN, BUSY])
    assert client.generate("hello").text == "echo hello"
    requests = [call.request for call in server.calls]
    assert len(requests) == 3
    assert len({request.request_id for request in requests}) == 1


async def test_the_async_client_tries_again_too(aclient: AsyncClient, server: FakeServer) -> None:
    server.script["Generate"].extend([DOWN, BUSY])
    assert (await aclient.generate("hello")).text == "echo hello"
    assert len(server.calls) == 3


def test_a_call_that_reaches_a_closing_port_is_tried_again(client: Client, server: FakeServer) -> None:
    server.script["Generate"].append(failing(grpc.StatusCode.CANCELLED, ""))
    assert client.generate("hello").text == "echo hello"
    assert len({call.request.request_id for call in server.calls}) == 1


def test_a_call_that_is_given_up_by_closing_the_client_is_not_tried_again(client: Client, server: FakeServer) -> None:
    called = threading.Event()

    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        ended = threading.Event()
        context.add_callback(ended.set)
        called.set()
        ended.wait(WAIT_S)
        abort(context, grpc.StatusCode.CANCELLED, "nobody waits any more")

    server.script["Generate"].append(hang)
    closer = threading.Thread(target=lambda: called.wait(WAIT_S) and client.close())
    closer.start()
    with pytest.raises(CancelledError, match="Channel closed"):
        client.generate("hello")
    closer.join()
    assert len(server.calls) == 1


def test_attempts_end(client: Client, server: FakeServer) -> None:
    server.script["Generate"].extend([DOWN] * 9)
    with pytest.raises(UnavailableError):
        client.generate("hello")
    assert len(server.calls) == RetryPolicy().max_attempts


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.ABORTED, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
def test_other_errors_are_not_tried_again(code: grpc.StatusCode, client: Client, server: FakeServer) -> None:
    server.script["Generate"].append(failing(code))
    with pytest.raises(Exception, match="scripted"):
        client.generate("hello")
    assert len(server.calls) == 1


def test_the_budget_of_a_client_ends_its_retries(server: FakeServer, tmp_path: Path) -> None:
    policy = RetryPolicy(max_attempts=9, initial_backoff_s=0.001, max_tokens=4)
    server.script["Generate"].extend([DOWN] * 9)
    with Client(server.address, token="secret", home=tmp_path, retry=policy) as client:
        for expected in (2, 3, 4):
            with pytest.raises(UnavailableError):
                client.generate("hello")
            assert len(server.calls) == expected


def test_success_refills_the_budget() -> None:
    budget = RetryBudget(RetryPolicy(max_tokens=2, token_ratio=0.5))
    assert not budget.failed()
    assert not budget.failed()
    for _ in range(9):
        budget.succeeded()
    assert budget._tokens == 2


def test_a_delay_beyond_the_deadline_ends_the_call_at_once(client: Client, server: FakeServer) -> None:
    busy = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", retry_info(600), reason="OVERLOADED")
    server.script["Generate"].append(busy)
    with pytest.raises(OverloadedError):
        client.generate("hello", timeout_s=60)
    assert len(server.calls) == 1


def test_the_server_is_never_hurried() -> None:
    budget = RetryBudget(RetryPolicy())
    busy = OverloadedError("busy", code=grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_s=3.0)
    assert budget.delay_s(busy, 0, 10.0) == 3.0


def test_backoff_grows_to_its_bound_with_jitter() -> None:
    policy = RetryPolicy(initial_backoff_s=1, max_backoff_s=5, multiplier=2)
    assert [policy.backoff_s(number, 0.999999) for number in range(4)] == pytest.approx([1, 2, 4, 5], abs=1e-5)
    assert [policy.backoff_s(number, 0.0) for number in range(4)] == [0.5, 1, 2, 2.5]


def test_a_stream_is_tried_again_before_its_first_event(client: Client, server: FakeServer) -> None:
    server.script["StreamGenerate"].extend([DOWN, BUSY])
    assert "".join(client.stream("hello")) == "echo hello "
    assert len({call.request.request_id for call in server.calls}) == 1


def test_a_stream_is_never_tried_again_after_it(client: Client, server: FakeServer) -> None:
    def breaks(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield from itertools.islice(stream_events("echo hello"), 2)
        abort(context, grpc.StatusCode.UNAVAILABLE, "engine died", retry_info(0.001))

    server.script["StreamGenerate"].append(breaks)
    texts: list[str] = []
    with pytest.raises(UnavailableError, match="engine died"):
        texts.extend(client.stream("hello"))
    assert len(server.calls) == 1


def test_a_task_is_tried_again_before_its_first_event(client: Client, server: FakeServer) -> None:
    server.script["RunTask"].append(DOWN)
    assert client.run_task("hello").result().answer == "echo hello"
    assert len(server.calls) == 2


def test_the_deadline_ends_a_call_and_says_how_long_it_was(client: Client, server: FakeServer) -> None:
    def hang(request: Any, context: grpc.ServicerContext) -> Any:
        ended = threading.Event()
        context.add_callback(ended.set)
        ended.wait(WAIT_S)
        abort(context, grpc.StatusCode.CANCELLED, "nobody waits any more")

    server.script["Generate"].extend([hang] * 9)
    timeout_s = 0.3
    while not server.calls:  # a busy machine may take longer than that to connect
        with pytest.raises(DeadlineExceededError, match=rf"Generate took longer than {timeout_s:g} s"):
            client.generate("hello", timeout_s=timeout_s)
        timeout_s *= 4
    assert server.calls[0].ended.wait(WAIT_S)


def test_calls_have_the_client_s_deadline_and_it_must_be_one(client: Client, server: FakeServer) -> None:
    client.generate("hello")
    assert 0 < server.calls[0].remaining_s < DEADLINE_S + 1
    with pytest.raises(InvalidRequestError, match="timeout_s is 0"):
        client.generate("hello", timeout_s=0)
