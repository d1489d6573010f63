"""Operators and adapters: the registry's views and changes on their way from and to the wire."""

from __future__ import annotations

from pathlib import Path

from nightschool_proto.v1 import admin_pb2

from nightschool_server.adapters.registry import AdapterRegistry, AdapterView, RouteChange
from nightschool_server.errors import InvalidRequestError
from nightschool_server.service.admin_records import evaluation_to_proto
from nightschool_server.service.pages import page_of
from nightschool_server.service.wire import bounded, identifier
from nightschool_server.service.wire_replies import timestamp


class AdapterAdmin:
    """The adapters of one registry."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self._registry = registry

    def list(self, request: admin_pb2.ListAdaptersRequest) -> tuple[list[admin_pb2.Adapter], str]:
        """Adapters, newest first, and the next page's token."""
        state = _state_of(request.state)
        page = page_of(request, f"adapters:{state}")
        before = page.after[0] if page.after else None
        views = self._registry.list(state=state, before_sequence=before, limit=page.size + 1)
        kept, token = page.cut(views, lambda view: (view.record.sequence,))
        return [adapter_to_proto(view) for view in kept], token

    def get(self, name: str) -> admin_pb2.Adapter:
        """One adapter. Raises UnknownAdapterError."""
        return adapter_to_proto(self._registry.get(name))

    async def import_(self, actor: str, request: admin_pb2.ImportAdapterRequest) -> admin_pb2.Adapter:
        """Take a folder or files in as a candidate. Raises InvalidRequestError, AdapterFormatError."""
        if bool(request.path) == bool(request.files):
            raise InvalidRequestError("path", "path and files are both set or both empty: send exactly one of them")
        source = Path(request.path) if request.path else dict(request.files)
        if isinstance(source, Path) and not source.is_absolute():
            raise InvalidRequestError(
                "path", f"path is {request.path!r}, but must be absolute: the server's working folder is not yours"
            )
        parent, reason = identifier(request.parent, "parent"), bounded(request.reason, "reason")
        return adapter_to_proto(await self._registry.import_adapter(source, parent, actor, reason))

    async def promote(self, actor: str, request: admin_pb2.PromoteAdapterRequest) -> admin_pb2.RouteChange:
        """Make an adapter the active one. Raises what the registry raises."""
        reason = bounded(request.reason, "reason")
        return change_to_proto(await self._registry.promote(request.name, actor, reason, force=request.force))

    async def rollback(self, actor: str, request: admin_pb2.RollbackAdapterRequest) -> admin_pb2.RouteChange:
        """Move the active pointer back. Raises what the registry raises."""
        reason = bounded(request.reason, "reason")
        return change_to_proto(await self._registry.rollback(request.to or None, actor, reason))

    async def reject(self, actor: str, request: admin_pb2.RejectAdapterRequest) -> admin_pb2.Adapter:
        """Mark a candidate that did not pass. Raises what the registry raises."""
        reason = bounded(request.reason, "reason")
        return adapter_to_proto(await self._registry.reject(request.name, actor, reason))

    async def delete(self, actor: str, request: admin_pb2.DeleteAdapterRequest) -> admin_pb2.DeleteAdapterResponse:
        """Remove an adapter that nobody holds. Raises what the registry raises."""
        await self._registry.delete(request.name, actor)
        return admin_pb2.DeleteAdapterResponse()


def adapter_to_proto(view: AdapterView) -> admin_pb2.Adapter:
    """An adapter as operators see it."""
    record = view.record
    return admin_pb2.Adapter(
        name=record.name,
        state=admin_pb2.Adapter.State.Value(record.state.upper()),
        parent=record.parent,
        cycle_id=record.cycle_id or "",
        digest=record.digest,
        rank=record.rank,
        alpha=record.alpha,
        target_modules=record.target_modules,
        size_bytes=record.size_bytes,
        created_at=timestamp(record.created_at),
        evaluation=evaluation_to_proto(view.evaluation) if view.evaluation else None,
        events=[
            admin_pb2.Event(
                at=timestamp(event["at"]), actor=event["actor"], action=event["action"], reason=event["reason"]
            )
            for event in view.events
        ],
        num_leases=view.num_leases,
        loaded=view.loaded,
    )


def change_to_proto(change: RouteChange) -> admin_pb2.RouteChange:
    """What a promotion or a rollback came to."""
    return admin_pb2.RouteChange(
        active_adapter=change.active,
        previous_adapter=change.previous,
        at=timestamp(change.at),
        duration_s=change.duration_s,
    )


def _state_of(value: int) -> str:
    """The registry's word for a state; empty where any will do."""
    if value not in admin_pb2.Adapter.State.values():
        raise InvalidRequestError("state", f"state is {value}, which is none of the states of an adapter")
    return "" if value == admin_pb2.Adapter.STATE_UNSPECIFIED else admin_pb2.Adapter.State.Name(value).lower()  # type: ignore[arg-type]
