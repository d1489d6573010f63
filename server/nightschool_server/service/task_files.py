"""The files of a running task: those that it brings, into the workspace; those that its tools give back, to the caller.

What a caller brings and is given, it holds (`store/held.py`), so that it may name and fetch it later; of a request with
NO_LOG nothing is held, and uploads that it named are let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Self

from nightschool_proto.v1 import content_pb2

from nightschool_server import chat
from nightschool_server.auth import Caller
from nightschool_server.config.config import Config
from nightschool_server.errors import InvalidRequestError
from nightschool_server.service.wire import ModelCall
from nightschool_server.service.wire_files import SentFile, check_size
from nightschool_server.service.wire_replies import file_to_proto
from nightschool_server.store import held
from nightschool_server.store.store import Store
from nightschool_server.tools.placing import PlacedFile, place_files
from nightschool_server.tools.returned import ReturnedFile
from nightschool_server.tools.state import ToolState
from nightschool_server.uninterrupted import obtained


class TaskFiles:
    """The files of one task. Use as a context."""

    def __init__(self, store: Store, config: Config, caller: Caller, *, keep: bool) -> None:
        """`keep`: the request may be kept; otherwise files go back by their bytes, half a message in all."""
        self._store = store
        self._config = config.agent
        self._caller = caller
        self._keep = keep
        self._left_bytes = config.server.max_message_bytes // 2
        self._brought: tuple[SentFile, ...] = ()
        self._placed: list[PlacedFile] = []
        self._returned: dict[str, content_pb2.File] = {}

    async def bring(self, call: ModelCall) -> ModelCall:
        """The call whose last user turn tells of its files.

        Raises InvalidRequestError for a sha256 that this caller may not use, and for too much in all.
        """
        if not call.files:
            return call
        self._brought = call.files
        self._placed = await asyncio.to_thread(self._found_all)
        return replace(call, messages=with_files(call.messages, [one.file for one in self._placed]))

    async def place(self, state: ToolState) -> ToolState:
        """The state with the task's files in its workspace."""
        return await obtained(partial(place_files, state, self._placed), ToolState.discard) if self._placed else state

    async def take(self, files: Sequence[ReturnedFile]) -> None:
        """Take over what a tool gave back, before the caller is told of it."""
        for returned in files:
            self._returned[returned.file.name] = await asyncio.to_thread(self._taken, returned)

    def returned(self) -> list[content_pb2.File]:
        """What the tools gave back, of each name the last."""
        return list(self._returned.values())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        uploads = [sent.sha256 for sent in self._brought if sent.data is None]
        if uploads and not self._keep:
            await asyncio.to_thread(held.release, self._store, self._caller.name, uploads)

    def _found_all(self) -> list[PlacedFile]:
        placed = [self._found(sent) for sent in self._brought]
        total = sum(one.file.size_bytes for one in placed)
        if total > self._config.max_files_bytes:
            raise InvalidRequestError(
                "start.files",
                f"start.files have {total} bytes, but at most {self._config.max_files_bytes} are taken "
                "(agent.max_files_bytes): send fewer or smaller ones",
            )
        return placed

    def _found(self, sent: SentFile) -> PlacedFile:
        if sent.data is not None:
            file = chat.File(sent.name, sent.media_type, len(sent.data), sent.sha256)
            if not self._keep:
                return PlacedFile(file, sent.data)
            held.hold_bytes(self._store, self._caller.name, sent.data, sent.media_type)
            return PlacedFile(file, self._store.blob_path(sent.sha256))
        reader = None if self._caller.scope == "admin" else self._caller.name
        size = held.readable_size(self._store, reader, sent.sha256)
        if size is None:
            raise InvalidRequestError(
                f"{sent.field}.sha256",
                f"{sent.field}.sha256 {sent.sha256} was neither uploaded by this token nor given to it, or its time is "
                "over (agent.keep_uploads_s): upload the file again",
            )
        check_size(f"{sent.field}.sha256", size, self._config)
        return PlacedFile(chat.File(sent.name, sent.media_type, size, sent.sha256), self._store.blob_path(sent.sha256))

    def _taken(self, returned: ReturnedFile) -> content_pb2.File:
        proto = file_to_proto(returned.file)
        if self._keep:
            held.hold_file(self._store, self._caller.name, returned.path, returned.file.media_type)
        elif returned.file.size_bytes <= self._left_bytes:
            self._left_bytes -= returned.file.size_bytes
            proto.data = returned.path.read_bytes()
        return proto


def with_files(messages: Sequence[chat.Message], files: Sequence[chat.File]) -> tuple[chat.Message, ...]:
    """The messages whose last turn of the user tells of the files, behind its images. Raises InvalidRequestError."""
    place = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)
    if place is None:
        raise InvalidRequestError("start.files", "start.files belong to a turn of the user: send one")
    parts = messages[place].parts
    behind = next((i for i, part in enumerate(parts) if not isinstance(part, chat.Image)), len(parts))
    turn = replace(messages[place], parts=(*parts[:behind], *files, *parts[behind:]))
    return (*messages[:place], turn, *messages[place + 1 :])
