"""AgentService: what applications call.

Owns nothing but the way from a method to what does the work: `generation.py` for single model calls,
`task_runner.py` for tasks, `blobs.py` for bytes in chunks, `store/request_log.py` for feedback. Errors are raised as
the server's own; `interceptors.py` turns them into statuses.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
from nightschool_proto.v1 import agent_pb2, agent_pb2_grpc

from nightschool_server.adapters.routing import PROVEN
from nightschool_server.engine import BASE
from nightschool_server.errors import InvalidRequestError
from nightschool_server.runtime import Runtime
from nightschool_server.service import blobs, wire
from nightschool_server.service.generation import Generator, gathered
from nightschool_server.service.interceptors import current_caller
from nightschool_server.service.pages import page_of
from nightschool_server.service.served import Recorder
from nightschool_server.service.task_runner import TaskRunner
from nightschool_server.service.wire_replies import timestamp
from nightschool_server.store.request_log import Feedback

Context = grpc.aio.ServicerContext[Any, Any]


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """The servicer of nightschool.v1.AgentService."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        recorder = Recorder(runtime.request_log, runtime.config.log.default_policy)
        self._generator = Generator(runtime, recorder)
        self._tasks = TaskRunner(runtime, recorder)

    async def Generate(self, request: agent_pb2.GenerateRequest, context: Context) -> agent_pb2.GenerateResponse:
        """One model call, the whole answer at once."""
        call = await self._call_of(request)
        return await gathered(self._generator.events(call, "generate", current_caller()))

    async def StreamGenerate(
        self, request: agent_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[agent_pb2.StreamGenerateResponse]:
        """One model call, as tokens are sampled."""
        call = await self._call_of(request)
        async with aclosing(self._generator.events(call, "stream", current_caller())) as events:
            async for event in events:
                yield event

    async def Score(self, request: agent_pb2.ScoreRequest, context: Context) -> agent_pb2.ScoreResponse:
        """How likely a given answer is."""
        call = await self._call_of(
            agent_pb2.GenerateRequest(
                messages=request.messages, tools=request.tools, adapter=request.adapter, priority=request.priority
            )
        )
        return await self._generator.score(call, wire.bounded(request.continuation, "continuation"), current_caller())

    async def RunTask(
        self, request_iterator: AsyncIterator[agent_pb2.RunTaskRequest], context: Context
    ) -> AsyncIterator[agent_pb2.RunTaskResponse]:
        """The agent loop, with the application's tools and the client's."""
        async with aclosing(self._tasks.responses(request_iterator, current_caller())) as responses:
            async for response in responses:
                yield response

    async def RecordFeedback(
        self, request: agent_pb2.RecordFeedbackRequest, context: Context
    ) -> agent_pb2.RecordFeedbackResponse:
        """What became of an answer; durable when acknowledged."""
        caller = current_caller()
        feedback = feedback_of(request, caller.name, of_any_caller=caller.scope == "admin")
        return agent_pb2.RecordFeedbackResponse(feedback_id=await self._runtime.request_log.feedback(feedback))

    async def UploadBlob(
        self, request_iterator: AsyncIterator[agent_pb2.UploadBlobRequest], context: Context
    ) -> agent_pb2.UploadBlobResponse:
        """What does not fit a message; durable when acknowledged."""
        runtime = self._runtime
        return await blobs.upload(runtime.store, runtime.config.agent, request_iterator, current_caller())

    async def DownloadBlob(
        self, request: agent_pb2.DownloadBlobRequest, context: Context
    ) -> AsyncIterator[agent_pb2.DownloadBlobResponse]:
        """The bytes of a blob that the caller has sent or been given."""
        async with aclosing(blobs.download(self._runtime.store, request.sha256, current_caller())) as responses:
            async for response in responses:
                yield response

    async def ListModels(self, request: agent_pb2.ListModelsRequest, context: Context) -> agent_pb2.ListModelsResponse:
        """The base model, then the adapters that a request may be pinned to, newest first."""
        page = page_of(request, "models")
        before = page.after[0] if page.after else None
        # The base model opens the first page.
        views = self._runtime.registry.list(before_sequence=before, limit=page.size + 1)
        kept, token = page.cut(views, lambda view: (view.record.sequence,))
        names = [(view.record.name, view.record.created_at) for view in kept if view.record.state in PROVEN]
        models: list[tuple[str, float | None]] = [*([] if page.after else [(BASE, None)]), *names]
        return agent_pb2.ListModelsResponse(
            models=[self._model(name, created_at) for name, created_at in models], next_page_token=token
        )

    def _model(self, name: str, created_at: float | None) -> agent_pb2.Model:
        info = self._runtime.engine.model
        return agent_pb2.Model(
            name=name,
            base_model=info.name,
            active=name == self._runtime.registry.active,
            context_length=info.context_length,
            accepts_images=info.accepts_images,
            created_at=timestamp(created_at),
        )

    async def _call_of(self, request: agent_pb2.GenerateRequest) -> wire.ModelCall:
        limits = self._runtime.image_limits
        if wire.takes_time(request.messages, request.tools):
            # It would hold up every other stream.
            return await asyncio.to_thread(wire.generate_call, request, limits)
        return wire.generate_call(request, limits)


def feedback_of(request: agent_pb2.RecordFeedbackRequest, caller: str, *, of_any_caller: bool) -> Feedback:
    """The feedback, checked. Raises InvalidRequestError."""
    said = request.WhichOneof("value")
    if not request.response_id:
        raise InvalidRequestError("response_id", "response_id is empty: send that of the answer that this is about")
    if said is None and not request.comment and not request.correction:
        raise InvalidRequestError("value", "value is empty: send good, score, a comment or a correction")
    if said == "score" and not 0 <= request.score <= 1:
        raise InvalidRequestError("score", f"score is {request.score:g}, but must lie between 0 and 1")
    return Feedback(
        response_id=request.response_id,
        caller=caller,
        good=request.good if said == "good" else None,
        score=request.score if said == "score" else None,
        comment=wire.bounded(request.comment, "comment"),
        correction=wire.bounded(request.correction, "correction"),
        request_id=wire.identifier(request.request_id, "request_id") or None,
        of_any_caller=of_any_caller,
    )
