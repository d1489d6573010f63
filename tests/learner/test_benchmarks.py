"""`nightschool evaluate` on small data sets in the real formats, against a real server whose engine is scripted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from nightschool import Message, Outcome, Role, TaskResult, ToolResult, Usage
from nightschool_learner.benchmarks.gta import read_gta
from nightschool_learner.benchmarks.main import main
from nightschool_learner.benchmarks.run import attempt_of
from nightschool_learner.benchmarks.similarity import Embedder
from nightschool_learner.benchmarks.task import Attempt, BenchmarkTask
from nightschool_learner.errors import BenchmarkError

from tests.harness import Running, server_thread
from tests.learner.benchmark_data import GAIA_LINES, GTA_TASKS, answer, gaia_line, gta_task, write_gaia, write_gta
from tests.server.scripted_engine import ScriptedEngine

COMMAND = (sys.executable, "-c", "from nightschool.cli import main; main()")


@dataclass
class World:
    """A server whose model is scripted."""

    server: Running
    engine: ScriptedEngine


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    engine = ScriptedEngine(answer)

    async def start() -> ScriptedEngine:
        return engine

    settings = {"agent.app": "tests.learner.benchmark_app:app"}
    with server_thread(tmp_path_factory.mktemp("benchmarks") / "home", settings, start) as server:
        yield World(server, engine)


@pytest.fixture
def evaluate(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command in this process, on the server, and gives its exit code."""
    world.engine.requests.clear()
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(world.server.home))
    return lambda *arguments: main([str(argument) for argument in arguments])


def lines(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a run by task."""
    return {row["task_id"]: row for row in map(json.loads, path.read_text().splitlines())}


def metrics(summary: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Score and denominator by metric."""
    return {metric["name"]: (metric["total"], metric["n"]) for metric in summary["metrics"]}


def test_gta_is_run_and_scored_with_denominators(
    evaluate: Callable[..., int], tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate("gta", "--data", write_gta(tmp_path / "gta"), "--out", out, "--json") == 0
    written = capsys.readouterr()
    summary = json.loads(written.out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert metrics(summary) == {
        "answer_official": (1.0, 4),  # mugs; of three whitelists and one free text
        "answer_sport": (2.0, 3),  # and Romans; 360 is on the blacklist
        "tool_acc": (3.0, 6),  # OCR and Calculator, TextToImage; of 2 + 1 + 1 + 1 + 1 steps
        "tool_precision": (3.0, 4),
        "code_exec": (3.0, 4),  # the Calculator failed once
    }
    official = summary["metrics"][0]
    assert (official["num_unscored"], official["interval"]) == (1, None)
    assert summary["metrics"][1]["interval"][0] == pytest.approx(0.2077, abs=1e-4)
    assert (summary["num_tasks"], summary["num_attempted"], summary["adapter"]) == (5, 5, "base")
    rows = lines(out / "rows.jsonl")
    assert list(rows) == ["0", "1", "2", "3", "10"]
    assert rows["1"]["scores"] == {"official": 0.0, "sport": 1.0, "matched_tools": 0.0}
    assert (rows["0"]["tools"], rows["2"]["tools"]) == (["OCR", "Calculator"], [])
    assert rows["1"]["actions"] == [{"tool": "Calculator", "is_error": True}]
    assert [rows[index]["kind"] for index in rows] == ["phrases", "phrases", "text", "image", "phrases"]
    assert "5/5 tasks, 1 of 5 right" in written.err
    assert all(len(request.prompt.images) == 1 for request in world.engine.requests)
    told = {request.prompt.messages[1].files[0].name for request in world.engine.requests}
    assert told == {"image_1.jpg"}  # it lies in the workspace, for tools
    assert {request.sampling.temperature for request in world.engine.requests} == {0.0}


def test_a_run_goes_on_where_it_stopped(
    evaluate: Callable[..., int], tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_gta(tmp_path / "gta"), tmp_path / "out"
    assert evaluate("gta", "--data", data, "--out", out, "--limit", 2) == 0
    assert "2 of 5 tasks" in capsys.readouterr().out
    with (out / "attempts.jsonl").open("a") as file:
        file.write('{"task_id": "2", "answ')  # a kill in the middle of a line
    world.engine.requests.clear()
    assert evaluate("gta", "--data", data, "--out", out) == 0
    asked = {request.prompt.messages[1].text for request in world.engine.requests}
    assert asked == {"What is it like?", "Paint a boat.", "How much in all?"}
    assert len((out / "attempts.jsonl").read_text().splitlines()) == 5
    world.engine.requests.clear()
    assert evaluate("gta", "--data", data, "--out", out) == 0
    assert world.engine.requests == []


def test_a_folder_holds_one_run(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_gta(tmp_path / "gta"), tmp_path / "out"
    assert evaluate("gta", "--data", data, "--out", out, "--limit", 1) == 0
    capsys.readouterr()
    assert evaluate("gta", "--data", data, "--out", out, "--max-steps", 2) == 2
    assert "holds a run with max_steps None, and this one has 2: give another folder" in capsys.readouterr().err
    changed = write_gta(tmp_path / "changed", {"0": GTA_TASKS["1"]})
    assert evaluate("gta", "--data", changed, "--out", out) == 2
    assert "holds a run with data_digest" in capsys.readouterr().err


def test_gaia_is_run_and_scored_by_level(
    evaluate: Callable[..., int], tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert evaluate("gaia", "--data", write_gaia(tmp_path / "gaia"), "--out", out) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert metrics(summary) == {
        "answer_official": (2.0, 3),
        "answer_level_1": (1.0, 2),
        "answer_level_2": (1.0, 1),
        "code_exec": (2.0, 2),
    }
    assert "66.67%" in capsys.readouterr().out
    rows = lines(out / "rows.jsonl")
    assert rows["a"]["model_answer"] == "There are 12."
    assert rows["d"]["scores"] == {"official": None}
    assert lines(out / "submission.jsonl")["d"] == {"task_id": "d", "model_answer": "nobody"}
    looked = [request for request in world.engine.requests if "picture" in request.prompt.messages[1].text]
    assert [len(request.prompt.images) for request in looked] == [1]


def test_a_file_that_is_no_picture_goes_into_the_workspace(
    evaluate: Callable[..., int], tmp_path: Path, world: World
) -> None:
    data = write_gaia(tmp_path / "gaia", [gaia_line("e", "Who knows?", "nobody", file_name="e.csv")])
    (data / "e.csv").write_text("a,b\n")
    assert evaluate("gaia", "--data", data, "--out", tmp_path / "out") == 0
    (request,) = world.engine.requests
    (file,) = request.prompt.messages[1].files
    assert (file.name, file.size_bytes, len(request.prompt.images)) == ("e.csv", 4, 0)


def test_a_task_that_ends_without_an_answer_is_wrong(
    evaluate: Callable[..., int], tmp_path: Path, world: World
) -> None:
    out = tmp_path / "out"
    assert evaluate("gta", "--data", write_gta(tmp_path / "gta"), "--out", out, "--max-steps", 1, "--limit", 1) == 0
    row = lines(out / "rows.jsonl")["0"]
    assert (row["outcome"], row["scores"]["official"], row["scores"]["matched_tools"]) == ("max_steps", 0.0, 1.0)


def test_a_task_that_the_server_refuses_is_wrong_and_says_why(evaluate: Callable[..., int], tmp_path: Path) -> None:
    data, out = write_gaia(tmp_path / "gaia", GAIA_LINES[2:3]), tmp_path / "out"
    (data / "c.png").write_bytes(b"no picture")
    assert evaluate("gaia", "--data", data, "--out", out) == 0
    row = lines(out / "rows.jsonl")["c"]
    assert (row["outcome"], row["scores"]["official"]) == ("refused", 0.0)
    assert "messages[0].parts[0].image" in row["error"]


def test_a_block_of_code_is_one_action_and_the_tools_that_it_calls_are_calls() -> None:
    results = (ToolResult("c", "python", "12", False), ToolResult("d", "python", "error: no", True))
    messages = tuple(Message(Role.TOOL, (result,)) for result in results)
    ended = TaskResult("resp_1", "base", Outcome.ANSWERED, "12", 3, Usage(1, 2, 0), messages, ())
    attempt = attempt_of(BenchmarkTask("0", "q"), ended, ["python", "OCR", "Calculator", "python"], 1.0)
    assert attempt.tools == ("OCR", "Calculator")
    assert [action.is_error for action in attempt.actions] == [False, True]
    assert Attempt.from_json(json.loads(json.dumps(asdict(attempt)))) == attempt


def test_the_command_line_becomes_the_evaluation(world: World, tmp_path: Path) -> None:
    data = write_gta(tmp_path / "gta")
    command = [*COMMAND, "--home", str(world.server.home), "evaluate", "gta", "--data", str(data), "--limit", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gta, adapter base, 1 of 5 tasks (1 answered)")
    assert (world.server.home / "benchmarks" / "gta" / "base" / "rows.jsonl").is_file()


WRONG_GTA = {
    "type": (gta_task("q", [], 7), "task '0': gt_answer is '7', an unknown type of answer"),
    "texts": (gta_task("q", [], [1]), "task '0': gt_answer is '[1]', an unknown type of answer"),
    "groups": (gta_task("q", [], {"whitelist": ["a"]}), "must be lists of lists of aliases"),
    "empty group": (gta_task("q", [], {"whitelist": [[]]}), "must be lists of lists of aliases"),
    "no groups": (gta_task("q", [], {"whitelist": []}), "must be lists of lists of aliases"),
    "tool": (gta_task("q", ["Telescope"], None), "its dialog calls 'Telescope', which toolmeta.json does not have"),
    "file": (gta_task("q", [], None, "image/none.jpg"), "its file 'image/none.jpg' is not in"),
    "outside": (gta_task("q", [], None, "../secret"), "its file '../secret' lies outside of"),
    "dialogs": ({**gta_task("q", [], None), "dialogs": []}, "files and dialogs are not as GTA writes them"),
    "missing": ({"files": [], "dialogs": []}, "gt_answer is missing"),
}


@pytest.mark.parametrize("case", WRONG_GTA)
def test_a_wrong_task_of_gta_is_refused_in_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, said = WRONG_GTA[case]
    assert main(["gta", "--data", str(write_gta(tmp_path / "gta", {"0": task}))]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


WRONG_GAIA = {
    "type": (gaia_line("a", "q", ["17"]), "line 1: 'Final answer' is \"['17']\", an unknown type of answer"),
    "file": (gaia_line("a", "q", "17", file_name="a.xlsx"), "its file 'a.xlsx' is not in"),
    "key": ({"task_id": "a"}, "line 1: 'Question' is missing"),
}


@pytest.mark.parametrize("case", WRONG_GAIA)
def test_a_wrong_line_of_gaia_is_refused_in_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, said = WRONG_GAIA[case]
    assert main(["gaia", "--data", str(write_gaia(tmp_path / "gaia", [line]))]) == 2
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1


def test_a_wrong_folder_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gta", "--data", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["gta", "--data", str(tmp_path)]) == 2
    assert "has no dataset.json: give the folder with GTA's dataset.json" in capsys.readouterr().err
    data = write_gta(tmp_path / "gta")
    assert main(["gta", "--data", str(tmp_path)]) == 2
    assert f"did you mean {data}?" in capsys.readouterr().err
    (data / "toolmeta.json").unlink()
    assert main(["gta", "--data", str(data)]) == 2
    assert "has no toolmeta.json" in capsys.readouterr().err
    (data / "dataset.json").write_text("{")
    assert main(["gta", "--data", str(data)]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
    gaia = write_gaia(tmp_path / "gaia")
    (gaia / "metadata.jsonl").write_text(json.dumps(GAIA_LINES[0]) + "\n" + json.dumps(GAIA_LINES[0]) + "\n")
    assert main(["gaia", "--data", str(gaia)]) == 2
    assert "line 2: task_id 'a' was used before" in capsys.readouterr().err


def test_a_server_that_is_away_is_waited_for_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NIGHTSCHOOL_TOKEN", "none")
    assert main(["gta", "--data", str(write_gta(tmp_path / "gta")), "--address", "127.0.0.1:1"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_an_adapter_that_is_not_served_is_refused(
    evaluate: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("gta", "--data", write_gta(tmp_path / "gta"), "--adapter", "7-none") == 2
    assert "--adapter '7-none' is not served; the server has base" in capsys.readouterr().err


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sentence encoder of random weights."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "a", "calm", "sea", "the", "is", "water", "storm"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    return folder


def test_free_text_is_scored_by_the_likest_reference(encoder: Path, tmp_path: Path) -> None:
    embedder = Embedder(encoder)
    assert embedder.similarity("a calm sea.", ["storm", "A calm sea."]) == pytest.approx(1.0, abs=1e-5)
    alone = [embedder.similarity("a calm sea.", [text]) for text in ("storm", "water is calm")]
    assert embedder.similarity("a calm sea.", ["storm", "water is calm"]) == pytest.approx(max(alone), abs=1e-5)
    gta = read_gta(write_gta(tmp_path / "gta"), embedder.similarity)
    right, cut = (gta.score(Attempt("2", "A calm sea.", outcome)) for outcome in ("answered", "max_tokens"))
    assert right.scores["official"] == pytest.approx(1.0, abs=1e-5)
    assert cut.scores["official"] == 0.0
    official = gta.metrics([right])[0]
    assert (official.num_unscored, official.n) == (0, 1)


def test_an_embedder_that_is_none_is_refused(tmp_path: Path, encoder: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"has no config.json: give the folder of an encoder"):
        Embedder(tmp_path)
    broken = shutil.copytree(encoder, tmp_path / "broken")
    (broken / "config.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="is no encoder that transformers can load"):
        Embedder(broken)
