"""RunTask: the agent loop behind a bidirectional stream.

Owns the way from a TaskStart to an episode and from the loop's events to the wire. The loop is `agent/loop.py`'s, the
client's tools are `client_tools.py`'s, what is logged is `served.py`'s. Closing the stream cancels the episode, and
with it the model's and the tools' work, at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from google.protobuf import json_format
from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool_server import chat
from nightschool_server.agent import episode
from nightschool_server.agent import loop as agent
from nightschool_server.agent.executors import ClientExecutor, RoutingExecutor, ToolExecutor
from nightschool_server.agent.formats import call_form, check_form
from nightschool_server.app import App
from nightschool_server.auth import Caller
from nightschool_server.engine import Delta, Sampling
from nightschool_server.errors import AppError, InvalidRequestError
from nightschool_server.ids import new_id
from nightschool_server.runtime import Runtime
from nightschool_server.service import wire
from nightschool_server.service.client_tools import ClientTools
from nightschool_server.service.repeats import Claim
from nightschool_server.service.served import Recorder, Served, usage_of
from nightschool_server.service.task_files import TaskFiles
from nightschool_server.service.task_limits import task_limits
from nightschool_server.service.wire_files import files_of
from nightschool_server.service.wire_replies import (
    merged_deltas,
    messages_to_proto,
    tool_call_to_proto,
    tool_result_to_proto,
)
from nightschool_server.tools.forking import remove_tree
from nightschool_server.tools.state import ToolState

Response = agent_pb2.RunTaskResponse
Responses = AsyncGenerator[Response, None]
Requests = AsyncIterator[agent_pb2.RunTaskRequest]
Item = Response | Delta | episode.EpisodeResult

OUTCOMES: dict[episode.Outcome, agent_pb2.TaskFinished.Outcome.ValueType] = {
    "answered": agent_pb2.TaskFinished.ANSWERED,
    "max_steps": agent_pb2.TaskFinished.MAX_STEPS,
    "max_tokens": agent_pb2.TaskFinished.MAX_TOKENS,
    "max_time": agent_pb2.TaskFinished.MAX_TIME,
}


@dataclass(frozen=True)
class Inputs:
    """What a task brings beside its messages."""

    images: Mapping[str, bytes]
    files: TaskFiles


class TaskRunner:
    """Runs tasks."""

    def __init__(self, runtime: Runtime, recorder: Recorder) -> None:
        self._runtime = runtime
        self._recorder = recorder
        config = runtime.config.agent
        self._form = call_form(config)
        self._defaults = Sampling(
            max_tokens=config.max_tokens, temperature=config.temperature, special_tokens=self._form.special_tokens
        )

    async def responses(self, requests: Requests, caller: Caller) -> Responses:
        """Started, what happens, finished. A repeated request_id gets the first one's end."""
        call = await self._call_of(await anext(aiter(requests), None))
        async with self._recorder.claim(caller.name, call) as claim:
            if claim.response is not None:
                for response in replayed(claim.response):
                    yield response
                return
            async with aclosing(self._run(call, caller, claim, requests)) as responses:
                async for response in responses:
                    yield response

    async def _call_of(self, first: agent_pb2.RunTaskRequest | None) -> wire.ModelCall:
        """The call that the first event asks for."""
        if first is None or first.WhichOneof("event") != "start":
            raise InvalidRequestError("start", "start is missing: send it as the first event")
        start, limits = first.start, self._runtime.image_limits
        if wire.takes_time(start.messages, start.client_tools):
            call = await asyncio.to_thread(wire.task_call, start, self._defaults, limits)
        else:
            call = wire.task_call(start, self._defaults, limits)
        check_form(self._form, call.tools)
        if start.files:
            files = await asyncio.to_thread(files_of, start.files, "start.files", self._runtime.config.agent)
            call = replace(call, files=files)
        self._limits(call)
        return call

    def _limits(self, call: wire.ModelCall) -> episode.Limits:
        runtime = self._runtime
        return task_limits(call.limits, runtime.config.agent, runtime.app, max_step_tokens=call.sampling.max_tokens)

    async def _run(self, call: wire.ModelCall, caller: Caller, claim: Claim, requests: Requests) -> Responses:
        runtime, recorder = self._runtime, self._recorder
        keep = recorder.policy_of(call) != "no_log"
        images = await runtime.images.bytes_of(call.images, keep=keep)
        routed = runtime.registry.route(call.session_id, call.adapter, caller.name, unproven=caller.scope == "admin")
        async with TaskFiles(runtime.store, runtime.config, caller, keep=keep) as files, routed as lease:
            call = await files.bring(call)
            served = Served(new_id("resp"), "task", caller.name, call, lease.adapter)
            yield Response(started=agent_pb2.Started(response_id=served.response_id, adapter=served.adapter))
            result: episode.EpisodeResult | None = None
            try:
                async with aclosing(self._batches(served, Inputs(images, files), requests)) as batches:
                    async for batch in batches:
                        for item in joined(batch, logprobs=call.sampling.logprobs):
                            if isinstance(item, episode.EpisodeResult):
                                result = item
                            else:
                                yield item
            except BaseException as error:
                recorder.failed(served, error)
                raise
            assert result is not None, "an episode ends with its result"
            served.end_with(result)
            finished = Response(finished=finished_of(result, files.returned()))
            stored = stored_form(served, finished)
            await recorder.save(served, stored)
            claim.response = stored
            yield finished

    async def _batches(self, served: Served, inputs: Inputs, requests: Requests) -> AsyncGenerator[list[Item], None]:
        """What happens in the episode, its result last; each batch is what has come since the one before."""
        queue: asyncio.Queue[Item | None] = asyncio.Queue()
        keep = self._recorder.policy_of(served.call) != "no_log"
        client = ClientTools(
            queue.put_nowait, lambda parts: self._runtime.images.bytes_of(parts, keep=keep), self._runtime.image_limits
        )
        with self._workspace(served.response_id) as root:
            running = asyncio.create_task(self._run_episode(served, inputs, client, root, queue.put_nowait))
            listening = asyncio.create_task(client.listen(requests))
            running.add_done_callback(lambda _: queue.put_nowait(None))
            listening.add_done_callback(lambda task: queue.put_nowait(None) if _failed(task) else None)
            try:
                while (item := await queue.get()) is not None:
                    batch = [item]
                    while not queue.empty() and (item := queue.get_nowait()) is not None:
                        batch.append(item)
                    yield batch
                    if item is None:
                        break
                await (listening if _failed(listening) else running)
            finally:
                for task in (running, listening):
                    task.cancel()
                await asyncio.gather(running, listening, return_exceptions=True)

    async def _run_episode(
        self,
        served: Served,
        inputs: Inputs,
        client: ClientTools,
        root: Path,
        put: Callable[[Item | None], None],
    ) -> None:
        runtime, call = self._runtime, served.call

        async def on_event(event: episode.Event) -> None:
            match event:
                case episode.TextDelta(delta):
                    put(delta)
                case episode.ToolStarted(started):
                    put(Response(tool_call=tool_call_to_proto(client.begin(started))))
                case episode.ToolFinished(ended, outcome):
                    await inputs.files.take(outcome.files)
                    sent = client.on_wire(ended)
                    put(Response(tool_result=tool_result_to_proto(agent.result_of(sent, outcome))))
                case episode.Finished(result_):
                    put(result_)
                case episode.StepFinished():
                    pass

        executor, written = self._executor(call, client), runtime.action_format
        start = episode.Episode(
            messages=written.begin(with_system_prompt(runtime.app, call.messages), executor.tools),
            state=await inputs.files.place(initial_state(runtime.app, root)),
            limits=self._limits(call),
            images=inputs.images,
        )
        sampler = agent.EngineSampler(
            runtime.engine, served.response_id, adapter=served.adapter, priority=call.priority
        )
        actor = agent.LiveActor(sampler, executor, call.sampling, on_event, action_format=written)
        await agent.run_episode(start, actor, on_event)

    def _executor(self, call: wire.ModelCall, client: ClientTools) -> ToolExecutor:
        runtime = self._runtime
        if not call.tools:
            return runtime.tools
        theirs = ClientExecutor(
            call.tools,
            client.ask,
            timeout_s=runtime.config.agent.client_tool_timeout_s,
            max_output_chars=runtime.config.agent.max_output_chars,
        )
        both = RoutingExecutor(runtime.tools, theirs, runtime.app.tool_order if runtime.app else ())
        try:
            runtime.action_format.check(both.tools)
        except AppError as error:
            raise InvalidRequestError("start.client_tools", str(error)) from None
        return both

    @contextmanager
    def _workspace(self, response_id: str) -> Iterator[Path]:
        """A folder for whatever the task's tools write, gone when the task is."""
        root = self._runtime.home.workspaces / response_id
        try:
            yield root
        finally:
            remove_tree(root)


def with_system_prompt(app: App | None, messages: tuple[chat.Message, ...]) -> tuple[chat.Message, ...]:
    """The messages behind the application's system prompt, unless they bring their own."""
    if app is None or not app.system_prompt or messages[0].role == "system":
        return messages
    return (chat.system(app.system_prompt), *messages)


def initial_state(app: App | None, root: Path) -> ToolState:
    """The tools' state at the beginning of a task."""
    return ToolState("{}", root) if app is None else ToolState.initial(app, root)


def joined(batch: list[Item], *, logprobs: bool) -> Iterator[Response | episode.EpisodeResult]:
    """The items of one wake-up in order, runs of deltas joined."""
    for are_deltas, run in itertools.groupby(batch, lambda item: isinstance(item, Delta)):
        if are_deltas:
            deltas = [item for item in run if isinstance(item, Delta)]
            yield from (Response(delta=delta) for delta in merged_deltas(deltas, logprobs=logprobs))
        else:
            yield from (item for item in run if not isinstance(item, Delta))


def finished_of(result: episode.EpisodeResult, files: Sequence[content_pb2.File]) -> agent_pb2.TaskFinished:
    """How the task ended."""
    return agent_pb2.TaskFinished(
        outcome=OUTCOMES[result.outcome],
        answer=result.answer,
        num_steps=result.num_steps,
        usage=usage_of(result.usage),
        messages=messages_to_proto(result.messages),
        files=files,
    )


def stored_form(served: Served, finished: Response) -> bytes:
    """What a repeat gets: the first and the last event."""
    started = Response(started=agent_pb2.Started(response_id=served.response_id, adapter=served.adapter))
    return json.dumps([json_format.MessageToDict(event) for event in (started, finished)]).encode()


def replayed(stored: bytes) -> Iterator[Response]:
    """The events in `stored_form`."""
    for event in json.loads(stored):
        yield json_format.ParseDict(event, Response())


def _failed(task: asyncio.Task[None]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None
