"""Which adapters are in the engine: loaded on demand, proven after every load, the least recently used leave first.

Owns loading and unloading, the quarantine of what cannot be loaded as it was recorded, and the merged lane (`lane.py`),
which it makes leave an adapter before that is unloaded. Lives in the event loop of the engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable

from nightschool_server.adapters import folder as adapter_folder
from nightschool_server.adapters import rows as adapter_rows
from nightschool_server.adapters.lane import AdapterLane
from nightschool_server.adapters.probe import Prober
from nightschool_server.adapters.rows import SERVER, AdapterRecord, Entry
from nightschool_server.config.config import Config
from nightschool_server.engine import BASE, Engine
from nightschool_server.errors import (
    AdapterFormatError,
    FailedPreconditionError,
    OverloadedError,
    UnknownAdapterError,
)
from nightschool_server.home import Home
from nightschool_server.store.store import Store

log = logging.getLogger(__name__)


class LoadedAdapters:
    """The adapters of one engine. `is_held` says whether an adapter must stay."""

    def __init__(
        self, store: Store, home: Home, engine: Engine, config: Config, is_held: Callable[[str], bool]
    ) -> None:
        self._store = store
        self._home = home
        self._engine = engine
        self._max_loaded = config.adapters.max_loaded
        self._is_held = is_held
        self._prober = Prober(engine, config.adapters)
        self.lane = AdapterLane(engine, enabled=config.engine.merged_lane)
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def __contains__(self, name: str) -> bool:
        return name in self._loaded

    async def ensure(self, name: str, *, may_exceed: bool = False) -> None:
        """Have the adapter loaded and proven, which the base model always is. Returns at once where it is.

        One that is damaged, cannot be served or fails its proof is quarantined. Raises AdapterFormatError then,
        UnknownAdapterError, FailedPreconditionError (quarantined before, or made for another base model), and
        OverloadedError where every loaded adapter is in use, unless it `may_exceed` the limit. A caller that is
        cancelled does not stop the load for the others.
        """
        if name == BASE:
            return
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return
        task = self._loading.get(name)
        if task is None:
            task = asyncio.create_task(self._load(self._servable(name), may_exceed), name=f"load {name}")
            self._loading[name] = task
            task.add_done_callback(lambda done: self._loading_ended(name, done))
        await asyncio.shield(task)

    async def unload(self, name: str) -> None:
        """Take an adapter that nobody holds out of the engine."""
        # First of all, so that a request that comes in meanwhile waits and loads it again.
        if self._loaded.pop(name, self) is self:
            return
        async with self._locks[name]:
            await self.lane.leave(name)
            await self._engine.unload_adapter(name)
            log.info("event=adapter_unloaded adapter=%s", name)

    async def evict(self, room_for: int = 0) -> None:
        """Unload what nobody holds, least recently used first, down to the limit less `room_for`."""
        for name in list(self._loaded):
            if len(self._loaded) + room_for <= self._max_loaded:
                return
            if not self._is_held(name):
                await self.unload(name)

    def _servable(self, name: str) -> AdapterRecord:
        record = adapter_rows.get_record(self._store, name)
        if record is None:
            raise UnknownAdapterError(name)
        if record.state == "quarantined":
            raise FailedPreconditionError(f"adapter {name!r} is quarantined: see `nightschool adapters show {name}`")
        return record

    async def _load(self, record: AdapterRecord, may_exceed: bool) -> None:
        try:
            await self._load_and_prove(record, may_exceed)
        except AdapterFormatError as error:
            entry = Entry(SERVER, "quarantine", record.name, str(error))
            await asyncio.to_thread(adapter_rows.set_state, self._store, record.name, "quarantined", entry)
            raise

    async def _load_and_prove(self, record: AdapterRecord, may_exceed: bool) -> None:
        async with self._locks[record.name]:
            folder = await asyncio.to_thread(self._verified, record)
            await self.evict(room_for=1)
            if len(self._loaded) >= self._max_loaded and not may_exceed:
                raise OverloadedError(
                    f"{len(self._loaded)} adapters are loaded and in use (adapters.max_loaded {self._max_loaded}): "
                    "raise it, or wait until requests and sessions on older ones have ended"
                )
            await self._engine.load_adapter(record.name, folder.path)
            try:
                fault = await self._prober.fault(record.name, folder.manifest)
                if fault:
                    raise AdapterFormatError(f"adapter {record.name!r} failed its proof of effect: {fault}")
            except BaseException:
                await self._engine.unload_adapter(record.name)
                raise
            self._loaded[record.name] = None
            log.info("event=adapter_loaded adapter=%s num_loaded=%d", record.name, len(self._loaded))

    def _verified(self, record: AdapterRecord) -> adapter_folder.AdapterFolder:
        served = self._engine.model
        folder = adapter_folder.open_folder(self._home, record.name)
        folder.verify(record.digest)
        for key, now in (("base_model_digest", served.digest), ("chat_template_digest", served.chat_template_digest)):
            made_for = folder.manifest.get(key)
            if made_for and made_for != now:
                raise FailedPreconditionError(
                    f"adapter {record.name!r} was made for {folder.manifest.get('base_model')!r} with {key} "
                    f"{made_for[:12]}, this server's {served.name!r} has {now[:12]}: serve that model, or train again"
                )
        return folder

    def _loading_ended(self, name: str, task: asyncio.Task[None]) -> None:
        del self._loading[name]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("event=adapter_load_failed adapter=%s error=%s", name, error)
