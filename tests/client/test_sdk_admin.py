"""Every call of AdminService, on both clients; and that types and methods match the wire."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime

import pytest
from nightschool import (
    Adapter,
    AdapterState,
    AsyncClient,
    Client,
    Cycle,
    CycleState,
    FinishReason,
    InvalidRequestError,
    LearningPolicy,
    Outcome,
    Priority,
    Role,
    StageState,
    ToolChoice,
    Verification,
    content,
    methods,
    records,
)
from nightschool.convert import from_proto, to_json
from nightschool_proto.v1 import admin_pb2, agent_pb2, content_pb2

from tests.client.fake_replies import adapter, cycle
from tests.client.fake_server import FakeServer

RENAMED = {
    "Status": "GetStatusResponse", "Reply": "GenerateResponse", "RunChunk": "ExportRunResponse",
    "Scores": "ScoreResponse",
}  # fmt: skip
NOT_ON_THE_WIRE = {"Text", "ToolCalled", "ToolReturned", "TaskResult"}


def test_lists_go_on_over_all_pages(client: Client, server: FakeServer) -> None:
    assert [found.name for found in client.admin.adapters.list()][0::3] == ["4-00ff00ff", "1-11111111"]
    assert len(server.calls_of("ListAdapters")) == 2
    tasks = list(client.admin.tasks(cycle_id="cyc_1"))
    assert [task.id for task in tasks] == ["task_0", "task_1", "task_2"]
    assert tasks[0].verification is None
    assert tasks[1].verification == Verification("repair", "vague", "Sum it")
    assert [(origin.source, origin.num_attempts) for origin in tasks[0].origins] == [("made", 2)]
    assert [pair.step for pair in client.admin.pairs()] == [0, 1, 2]
    assert [found.id for found in client.admin.cycles.list()] == ["cyc_1"]


def test_pages_are_fetched_as_they_are_read(client: Client, server: FakeServer) -> None:
    assert next(client.admin.adapters.list(state="retired")).name == "4-00ff00ff"
    (call,) = server.calls_of("ListAdapters")
    assert call.request.state == admin_pb2.Adapter.RETIRED
    with pytest.raises(InvalidRequestError, match="candidate, canary"):
        next(client.admin.adapters.list(state="asleep"))


def test_writes_carry_their_reason_and_a_request_id(client: Client, server: FakeServer) -> None:
    admin = client.admin
    assert admin.adapters.promote("4-00ff00ff", reason="looks good", force=True).previous_adapter == "base"
    assert admin.adapters.rollback(reason="looked good").duration_s == 0.25
    assert admin.adapters.import_("/adapters/x", parent="base").state == AdapterState.CANDIDATE
    assert admin.cycles.trigger(reason="now", overrides=["train.epochs=1"]).state == CycleState.QUEUED
    assert admin.forget_user("ann") == 12
    admin.adapters.delete("1-11111111", request_id="mine")
    by_method = {call.method: call.request for call in server.calls}
    assert by_method["PromoteAdapter"].force
    assert list(by_method["TriggerCycle"].overrides) == ["train.epochs=1"]
    assert by_method["DeleteAdapter"].request_id == "mine"
    assert all(request.request_id for request in by_method.values())


def test_a_watch_ends_with_the_cycle(client: Client) -> None:
    seen = list(client.admin.cycles.watch("cyc_1"))
    assert [found.stages[1].num_done for found in seen] == [1, 5, 9, 10]
    assert seen[-1].state.ended
    assert seen[-1].evaluation is not None
    assert seen[-1].created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    assert seen[0].evaluation is None


async def test_the_async_admin_gives_what_the_blocking_one_gives(client: Client, aclient: AsyncClient) -> None:
    ours, theirs = client.admin, aclient.admin
    assert await theirs.status() == ours.status()
    assert [found async for found in theirs.adapters.list()] == list(ours.adapters.list())
    assert [found async for found in theirs.cycles.list()] == list(ours.cycles.list())
    assert [found async for found in theirs.tasks()] == list(ours.tasks())
    assert [found async for found in theirs.pairs()] == list(ours.pairs())
    assert await theirs.pair("pair_1") == ours.pair("pair_1")
    with pytest.raises(InvalidRequestError, match="preferences, corrections, thumbs"):
        next(ours.export_pairs(rows="likes"))
    assert [chunk async for chunk in theirs.export_pairs()] == list(ours.export_pairs())
    assert [chunk async for chunk in theirs.placement.export_run()] == list(ours.placement.export_run())
    assert [seconds async for seconds in theirs.placement.sleep_engine()] == [0.5, 1.5]
    assert list(ours.placement.sleep_engine(reason="a test")) == [0.5, 1.5]
    assert [found async for found in theirs.cycles.watch("cyc_1")] == list(ours.cycles.watch("cyc_1"))
    assert await theirs.adapters.get("4-00ff00ff") == ours.adapters.get("4-00ff00ff")
    assert await theirs.cycles.get("cyc_1") == ours.cycles.get("cyc_1")
    assert await theirs.cycles.report("cyc_1") == ours.cycles.report("cyc_1") == b"<!DOCTYPE html>"
    with pytest.raises(InvalidRequestError, match="html or json"):
        ours.cycles.report("cyc_1", format="pdf")
    assert await theirs.cycles.cancel("cyc_1") == ours.cycles.cancel("cyc_1")
    assert await theirs.learner.pause(reason="x") == ours.learner.pause(reason="x")
    assert await theirs.learner.resume() == ours.learner.resume()


def test_blocking_and_async_surfaces_are_the_same() -> None:
    def public(cls: type) -> set[str]:
        return {name for name in vars(cls) if not name.startswith("_")}

    from nightschool import admin, streams, tasks

    assert public(Client) == public(AsyncClient)
    for name in ("Adapters", "Cycles", "Learner", "Placement", "Admin"):
        assert public(getattr(admin, name)) == public(getattr(admin, f"Async{name}"))
    assert public(streams.Stream) == {name.replace("aclose", "close") for name in public(streams.AsyncStream)}
    assert public(tasks.TaskRun) == {name.replace("aclose", "close") for name in public(tasks.AsyncTaskRun)}


def test_every_method_of_the_wire_is_known() -> None:
    known = {
        (method.path, method.request.DESCRIPTOR.full_name, method.response.DESCRIPTOR.full_name)
        for method in vars(methods).values()
        if isinstance(method, methods.Method)
    }
    services = (
        agent_pb2.DESCRIPTOR.services_by_name["AgentService"],
        admin_pb2.DESCRIPTOR.services_by_name["AdminService"],
    )
    assert known == {
        (f"/{service.full_name}/{method.name}", method.input_type.full_name, method.output_type.full_name)
        for service in services
        for method in service.methods
    }


def _typed() -> list[type]:
    found = [*vars(records).values(), *vars(content).values()]
    return [cls for cls in found if dataclasses.is_dataclass(cls) and isinstance(cls, type)]


@pytest.mark.parametrize("cls", [cls for cls in _typed() if cls.__name__ not in NOT_ON_THE_WIRE])
def test_types_have_the_fields_of_their_messages(cls: type) -> None:
    name = RENAMED.get(cls.__name__, cls.__name__)
    modules = (admin_pb2, agent_pb2, content_pb2)
    message = next(getattr(module, name) for module in modules if hasattr(module, name))
    fields = {field.name for field in dataclasses.fields(cls)}
    assert fields == set(message.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Role, content_pb2.Message.Role),
        (LearningPolicy, content_pb2.LearningPolicy),
        (Priority, content_pb2.Priority),
        (ToolChoice, content_pb2.ToolChoice),
        (FinishReason, content_pb2.FinishReason),
        (Outcome, agent_pb2.TaskFinished.Outcome),
        (AdapterState, admin_pb2.Adapter.State),
        (CycleState, admin_pb2.Cycle.State),
        (StageState, admin_pb2.Stage.State),
    ],
)
def test_enums_have_the_values_of_the_wire(ours: type, theirs: object) -> None:
    names = {value.name.lower() if value.number else "unspecified" for value in theirs.DESCRIPTOR.values}  # type: ignore[attr-defined]
    assert {member.value for member in ours} == names  # type: ignore[attr-defined]


def test_a_value_of_a_newer_server_reads_as_unspecified() -> None:
    message = admin_pb2.Adapter(name="x")
    message.MergeFromString(b"\x10\x63")
    assert from_proto(Adapter, message).state == AdapterState.UNSPECIFIED


def test_json_has_every_key_numbers_as_numbers_and_iso_times(client: Client) -> None:
    status = to_json(client.admin.status())
    assert status["requests_served"] == 5_000_000_000
    assert status["learner"]["running"] is True
    assert status["log"] is None
    found = json.loads(json.dumps(to_json(from_proto(Cycle, cycle()))))
    assert found["created_at"] == "2026-01-02T03:04:05+00:00"
    assert (found["state"], found["stages"][0]["counts"]) == ("promoted", {"kept": 5})
    assert to_json(from_proto(Adapter, adapter()))["evaluation"] is None
