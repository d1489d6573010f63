"""An application unlike the shop goes through a cycle with its `App` module and a configuration, and nothing else.

Text alone, a tiny model with random weights, and no critic of its own: writer and critic are OpenAI-compatible
endpoints on this machine that answer by a rule. Server, learner and trainer are the real processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nightschool import Client, CycleState, LearningPolicy
from nightschool_learner.endpoint_records import costs_of
from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.learner.endpoints import LocalEndpoint, endpoint, text_of
from tests.learner.processes import start, until
from tests.server.tiny_models import make_qwen2

FRUITS = ("apples", "pears", "plums", "figs", "dates", "limes")

CONFIG = """
[server]
port = 0

[agent]
app = "tests.learner.plain_app:app"

[learner]
poll_s = 0.1
seed = 4711

[learner.seeds]
min_seeds = 3

[learner.synthesize]
kind = "endpoint"
num_tasks = 12
min_tasks = 6
min_words = 2

[learner.synthesize.endpoint]
base_url = "{url}"
model = "writer"
key_env = "OTHER_KEY"
prompt_price = 1.0
completion_price = 4.0

[learner.explore]
num_candidates = 8
max_tokens = 200
top_p = 1.0

[learner.critic]
kind = "endpoint"
rubric = "step-2"

[learner.critic.endpoint]
base_url = "{url}"
model = "critic"
key_env = "OTHER_KEY"
prompt_price = 2.0
completion_price = 8.0

[learner.pairs]
min_pairs = 3

# Random weights may learn nothing that holds for what is held back; here every stage is to be passed.
[learner.train]
epochs = 1
validation_share = 0

[learner.gate]
min_n = 4
"""


def other(body: dict[str, Any]) -> str:
    """The rules: the writer asks for the price of so many fruits; the critic likes actions with fewer characters."""
    asked = text_of(body["messages"][-1])
    if body["model"] == "writer":
        number = int(body["seed"]) % 9973
        return f"picture: none\ntask: What is the price of {number} {FRUITS[number % len(FRUITS)]}?"
    candidates = asked.split("Candidate ")[1:]
    lengths = {block[0]: len(block.split("[data ", 1)[1].split("\n[end ", 1)[0]) for block in candidates}
    return json.dumps({"better": min(lengths, key=lambda letter: lengths[letter]), "confidence": 0.95})


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalEndpoint]:
    monkeypatch.setenv("OTHER_KEY", "sk-other")
    with endpoint(other) as running:
        yield running


def test_a_text_application_without_a_critic_is_trained_and_judged(local: LocalEndpoint, tmp_path: Path) -> None:
    home = Home(tmp_path / "home").create()
    home.config.write_text(CONFIG.format(url=local.url))
    model = make_qwen2(tmp_path / "model")
    server = start(home, "nightschool_server", "serve", "--model", str(model))
    try:
        until(home.server_file.exists, server)
        with Client(home=home.path) as client:
            for number in range(6):
                asked = f"What is the price of {number} red {FRUITS[number]}?"
                client.generate(asked, max_tokens=8, learning=LearningPolicy.TRAIN)
            *_, ended = client.admin.cycles.watch(client.admin.cycles.trigger(reason="another kind").id)
    finally:
        server.stop()
    said = server.log.read_text()
    assert ended.state is CycleState.REJECTED, f"{ended.state}: {ended.outcome}\n{said[-3000:]}"
    store = Store.open(home, migrate=False)
    trained = [stage.name for stage in ended.stages if str(stage.state) == "done"]
    assert trained == ["seeds", "synthesize", "explore", "critique", "pairs", "train", "evaluate", "promote"]
    assert ended.candidate, "an adapter was trained"
    assert store.query("SELECT COUNT(*) AS n FROM pairs WHERE kind = 'both_ran'")[0]["n"] >= 3
    costs = {cost.role: cost for cost in costs_of(store, ended.id)}
    assert set(costs) == {"writer", "critic"}
    assert all(cost.cost > 0 and cost.num_failed == 0 for cost in costs.values())
    duels = store.query("SELECT DISTINCT component, winner IS NULL AS open FROM duels")
    assert {"component": "judge", "open": 0} in duels
    assert "sk-other" not in said
    store.close()
