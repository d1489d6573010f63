"""`AsyncClient` and `Client`: every call of an application, and `admin` for operators.

`AsyncClient` is the implementation; `Client` is the same code over the blocking transport (see `blocking.py`).
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Unpack

from nightschool_proto.v1 import agent_pb2

from nightschool.admin import Admin, AsyncAdmin
from nightschool.async_transport import AsyncTransport
from nightschool.blocking import blocking
from nightschool.blocking_transport import BlockingTransport
from nightschool.caller import Caller
from nightschool.config import DEFAULT_TIMEOUT_S, Settings, Tls, resolve
from nightschool.content import File, Model, Reply, Scores
from nightschool.convert import from_proto
from nightschool.errors import InvalidRequestError
from nightschool.files import FileLike, download, local_file, local_files, upload
from nightschool.messages import MessagesLike
from nightschool.methods import GENERATE, LIST_MODELS, RECORD_FEEDBACK, SCORE
from nightschool.options import (
    GenerateOptions,
    ScoreOptions,
    TaskOptions,
    generate_request,
    new_request_id,
    score_request,
    task_request,
)
from nightschool.retry import RetryPolicy
from nightschool.streams import AsyncStream, Stream
from nightschool.tasks import AsyncTaskRun, TaskRun
from nightschool.tools import tools_of


class AsyncClient:
    """A nightschool server, from an event loop.

    Finds the server and the token of this machine by itself: arguments, then $NIGHTSCHOOL_ADDRESS and
    $NIGHTSCHOOL_TOKEN, then the home folder. One client per process is enough; it belongs to the loop of its first
    call. Every call raises the errors of `nightschool.errors`; a call without `timeout_s` takes the client's.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        home: str | os.PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        settings = resolve(address, token=token, home=home, timeout_s=timeout_s, tls=tls)
        self._take(Caller(AsyncTransport(settings), settings, retry or RetryPolicy()))

    @classmethod
    def _over(cls, caller: Caller) -> AsyncClient:
        """The implementation over any transport."""
        client = cls.__new__(cls)
        client._take(caller)
        return client

    def _take(self, caller: Caller) -> None:
        self._caller = caller
        self.admin = AsyncAdmin(caller)
        """What operators call; needs a token of scope admin."""

    @property
    def settings(self) -> Settings:
        """Where this client calls, and as whom."""
        return self._caller.settings

    async def generate(self, messages: MessagesLike, **options: Unpack[GenerateOptions]) -> Reply:
        """One model call, the whole answer at once.

        `messages` is a string, or a conversation of `Message`s or `{"role", "content"}` dictionaries. Options (all
        optional, see `options.GenerateOptions`): images, tools, max_tokens, temperature, top_p, top_k, seed, stop, n,
        logprobs, top_logprobs, ignore_eos, tool_choice, adapter, session_id, request_id, learning, priority, timeout_s.
        """
        request = generate_request(messages, options)
        response = await self._caller.unary(GENERATE, request, options.get("timeout_s"))
        return from_proto(Reply, response)

    def stream(self, messages: MessagesLike, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """One model call as it is sampled: iterate over the text, then read `.reply`. Options as for `generate`."""
        return AsyncStream(self._caller, generate_request(messages, options), options.get("timeout_s"))

    async def score(self, messages: MessagesLike, continuation: str, **options: Unpack[ScoreOptions]) -> Scores:
        """How likely `continuation` is as the answer to `messages`; nothing is sampled, nothing is logged.

        Options (all optional): tools, adapter, priority, timeout_s.
        """
        request = score_request(messages, continuation, options)
        return from_proto(Scores, await self._caller.unary(SCORE, request, options.get("timeout_s")))

    def run_task(self, task: MessagesLike, **options: Unpack[TaskOptions]) -> AsyncTaskRun:
        """Let the server's agent do a task: iterate over its events, or take `.result()`.

        `tools` run at this client, beside the application's own at the server: type-hinted Python functions or
        `Tool`s. `files` (paths, or `File`s) lie in the task's workspace when it begins. Other options (see
        `options.TaskOptions`): images, max_tokens (of one step), temperature, top_p, top_k, seed, stop, max_steps,
        adapter, session_id, request_id, learning, timeout_s.
        """
        tools = tools_of(options.get("tools", ()))
        files = local_files(options.get("files", ()))
        request = task_request(task, options, tools)
        return AsyncTaskRun(self._caller, request, tools=tools, files=files, timeout_s=options.get("timeout_s"))

    async def upload(self, file: FileLike, *, timeout_s: float | None = None) -> File:
        """Send a file in chunks, once for many tasks: what is returned goes into `files` of `run_task`.

        The server keeps it for `agent.keep_uploads_s`, a day, or as long as a logged request names it.
        """
        return await upload(self._caller, local_file(file), timeout_s)

    async def download(self, file: File | str, to: str | os.PathLike[str], *, timeout_s: float | None = None) -> Path:
        """Fetch a file that a task gave back, or any blob that this token has sent, by its sha256.

        `to` is a path, or a folder for one under the file's own name; the file is there whole or not at all.
        """
        return await download(self._caller, file, Path(to), timeout_s)

    async def feedback(
        self,
        response_id: str,
        *,
        good: bool | None = None,
        score: float | None = None,
        comment: str = "",
        correction: str = "",
        request_id: str | None = None,
    ) -> str:
        """Say what became of an answer: `good` or a `score` in [0, 1], and words. Returns the feedback's id.

        Durable when it returns.
        """
        if good is not None and score is not None:
            raise InvalidRequestError("good and score are both given: say one of them", field="value")
        request = agent_pb2.RecordFeedbackRequest(
            response_id=response_id,
            comment=comment,
            correction=correction,
            request_id=request_id or new_request_id(),
        )
        if good is not None:
            request.good = good
        if score is not None:
            request.score = score
        response = await self._caller.unary(RECORD_FEEDBACK, request)
        return response.feedback_id

    async def models(self) -> list[Model]:
        """The base model and its servable adapters."""
        pages = self._caller.pages(LIST_MODELS, agent_pb2.ListModelsRequest())
        return [from_proto(Model, model) async for page in pages for model in page.models]

    async def close(self) -> None:
        """End all calls and the connection."""
        await self._caller.transport.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()


class Client:
    """A nightschool server. Any number of threads may share one client.

    Finds the server and the token of this machine by itself: arguments, then $NIGHTSCHOOL_ADDRESS and
    $NIGHTSCHOOL_TOKEN, then the home folder. Every call raises the errors of `nightschool.errors`; a call without
    `timeout_s` takes the client's.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        home: str | os.PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        settings = resolve(address, token=token, home=home, timeout_s=timeout_s, tls=tls)
        self._inner = AsyncClient._over(Caller(BlockingTransport(settings), settings, retry or RetryPolicy()))
        self.admin = Admin(self._inner.admin)
        """What operators call; needs a token of scope admin."""

    @property
    def settings(self) -> Settings:
        """Where this client calls, and as whom."""
        return self._inner.settings

    generate = blocking(AsyncClient.generate)
    score = blocking(AsyncClient.score)
    feedback = blocking(AsyncClient.feedback)
    upload = blocking(AsyncClient.upload)
    download = blocking(AsyncClient.download)
    models = blocking(AsyncClient.models)
    close = blocking(AsyncClient.close)

    def stream(self, messages: MessagesLike, **options: Unpack[GenerateOptions]) -> Stream:
        """One model call as it is sampled: iterate over the text, then read `.reply`. Options as for `generate`."""
        return Stream(self._inner.stream(messages, **options))

    def run_task(self, task: MessagesLike, **options: Unpack[TaskOptions]) -> TaskRun:
        """Let the server's agent do a task: iterate over its events or take `.result()`."""
        return TaskRun(self._inner.run_task(task, **options))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
