"""One model call from the router to the log: lease, images, engine, events, record.

Generate and StreamGenerate are the same here: a stream of events that begins with Started and ends with Usage.
The adapter is leased for the whole call, so a call ends on the adapter it began with. Closing the stream closes
the engine's iterator, which aborts the request. Owns no policy of calls (`interceptors.py`) and no wire checks
(`wire.py`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import replace

from nightschool_proto.v1 import agent_pb2, content_pb2

from nightschool_server import engine
from nightschool_server.agent.formats import call_form, check_form
from nightschool_server.auth import Caller
from nightschool_server.errors import InvalidRequestError
from nightschool_server.ids import new_id
from nightschool_server.runtime import Runtime
from nightschool_server.service.repeats import Claim
from nightschool_server.service.served import Method, Recorder, Served
from nightschool_server.service.wire import ModelCall
from nightschool_server.service.wire_replies import AnswersSoFar, merged_deltas

Event = agent_pb2.StreamGenerateResponse
Events = AsyncGenerator[Event, None]

SAMPLING_FIELDS = frozenset(engine.Sampling.__dataclass_fields__)


class Generator:
    """Runs single model calls."""

    def __init__(self, runtime: Runtime, recorder: Recorder) -> None:
        self._runtime = runtime
        self._recorder = recorder

    async def events(self, call: ModelCall, method: Method, caller: Caller) -> Events:
        """Started, deltas, one finished answer each, usage. A repeated request_id gets the first one's answer."""
        async with self._recorder.claim(caller.name, call) as claim:
            if claim.response is not None:
                for event in replayed(agent_pb2.GenerateResponse.FromString(claim.response)):
                    yield event
                return
            async with aclosing(self._run(call, method, caller, claim)) as events:
                async for event in events:
                    yield event

    async def score(self, call: ModelCall, continuation: str, caller: Caller) -> agent_pb2.ScoreResponse:
        """How likely `continuation` is as the answer to the call. Nothing of it is kept."""
        runtime = self._runtime
        images = await runtime.images.bytes_of(call.images, keep=False)
        async with runtime.registry.route(None, call.adapter, caller.name, unproven=caller.scope == "admin") as lease:
            prompt = engine.Prompt(call.messages, call.tools, images)
            found = await runtime.engine.score(prompt, continuation, adapter=lease.adapter, priority=call.priority)
            return agent_pb2.ScoreResponse(
                adapter=lease.adapter,
                tokens=content_pb2.Tokens(ids=found.token_ids, logprobs=found.logprobs),
                num_prompt_tokens=found.num_prompt_tokens,
            )

    async def _run(self, call: ModelCall, method: Method, caller: Caller, claim: Claim) -> Events:
        runtime, recorder = self._runtime, self._recorder
        form = call_form(runtime.config.agent)
        check_form(form, call.tools, tool_choice=call.tool_choice)
        images = await runtime.images.bytes_of(call.images, keep=recorder.policy_of(call) != "no_log")
        async with runtime.registry.route(
            call.session_id, call.adapter, caller.name, unproven=caller.scope == "admin"
        ) as lease:
            served = Served(new_id("resp"), method, caller.name, call, lease.adapter)
            yield Event(started=agent_pb2.Started(response_id=served.response_id, adapter=served.adapter))
            request = engine.GenerateRequest(
                request_id=served.response_id,
                prompt=engine.Prompt(call.messages, call.tools, images, call.tool_choice),
                sampling=replace(call.sampling, special_tokens=form.special_tokens),
                adapter=lease.adapter,
                priority=call.priority,
            )
            so_far = AnswersSoFar(call.sampling.n, call.sampling.logprobs, form, call.tools)
            try:
                async with aclosing(self._sample(request, so_far)) as events:
                    async for event in events:
                        yield event
            except BaseException as error:
                served.end_with_answer(so_far)
                recorder.failed(served, error)
                raise
            served.end_with_answer(so_far)
            stored = reply_of(served, so_far).SerializeToString() if call.request_id else b""
            await recorder.save(served, stored)
            claim.response = stored
            yield Event(usage=served.usage)

    async def _sample(self, request: engine.GenerateRequest, so_far: AnswersSoFar) -> Events:
        # The engine joins what it sampled while the network was busy; chunks are sent as they come.
        async with aclosing(self._deltas(request)) as deltas:
            async for delta in deltas:
                answer = so_far.add(delta)
                for chunk in merged_deltas([delta], logprobs=request.sampling.logprobs):
                    yield Event(delta=chunk)
                if delta.finish_reason is not None:
                    yield Event(finished=so_far.finished(answer))

    async def _deltas(self, request: engine.GenerateRequest) -> AsyncGenerator[engine.Delta, None]:
        deltas = self._runtime.engine.generate(request)
        try:
            async for delta in deltas:
                yield delta
        except InvalidRequestError as error:
            # The engine does not know where its fields lie on the wire.
            if error.field in SAMPLING_FIELDS:
                error.field = f"sampling.{error.field}"
            raise
        finally:
            if isinstance(deltas, AsyncGenerator):
                await deltas.aclose()


def reply_of(served: Served, so_far: AnswersSoFar) -> agent_pb2.GenerateResponse:
    """The whole reply, as Generate sends it and as repeats get it."""
    return agent_pb2.GenerateResponse(
        response_id=served.response_id,
        adapter=served.adapter,
        answers=[so_far.finished(answer) for answer in so_far.answers],
        usage=served.usage,
    )


def replayed(response: agent_pb2.GenerateResponse) -> Iterator[Event]:
    """The events of an answer that was given before, each answer's text in one delta."""
    yield Event(started=agent_pb2.Started(response_id=response.response_id, adapter=response.adapter))
    for answer in response.answers:
        if answer.text or answer.tokens.ids:
            tokens = answer.tokens if answer.HasField("tokens") else None
            yield Event(delta=agent_pb2.Delta(index=answer.index, text=answer.text, tokens=tokens))
        yield Event(finished=answer)
    yield Event(usage=response.usage)


async def gathered(events: Events) -> agent_pb2.GenerateResponse:
    """The reply of Generate out of its events."""
    response = agent_pb2.GenerateResponse()
    async with aclosing(events):
        async for event in events:
            if event.HasField("started"):
                response.response_id, response.adapter = event.started.response_id, event.started.adapter
            elif event.HasField("finished"):
                response.answers.append(event.finished)
            elif event.HasField("usage"):
                response.usage.CopyFrom(event.usage)
    response.answers.sort(key=lambda answer: answer.index)
    return response
