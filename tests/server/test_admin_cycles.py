"""Cycles over AdminService: trigger, list, watch, cancel, pause; tasks, pairs, export; forgetting a caller. The rows
of a cycle are written as the learner writes them, by another connection to the same database."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from nightschool_proto.v1 import admin_pb2, agent_pb2
from nightschool_server import chat
from nightschool_server.home import Home
from nightschool_server.ids import new_id
from nightschool_server.store.store import Store

from tests.harness import Failure, Running, Stubs, ask, failure, server_thread
from tests.server.scripted_engine import ScriptedEngine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    async def start() -> ScriptedEngine:
        return ScriptedEngine()

    with server_thread(tmp_path / "home", {"agent.app": "tests.server.tools_app:app"}, start) as running:
        yield running


@pytest.fixture
async def wire(server: Running) -> AsyncIterator[Stubs]:
    async with server.stubs() as found:
        yield found


@pytest.fixture
def learner(server: Running) -> Iterator[Store]:
    """The store as the learner's process has it."""
    store = Store.open(Home(server.home), migrate=False)
    yield store
    store.close()


async def trigger(wire: Stubs, server: Running, **fields: Any) -> admin_pb2.Cycle:
    return await wire.admin.TriggerCycle(admin_pb2.TriggerCycleRequest(**fields), metadata=server.admin)


def write(store: Store, sql: str, *parameters: Any) -> None:
    with store.transaction() as db:
        db.execute(sql, parameters)


def insert(store: Store, table: str, **row: Any) -> None:
    marks = ", ".join("?" for _ in row)
    write(store, f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", *row.values())


def end(store: Store, cycle_id: str, state: str = "stopped") -> None:
    write(
        store, "UPDATE cycles SET state = ?, outcome = 'done', ended_at = ? WHERE id = ?", state, time.time(), cycle_id
    )


async def test_a_trigger_queues_one_cycle_and_a_second_names_the_first(
    wire: Stubs, server: Running, learner: Store
) -> None:
    cycle = await trigger(wire, server, reason="now", overrides=["explore.num_candidates=3"], request_id="t1")
    assert cycle.state == admin_pb2.Cycle.QUEUED
    assert (cycle.trigger, cycle.reason) == ("manual", "now")
    again = await trigger(wire, server, reason="now", overrides=["explore.num_candidates=3"], request_id="t1")
    assert again == cycle
    found = await failure(trigger(wire, server))
    assert found.code is grpc.StatusCode.FAILED_PRECONDITION
    assert cycle.id in found.message
    assert json.loads(learner.query("SELECT overrides FROM cycles")[0]["overrides"]) == ["explore.num_candidates=3"]
    events = learner.query("SELECT actor, action, subject FROM events")
    assert events == [{"actor": "cli", "action": "trigger_cycle", "subject": cycle.id}]


async def test_an_override_that_breaks_its_rule_is_refused_before_anything_is_queued(
    wire: Stubs, server: Running, learner: Store
) -> None:
    for override in ("explore.num_candidates=0", "explore.num_candidate=3", "nonsense"):
        found = await failure(trigger(wire, server, overrides=[override]))
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "CONFIG")
        assert override.partition("=")[0].rpartition(".")[2] in found.message
    assert learner.query("SELECT * FROM cycles") == []


async def test_a_watcher_sees_every_change_until_the_end(wire: Stubs, server: Running, learner: Store) -> None:
    cycle = await trigger(wire, server)
    watching = wire.admin.WatchCycle(admin_pb2.WatchCycleRequest(id=cycle.id), metadata=server.admin)
    assert (await watching.read()).state == admin_pb2.Cycle.QUEUED
    write(learner, "UPDATE cycles SET state = 'running', started_at = ? WHERE id = ?", time.time() - 10, cycle.id)
    assert (await watching.read()).state == admin_pb2.Cycle.RUNNING
    insert(
        learner,
        "stages",
        cycle_id=cycle.id,
        name="seeds",
        position=0,
        state="running",
        num_done=500,
        num_total=2000,
        counts='{"kept":500}',
        started_at=time.time() - 1000,
    )
    stage = (await watching.read()).stages[0]
    assert (stage.name, stage.num_done, stage.num_total, dict(stage.counts)) == ("seeds", 500, 2000, {"kept": 500})
    assert 0.4 < stage.rate_per_s < 0.6
    assert 2500 < stage.eta_s < 3500
    # A renewed lease is no change for an operator.
    write(learner, "UPDATE cycles SET lease_pid = 1, lease_until = ? WHERE id = ?", time.time() + 9, cycle.id)
    end(learner, cycle.id)
    last = await watching.read()
    assert (last.state, last.outcome) == (admin_pb2.Cycle.STOPPED, "done")
    assert await watching.read() is grpc.aio.EOF


async def test_a_cycle_that_is_not_known_is_named(wire: Stubs, server: Running) -> None:
    for call in (
        wire.admin.GetCycle(admin_pb2.GetCycleRequest(id="cycle_0"), metadata=server.admin),
        wire.admin.WatchCycle(admin_pb2.WatchCycleRequest(id="cycle_0"), metadata=server.admin).read(),
        wire.admin.CancelCycle(admin_pb2.CancelCycleRequest(id="cycle_0"), metadata=server.admin),
    ):
        found = await failure(call)
        assert (found.code, found.reason, found.resource) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_CYCLE", "cycle_0")


async def test_a_queued_cycle_is_cancelled_at_once_and_a_running_one_is_asked_to_stop(
    wire: Stubs, server: Running, learner: Store
) -> None:
    async def cancel(cycle_id: str) -> admin_pb2.Cycle:
        request = admin_pb2.CancelCycleRequest(id=cycle_id, reason="no more")
        return await wire.admin.CancelCycle(request, metadata=server.admin)

    queued = await trigger(wire, server)
    ended = await cancel(queued.id)
    assert (ended.state, ended.outcome) == (admin_pb2.Cycle.CANCELLED, "no more")
    assert (await failure(cancel(queued.id))).code is grpc.StatusCode.FAILED_PRECONDITION
    running = await trigger(wire, server)
    write(learner, "UPDATE cycles SET state = 'running' WHERE id = ?", running.id)
    assert (await cancel(running.id)).state == admin_pb2.Cycle.RUNNING
    row = learner.query("SELECT cancel_reason FROM cycles WHERE id = ?", (running.id,))[0]
    assert row["cancel_reason"] == "no more"


async def test_cycles_are_listed_newest_first_by_page(wire: Stubs, server: Running, learner: Store) -> None:
    ids = []
    for _ in range(3):
        ids.append((await trigger(wire, server)).id)
        end(learner, ids[-1])
    first = await wire.admin.ListCycles(admin_pb2.ListCyclesRequest(page_size=2), metadata=server.admin)
    rest = admin_pb2.ListCyclesRequest(page_size=2, page_token=first.next_page_token)
    second = await wire.admin.ListCycles(rest, metadata=server.admin)
    assert [cycle.id for cycle in (*first.cycles, *second.cycles)] == ids[::-1]
    assert second.next_page_token == ""


async def test_the_learner_is_paused_and_resumed_by_a_row(wire: Stubs, server: Running, learner: Store) -> None:
    paused = await wire.admin.PauseLearner(admin_pb2.PauseLearnerRequest(reason="a demo"), metadata=server.admin)
    assert (paused.paused, paused.running) == (True, False)
    assert learner.query("SELECT paused FROM learner")[0]["paused"] == 1
    # Ahead of time: a few seconds later it would be one that has not reported for long.
    write(learner, "UPDATE learner SET pid = 1, last_seen_at = ?", time.time() + 60)
    resumed = await wire.admin.ResumeLearner(admin_pb2.ResumeLearnerRequest(), metadata=server.admin)
    assert (resumed.paused, resumed.running) == (False, True)
    write(learner, "UPDATE learner SET last_seen_at = ?", time.time() - 60)
    status = await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=server.admin)
    assert status.learner.running is False


def practise(store: Store, cycle_id: str, seed: str, *, simulated: bool = False) -> str:
    """One task from `seed` with one pair, whose chosen candidate was simulated or not; returns the task's id."""
    task, rollout, step = new_id("task"), new_id("roll"), new_id("step")
    now = time.time()
    insert(
        store,
        "tasks",
        id=task,
        cycle_id=cycle_id,
        slot=len(store.query("SELECT 1 FROM tasks")),
        prompt="How much is a mug?",
        images="[]",
        files=chat.canonical_json([chat.file_to_dict(chat.File("a.csv", "text/csv", 3, "0" * 64))]),
        state="kept",
        raw="",
        created_at=now,
    )
    insert(store, "task_seeds", task_id=task, response_id=seed)
    insert(store, "rollouts", id=rollout, cycle_id=cycle_id, task_id=task, adapter="base", state="done", started_at=now)
    history = chat.messages_to_json([chat.system("be brief"), chat.user("How much is a mug?")])
    insert(store, "steps", id=step, rollout_id=rollout, position=0, history=history, picked=0, created_at=now)
    for position, text in enumerate(("It costs 3.", "I do not know.")):
        insert(
            store,
            "candidates",
            id=f"{step}-{position}",
            step_id=step,
            position=position,
            text=text,
            token_ids="[1]",
            logprob=-1.0,
            num_samples=1,
            observation="",
            final=1,
            simulated=int(simulated and position == 0),
        )
    insert(
        store,
        "pairs",
        id=new_id("pair"),
        cycle_id=cycle_id,
        step_id=step,
        chosen=f"{step}-0",
        rejected=f"{step}-1",
        kind="both_ran",
        margin=2.5,
        created_at=now,
    )
    return task


async def response_of(wire: Stubs, metadata: Any, request_id: str) -> str:
    return (await wire.agent.Generate(ask("hi", request_id=request_id), metadata=metadata)).response_id


async def test_tasks_and_pairs_are_listed_and_exported_for_trl(wire: Stubs, server: Running, learner: Store) -> None:
    seed = await response_of(wire, server.user, "r1")
    cycle = await trigger(wire, server)
    task = practise(learner, cycle.id, seed)
    practise(learner, cycle.id, seed, simulated=True)
    with learner.transaction() as db:
        db.execute(
            "INSERT INTO task_files VALUES (?, 0, 'a.csv', 'csv', 'mugs', 'retrieved', 'ff', 0.5, ?, 0, '')",
            (task, seed),
        )
        db.executemany(
            "INSERT INTO verifications VALUES (?, ?, ?, 'vague', 'How much?')", [(task, 0, "drop"), (task, 1, "repair")]
        )
    tasks = await wire.admin.ListTasks(admin_pb2.ListTasksRequest(cycle_id=cycle.id), metadata=server.admin)
    assert (tasks.tasks[0].id, tasks.tasks[0].state) == (task, "kept")
    assert list(tasks.tasks[0].seed_request_ids) == [seed]
    assert [(file.name, file.size_bytes) for file in tasks.tasks[0].files] == [("a.csv", 3)]
    [origin], said = tasks.tasks[0].origins, tasks.tasks[0].verification
    assert (origin.source, origin.similarity, origin.request_id) == ("retrieved", 0.5, seed)
    assert (said.verdict, said.reason, said.original_prompt) == ("repair", "vague", "How much?")
    assert not tasks.tasks[1].HasField("verification")
    page = await wire.admin.ListPairs(admin_pb2.ListPairsRequest(page_size=1), metadata=server.admin)
    assert [(p.prompt, p.chosen, p.rejected, p.margin) for p in page.pairs] == [
        ("How much is a mug?", "It costs 3.", "I do not know.", 2.5)
    ]
    assert page.next_page_token
    page = await wire.admin.ListPairs(admin_pb2.ListPairsRequest(), metadata=server.admin)
    assert [pair.simulated for pair in page.pairs] == [False, True]
    assert [task.num_simulated for task in tasks.tasks] == [0, 1]
    exported = wire.admin.ExportPairs(admin_pb2.ExportPairsRequest(cycle_id=cycle.id), metadata=server.admin)
    lines = b"".join([reply.chunk async for reply in exported]).decode().splitlines()
    assert [json.loads(line)["simulated"] for line in lines] == [False, True]
    row = json.loads(lines[0])
    assert row["prompt"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "How much is a mug?"},
    ]
    assert row["chosen"] == [{"role": "assistant", "content": "It costs 3."}]
    assert row["rejected"] == [{"role": "assistant", "content": "I do not know."}]
    assert "add" in [tool["function"]["name"] for tool in row["tools"]]


async def test_how_well_tasks_and_their_families_are_solved_is_told(
    wire: Stubs, server: Running, learner: Store
) -> None:
    cycle = await trigger(wire, server)
    seed = await response_of(wire, server.user, "r1")
    tasks = [practise(learner, cycle.id, seed), practise(learner, cycle.id, seed, simulated=True)]
    write(learner, "UPDATE tasks SET solve_rate = 0.0 WHERE id = ?", tasks[0])
    for name, num_tasks in (("none/image", 4), ("add+look_up/text", 30)):
        insert(
            learner, "families", cycle_id=cycle.id, family=name, num_tasks=num_tasks, solve_rate=0.5, num_pairs=2,
            seen_at=1.0,
        )  # fmt: skip
    listed = await wire.admin.ListTasks(admin_pb2.ListTasksRequest(cycle_id=cycle.id), metadata=server.admin)
    assert [(task.HasField("solve_rate"), task.solve_rate) for task in listed.tasks] == [(True, 0.0), (False, 0.0)]
    shown = await wire.admin.GetCycle(admin_pb2.GetCycleRequest(id=cycle.id), metadata=server.admin)
    assert [(family.name, family.num_tasks, family.solve_rate, family.num_pairs) for family in shown.task_families] == [
        ("add+look_up/text", 30, 0.5, 2), ("none/image", 4, 0.5, 2),
    ]  # fmt: skip


async def test_the_report_of_a_cycle_is_given_out_once_the_cycle_has_ended(
    wire: Stubs, server: Running, learner: Store
) -> None:
    async def report(cycle_id: str, kind: str) -> bytes:
        request = admin_pb2.GetCycleReportRequest(id=cycle_id, format=kind)  # type: ignore[arg-type]
        return b"".join([r.chunk async for r in wire.admin.GetCycleReport(request, metadata=server.admin)])

    async def refusal(cycle_id: str) -> Failure:
        request = admin_pb2.GetCycleReportRequest(id=cycle_id)
        return await failure(wire.admin.GetCycleReport(request, metadata=server.admin).read())

    cycle = await trigger(wire, server)
    assert "has not ended" in (await refusal(cycle.id)).message
    folder = server.home / "cycles" / cycle.id
    folder.mkdir()
    page = b"<!DOCTYPE html>" * 30_000  # more than one chunk
    end(learner, cycle.id)
    waiting = asyncio.create_task(report(cycle.id, "HTML"))
    (folder / "report.json").write_bytes(b"{}")
    (folder / ".partial").write_bytes(page)
    (folder / ".partial").replace(folder / "report.html")
    assert await waiting == await report(cycle.id, "FORMAT_UNSPECIFIED") == page, "it is waited for at a cycle's end"
    assert await report(cycle.id, "JSON") == b"{}"
    (folder / "report.html").unlink()
    write(learner, "UPDATE cycles SET ended_at = ended_at - 60 WHERE id = ?", cycle.id)
    assert "writes it anew" in (await refusal(cycle.id)).message
    assert (await refusal("../../secret")).code is grpc.StatusCode.NOT_FOUND


async def test_forgetting_a_caller_erases_its_requests_and_what_came_of_them_only(
    wire: Stubs, server: Running, learner: Store
) -> None:
    hers, his = await response_of(wire, server.user, "r1"), await response_of(wire, server.other_user, "r1")
    cycle = await trigger(wire, server)
    practise(learner, cycle.id, hers)
    kept = practise(learner, cycle.id, his)
    insert(learner, "cycle_seeds", cycle_id=cycle.id, response_id=hers, position=0, why="")
    write(learner, "UPDATE cycles SET state = 'running' WHERE id = ?", cycle.id)
    forget = admin_pb2.ForgetUserRequest(user="alice")
    found = await failure(wire.admin.ForgetUser(forget, metadata=server.admin))
    assert found.code is grpc.StatusCode.FAILED_PRECONDITION
    assert cycle.id in found.message
    end(learner, cycle.id)
    training_data = server.home / "cycles" / cycle.id / "pairs.jsonl"
    training_data.parent.mkdir()
    training_data.write_text("{}\n")
    anchors = training_data.with_name("anchors.jsonl")
    anchors.write_text("{}\n")
    later, other = (server.home / "cycles" / name / "pairs.jsonl" for name in ("cycle_later", "cycle_other"))
    for path, replayed in ((later, [{"replayed_from": cycle.id}]), (other, [])):
        path.parent.mkdir()
        path.write_text("".join(json.dumps(row) + "\n" for row in [{"pair_id": "pair_1"}, *replayed]))
    thumbs = server.home / "cycles" / cycle.id / "thumbs.jsonl"
    thumbs.write_text("".join(json.dumps({"response_id": each, "label": True}) + "\n" for each in (hers, his)))
    reports = [training_data.with_name(name) for name in ("report.html", "report.json")]
    for path in reports:
        path.write_text("what she said")
    assert (await wire.admin.ForgetUser(forget, metadata=server.admin)).num_requests == 1
    assert not any(path.exists() for path in reports)
    assert [row["id"] for row in learner.query("SELECT id FROM requests")] == [his]
    assert [row["id"] for row in learner.query("SELECT id FROM tasks")] == [kept]
    assert len(learner.query("SELECT * FROM pairs")) == 1
    assert [path.exists() for path in (training_data, anchors, later, other)] == [False, False, False, True]
    assert [json.loads(line)["response_id"] for line in thumbs.read_text().splitlines()] == [his]
    actions = learner.query("SELECT actor, action, subject FROM events WHERE action = 'forget_user'")
    assert actions == [{"actor": "cli", "action": "forget_user", "subject": "alice"}]


async def test_a_caller_is_not_forgotten_while_a_cycle_may_hold_what_they_said(
    wire: Stubs, server: Running, learner: Store
) -> None:
    response_id = await response_of(wire, server.user, "r1")
    feedback = agent_pb2.RecordFeedbackRequest(response_id=response_id, good=True)
    await wire.agent.RecordFeedback(feedback, metadata=server.user)
    cycle = await trigger(wire, server)
    write(learner, "UPDATE cycles SET state = 'running' WHERE id = ?", cycle.id)
    insert(learner, "stages", cycle_id=cycle.id, name="pairs", position=4, state="running")
    forget = admin_pb2.ForgetUserRequest(user="alice")
    assert cycle.id in (await failure(wire.admin.ForgetUser(forget, metadata=server.admin))).message
    end(learner, cycle.id)
    assert (await wire.admin.ForgetUser(forget, metadata=server.admin)).num_requests == 1


async def test_the_status_tells_what_serves_and_what_was_served(wire: Stubs, server: Running) -> None:
    response_id = await response_of(wire, server.user, "r1")
    feedback = agent_pb2.RecordFeedbackRequest(response_id=response_id, good=True)
    await wire.agent.RecordFeedback(feedback, metadata=server.user)
    await failure(wire.agent.Generate(ask("hi", n=99), metadata=server.user))
    status = await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=server.admin)
    assert (status.base_model, status.active_adapter, status.healthy) == ("scripted", "base", True)
    assert (status.log.num_requests, status.log.num_feedback, status.log.num_dropped) == (1, 1, 0)
    assert (status.requests_served, status.requests_failed) == (2, 0)
    assert status.home == str(server.home)
    assert status.learner.num_new_seeds == 1


async def test_health_is_told_for_every_service_and_reflection_needs_no_token(wire: Stubs, server: Running) -> None:
    from grpc_health.v1 import health_pb2
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    for service in ("", "nightschool.v1.AgentService", "nightschool.v1.AdminService"):
        reply = await wire.health.Check(health_pb2.HealthCheckRequest(service=service))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(wire.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name async for reply in call for service in reply.list_services_response.service}
    assert {"nightschool.v1.AgentService", "nightschool.v1.AdminService", "grpc.health.v1.Health"} <= names


async def test_watchers_of_one_cycle_do_not_disturb_each_other(wire: Stubs, server: Running, learner: Store) -> None:
    cycle = await trigger(wire, server)
    request = admin_pb2.WatchCycleRequest(id=cycle.id)
    calls = [wire.admin.WatchCycle(request, metadata=server.admin) for _ in range(3)]
    await asyncio.gather(*(call.read() for call in calls))
    calls[0].cancel()
    end(learner, cycle.id)
    for call in calls[1:]:
        assert (await call.read()).state == admin_pb2.Cycle.STOPPED
