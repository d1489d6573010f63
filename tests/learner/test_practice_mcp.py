"""Practice with the tools of an MCP server: the real stage, store and processes; answers and verdicts made by hand."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from nightschool_learner import seed_records
from nightschool_learner.explore import ExploreStage
from nightschool_learner.seed_records import KEPT
from nightschool_server.agent.toolbox import list_tools
from nightschool_server.agent.toolcalls import write_call
from nightschool_server.chat import ToolResult
from nightschool_server.engine import Prompt, Sampling

from tests.learner.practice_home import FakeCritic, FakeSampler, cycle_on, log_request, open_home
from tests.server.mcp_app import app

CALLS = [
    write_call("probe.echo", {"text": "hello"}),
    write_call("probe.send", {"text": "hello"}),
    write_call("probe.kill", {}),
    write_call("probe.echo", {"text": 3}),
]


async def test_candidates_run_on_an_mcp_server_and_simulators_answer_for_what_is_external(tmp_path: Path) -> None:
    def answer(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if any(isinstance(part, ToolResult) for message in prompt.messages for part in message.parts):
            return "hello"
        return CALLS[0] if sampling.n == 1 else CALLS[index]

    store, sampler = open_home(tmp_path), FakeSampler(answer)
    [server] = app.mcp
    ours = replace(app, mcp=[replace(server, effects={**server.effects, "kill": "read_only"})])
    tools = await list_tools(ours)
    cycle = replace(cycle_on(store), app=ours, app_ref="tests.server.mcp_app:app", tools=tools)
    log_request(store, "seed", "Say hello.")
    with store.transaction() as db:
        seed_records.insert_task(db, cycle.id, seed_records.new_task(0, "Say hello to them.", (), KEPT), [], [])
    await ExploreStage(lambda cycle: sampler, lambda cycle, _: nullcontext(FakeCritic())).run(cycle)
    assert sampler.calls[0][0].tools == tools
    rows = store.query(
        "SELECT c.observation, c.failure, c.simulated FROM candidates c JOIN steps s ON s.id = c.step_id "
        "WHERE s.position = 0 ORDER BY c.position"
    )
    assert [tuple(row.values()) for row in rows] == [
        ("hello", "", 0),
        ("would have sent hello", "", 1),
        ("error: the MCP server 'probe' ended (signal SIGKILL)", "execution", 0),
        ("error: argument 'text': 3 is not of type 'string'", "schema", 0),
    ]
    [rollout] = store.query("SELECT * FROM rollouts")
    assert (rollout["state"], rollout["outcome"]) == ("done", "answered")
