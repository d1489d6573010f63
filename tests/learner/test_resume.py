"""kill -9 of the real learner in every stage of one cycle, beside a real server and the real tiny model.

After every kill the learner is started again. What was written before a kill must be there afterwards, unchanged; no
unit may be there twice; and the cycle must come to its end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from nightschool import Client
from nightschool_learner.stages import STAGE_NAMES
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from examples.shop.traffic import traffic
from tests.learner.practice_home import dump
from tests.learner.processes import learner, serving, watch

SMALL = (
    "seed=4711",
    "synthesize.num_tasks=16",
    "synthesize.min_tasks=2",
    "synthesize.concurrency=4",
    "explore.concurrency=4",
    "explore.max_tokens=96",
    "critic.margin_nats=0.01",
    "pairs.min_pairs=2",
    "pairs.max_share_failed=1.0",
    "train.epochs=6",
    "train.checkpoint_steps=2",
    "evaluate.max_tasks=40",
    "evaluate.num_seeds=2",
    "evaluate.max_sampled_tasks=4",
    "evaluate.concurrency=8",
    "poll_s=0.1",
)

UNITS = ("cycle_seeds", "tasks", "candidates", "critiques", "pairs", "evaluation_results", "evaluations")
"""Tables whose rows never change once they are written."""


def count(store: Store, table: str) -> int:
    return int(store.query(f"SELECT COUNT(*) AS n FROM {table}")[0]["n"])


def num_resumes(store: Store) -> int:
    return int(store.query("SELECT num_resumes FROM cycles")[0]["num_resumes"])


def running(store: Store, stage: str) -> bool:
    return store.query("SELECT state FROM stages WHERE name = ?", (stage,)) not in ([], [{"state": "pending"}])


def moments(store: Store, folder: Path) -> dict[str, Callable[[], bool]]:
    """When to kill: in the middle of each stage, told by its rows."""
    return {
        "seeds": lambda: running(store, "seeds"),
        "synthesize": lambda: count(store, "tasks") >= 5,
        "explore": lambda: count(store, "steps") >= 4,
        "critique": lambda: count(store, "critiques") >= 6,
        "pairs": lambda: running(store, "pairs"),
        "train": lambda: (
            bool(list((folder / "train" / "checkpoints").glob("checkpoint-*"))) or running(store, "evaluate")
        ),
        "evaluate": lambda: count(store, "evaluation_results") >= 20,
        "promote": lambda: running(store, "promote"),
    }


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("resume") / "home")


@pytest.mark.timeout(1800)
def test_a_learner_killed_in_every_stage_finishes_the_cycle_and_pays_for_nothing_twice(home: Home) -> None:
    with serving(home), Client(home=home.path) as client:
        store = Store.open(home, migrate=False)
        serve(client)
        cycle = client.admin.cycles.trigger(reason="kill test", overrides=SMALL)
        before: dict[str, list[str]] = {}
        for num_kills, (stage, reached) in enumerate(moments(store, home.cycles / cycle.id).items()):
            with learner(home) as process:
                watch(store, process, lambda: num_resumes(store) == num_kills and reached())  # noqa: B023
            check_nothing_is_doubled(store)
            check_still_there(store, before)
            before = {table: dump(store, table) for table in UNITS}
            assert store.query("SELECT state FROM cycles") == [{"state": "running"}], f"killed in {stage}"
        with learner(home) as last:
            watch(store, last, lambda: store.query("SELECT ended_at FROM cycles") != [{"ended_at": None}])
            assert last.stop() == 0
        check_nothing_is_doubled(store)
        check_still_there(store, before)
        check_the_cycle_is_whole(store, home, cycle.id)


@pytest.mark.timeout(1800)
def test_a_server_killed_under_the_learner_is_waited_for_and_nothing_is_paid_twice(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with serving(home) as server, Client(home=home.path) as client:
        serve(client)
        client.admin.cycles.trigger(reason="kill test", overrides=(*SMALL, "server_wait_s=1", "pairs.min_pairs=10000"))
        store = Store.open(home, migrate=False)
        with learner(home) as process:
            watch(store, process, lambda: count(store, "steps") >= 4)
            server.kill()
            home.server_file.unlink()
            before = {table: dump(store, table) for table in UNITS}
            with serving(home):  # on another port
                watch(store, process, lambda: store.query("SELECT ended_at FROM cycles") != [{"ended_at": None}])
            assert process.stop() == 0
    check_nothing_is_doubled(store)
    check_still_there(store, before)
    [row] = store.query("SELECT state, outcome, num_resumes FROM cycles")
    assert row["state"] == "stopped", row["outcome"]
    assert row["num_resumes"] == 0, "the learner itself was not restarted"
    assert store.query("SELECT * FROM rollouts WHERE state <> 'done'") == []


def serve(client: Client) -> None:
    """Some live requests, with what their senders thought of the answers."""
    requests = traffic(seed=3)
    for _ in range(24):
        request = next(requests)
        result = client.run_task(request.prompt, images=request.images, temperature=0.0).result()
        client.feedback(result.response_id, good=request.liked(result.answer))


def check_still_there(store: Store, before: dict[str, list[str]]) -> None:
    """What was paid for before a kill is there afterwards, unchanged to the id and the time."""
    for table, rows in before.items():
        assert set(rows) <= set(dump(store, table)), table


def check_nothing_is_doubled(store: Store) -> None:
    for table, key in {
        "tasks": "cycle_id, slot",
        "rollouts": "task_id",
        "steps": "rollout_id, position",
        "candidates": "step_id, position",
        "critiques": "step_id, first, second",
        "pairs": "step_id, chosen, rejected",
        "evaluation_results": "set_digest, protocol, adapter, task_id, draw",
        "adapters": "cycle_id",
        "evaluations": "cycle_id",
    }.items():
        assert store.query(f"SELECT {key} FROM {table} GROUP BY {key} HAVING COUNT(*) > 1") == [], table


def check_the_cycle_is_whole(store: Store, home: Home, cycle_id: str) -> None:
    report = json.loads((home.cycles / cycle_id / "report.json").read_text())
    assert report["cycle"]["state"] in ("promoted", "rejected"), report["cycle"]["outcome"]
    assert report["cycle"]["num_resumes"] == len(STAGE_NAMES)
    assert [stage["state"] for stage in report["stages"]] == ["done"] * len(STAGE_NAMES)
    funnel = report["funnel"]
    assert funnel["slots"] == 16
    assert funnel["rollouts"] == funnel["tasks_kept"]
    assert store.query("SELECT * FROM rollouts WHERE state = 'running'") == []
    assert store.query("SELECT * FROM steps WHERE picked IS NULL") == []
    # 40 tasks greedily and 4 of them twice more, on two adapters.
    assert count(store, "evaluation_results") == 2 * (40 + 4 * 2)
    assert count(store, "adapters") == 1
