"""What a cancelled call leaves behind: nothing that a thread was making for it."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest
from nightschool_server.uninterrupted import obtained, uninterrupted


class Workshop:
    """Makes one thing when it is told to, and notes what is given back."""

    def __init__(self) -> None:
        self.begun: Future[None] = Future()
        self.go_on = threading.Event()
        self.given_back: list[str] = []

    def make(self) -> str:
        self.begun.set_result(None)
        assert self.go_on.wait(60)
        return "thing"

    def fail(self) -> str:
        self.make()
        raise OSError("the disk is full")


async def cancelled_while_making(workshop: Workshop, make: Callable[[], str], times: int) -> asyncio.Task[str]:
    task = asyncio.create_task(obtained(make, workshop.given_back.append))
    await asyncio.wrap_future(workshop.begun)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    workshop.go_on.set()
    await asyncio.wait({task})
    return task


@pytest.mark.parametrize("times", [1, 3])
async def test_what_was_being_made_for_a_cancelled_call_is_given_back(times: int) -> None:
    workshop = Workshop()
    task = await cancelled_while_making(workshop, workshop.make, times)
    assert task.cancelled()
    assert workshop.given_back == ["thing"]


async def test_a_making_that_fails_leaves_nothing_to_give_back() -> None:
    workshop = Workshop()
    task = await cancelled_while_making(workshop, workshop.fail, 1)
    assert task.cancelled()
    assert workshop.given_back == []


async def test_an_undisturbed_call_gets_what_was_made_for_it() -> None:
    workshop = Workshop()
    workshop.go_on.set()
    assert await obtained(workshop.make, workshop.given_back.append) == "thing"
    assert workshop.given_back == []


async def test_a_fault_of_the_making_is_the_callers() -> None:
    workshop = Workshop()
    workshop.go_on.set()
    with pytest.raises(OSError, match="the disk is full"):
        await obtained(workshop.fail, workshop.given_back.append)


async def test_who_is_cancelled_hears_of_that_and_not_of_work_that_fails_afterwards() -> None:
    workshop = Workshop()
    task = asyncio.create_task(uninterrupted(asyncio.to_thread(workshop.fail)))
    await asyncio.wrap_future(workshop.begun)
    task.cancel()
    await asyncio.sleep(0)
    workshop.go_on.set()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_work_goes_on_to_its_end_through_every_cancellation() -> None:
    began, go_on, ended = asyncio.Event(), asyncio.Event(), []

    async def work() -> str:
        began.set()
        await go_on.wait()
        ended.append(True)
        return "done"

    task = asyncio.create_task(uninterrupted(work()))
    await began.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [True]
    assert await uninterrupted(work()) == "done"
