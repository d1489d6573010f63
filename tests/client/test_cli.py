"""The command line against the scripted server: output, JSON, exit codes, help."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import grpc
import pytest
from click.testing import CliRunner, Result
from nightschool.cli import nightschool
from nightschool_proto.v1 import admin_pb2, content_pb2

from tests.client.fake_replies import cycle, task_script
from tests.client.fake_server import TOKEN, WAIT_S, FakeServer, failing

Run = Callable[..., Result]
COMMAND = (sys.executable, "-c", "from nightschool.cli import main; main()")


@pytest.fixture
def cli(server: FakeServer, tmp_path: Path) -> Run:
    """Runs the command line on the scripted server, as its user."""
    (tmp_path / "server.json").write_text(json.dumps({"address": server.address, "pid": 1, "version": "0"}))
    (tmp_path / "cli.token").write_text(TOKEN)

    def run(*arguments: str, **options: Any) -> Result:
        result = CliRunner().invoke(nightschool, ["--home", str(tmp_path), *arguments], **options)
        assert "Traceback" not in result.stderr
        return result

    return run


def commands(group: click.Command, *path: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group, with its path."""
    if isinstance(group, click.Group):
        for name, command in group.commands.items():
            yield (*path, name), command
            yield from commands(command, *path, name)


TREE = dict(commands(nightschool))
PASSED_THROUGH = {
    ("serve",),
    ("doctor",),
    ("check",),
    ("learn",),
    ("train",),
    ("evaluate",),
    ("token",),
    ("critic", "audit"),
    ("pairs", "label"),
}
QUERIES = [
    ("status",), ("models",), ("tasks",), ("pairs",), ("pairs", "list"), ("pairs", "show", "pair_1"),
    ("generate", "hello"), ("run", "hello"),
    ("adapters", "list"), ("adapters", "show", "x"), ("adapters", "promote", "x"), ("adapters", "rollback"),
    ("adapters", "import", "/x"), ("cycles", "list"), ("cycles", "show"), ("cycles", "trigger"),
    ("cycles", "cancel", "x"), ("learner", "pause"), ("learner", "resume"), ("feedback", "resp_1", "--good"),
    ("forget", "ann", "--yes"),
]  # fmt: skip


def test_the_tree_of_commands_is_this() -> None:
    assert {" ".join(path) for path in TREE} == {
        "init", "check", "serve", "doctor", "learn", "train", "evaluate", "token",
        "status", "generate", "run", "feedback", "models", "forget",
        "tasks", "tasks list",
        "pairs", "pairs list", "pairs show", "pairs export", "pairs label", "critic", "critic audit",
        "learner", "learner pause", "learner resume",
        "adapters", "adapters list", "adapters show", "adapters promote", "adapters rollback", "adapters import",
        "adapters delete",
        "cycles", "cycles list", "cycles show", "cycles trigger", "cycles watch", "cycles report", "cycles cancel",
    }  # fmt: skip


@pytest.mark.parametrize("path", sorted(set(TREE) - PASSED_THROUGH), ids=" ".join)
def test_every_help_has_an_example_that_names_its_command(path: tuple[str, ...], cli: Run) -> None:
    result = cli(*path, "--help")
    assert result.exit_code == 0
    assert f"Example: nightschool {' '.join(path)}" in result.stdout
    assert all(option.help for option in TREE[path].params if isinstance(option, click.Option) and len(option.name) > 5)


@pytest.mark.parametrize("query", QUERIES, ids=" ".join)
def test_every_query_writes_json(query: tuple[str, ...], cli: Run) -> None:
    result = cli(*query, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)


@pytest.mark.parametrize("query", QUERIES, ids=" ".join)
def test_every_query_writes_text(query: tuple[str, ...], cli: Run) -> None:
    result = cli(*query)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip()


def test_tasks_stand_with_what_their_verifier_said(cli: Run) -> None:
    lines = cli("tasks").stdout.splitlines()
    assert [line.count("repair: vague") for line in lines[1:4]] == [0, 1, 1]


def test_tables_are_aligned_columns_when_piped(cli: Run) -> None:
    lines = cli("adapters", "list").stdout.splitlines()
    assert lines[0].split()[:3] == ["name", "state", "parent"]
    assert lines[1].startswith("4-00ff00ff  active   base    ")
    assert len(lines) == 5
    assert [line.index("base") for line in lines[1:]] == [lines[0].index("parent")] * 4


def test_json_keys_are_those_of_the_wire(cli: Run) -> None:
    (found,) = json.loads(cli("cycles", "list", "--json").stdout)
    assert set(found) == set(admin_pb2.Cycle.DESCRIPTOR.fields_by_name)
    assert found["created_at"] == "2026-01-02T03:04:05+00:00"
    assert found["state"] == "promoted"


def test_generate_writes_the_answer_to_stdout_and_its_id_to_stderr(
    cli: Run, server: FakeServer, tmp_path: Path
) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"raw")
    result = cli("generate", "hello", "--image", str(image), "--temperature", "0", "--adapter", "base")
    assert result.stdout == "echo hello\n"
    assert "resp_1: adapter 3-abcdef01" in result.stderr
    request = server.calls[0].request
    assert request.messages[0].parts[0].image.data == b"raw"
    assert (request.sampling.temperature, request.adapter) == (0.0, "base")
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("max_tokens")


def test_generate_streams_and_reads_stdin(cli: Run) -> None:
    assert cli("generate", "--stream", "hello there").stdout == "echo hello there \n"
    assert cli("generate", "-", input="from a pipe").stdout == "echo from a pipe\n"
    events = [json.loads(line) for line in cli("generate", "--stream", "--json", "hello").stdout.splitlines()]
    assert [event["event"] for event in events] == ["started", "delta", "delta", "answer", "reply"]


def test_run_writes_the_answer_to_stdout_and_the_tools_to_stderr(cli: Run, server: FakeServer) -> None:
    server.script["RunTask"].append(task_script(content_pb2.ToolCall(id="c", name="look", arguments_json="{}")))
    result = cli("run", "hello")
    assert result.stdout == "ToolError: this client has no tool 'look' that it can run\n"
    assert "-> look {}" in result.stderr
    assert "answered after 2 steps" in result.stderr


def test_feedback_is_sent_and_must_say_something(cli: Run, server: FakeServer) -> None:
    assert cli("feedback", "resp_1", "--bad", "--correction", "27").stdout == "fb_1\n"
    assert server.calls[0].request.correction == "27"
    assert cli("feedback", "resp_1").exit_code == 2
    assert cli("feedback", "resp_1", "--good", "--score", "1").exit_code == 2


def test_pairs_are_exported(cli: Run, tmp_path: Path) -> None:
    assert cli("pairs", "export").stdout == '{"prompt": 1}\n{"prompt": 2}\n'
    output = tmp_path / "pairs.jsonl"
    assert cli("pairs", "export", "--output", str(output)).stdout == ""
    assert output.read_text().count("\n") == 2


def test_a_cycle_s_report_is_written_as_a_page_or_as_json(cli: Run, tmp_path: Path, server: FakeServer) -> None:
    page = tmp_path / "page.html"
    assert cli("cycles", "report", "cyc_1", "--out", str(page)).stdout == f"{page}\n"
    assert page.read_text() == "<!DOCTYPE html>"
    assert json.loads(cli("cycles", "report", "--json").stdout) == {"cycle": {"id": "cyc_1"}}
    assert server.calls_of("GetCycleReport")[-1].request.id == "cyc_1"
    assert cli("cycles", "report", "--json", "--open").exit_code == 2


def test_the_registry_is_operated(cli: Run, server: FakeServer) -> None:
    promoted = cli("adapters", "promote", "4-00ff00ff", "--reason", "why", "--force").stdout
    assert promoted == "4-00ff00ff answers, after 0.25 s; a rollback goes to base\n"
    assert server.calls[-1].request.force
    assert cli("adapters", "rollback", "--to", "base").exit_code == 0
    assert server.calls[-1].request.to == "base"
    assert cli("adapters", "delete", "1-11111111", input="n\n").exit_code == 1
    assert cli("adapters", "delete", "1-11111111", "--yes").stdout == "deleted 1-11111111\n"
    assert len(server.calls_of("DeleteAdapter")) == 1


def test_a_watch_writes_lines_to_stderr_and_the_outcome_to_stdout(cli: Run) -> None:
    result = cli("cycles", "watch")
    assert result.exit_code == 0
    assert result.stdout == "cyc_1 promoted: the gate passed: 62.5% to 94.0% 62.5% -> 94.0% (n 400, p 1e-09)\n"
    assert result.stderr.splitlines() == [
        "cyc_1 running", "seeds      done    5/5 kept=5", "explore    running 1/10 2.0/s 3s left",
        "cyc_1 promoted", "explore    done    10/10",
    ]  # fmt: skip
    states = [json.loads(line)["state"] for line in cli("cycles", "watch", "cyc_1", "--json").stdout.splitlines()]
    assert states == ["running"] * 3 + ["promoted"]


@pytest.mark.parametrize(
    ("state", "code"),
    [("PROMOTED", 0), ("REJECTED", 0), ("STOPPED", 0), ("CANCELLED", 0), ("FAILED", 1)],
)
def test_a_watch_fails_only_with_its_cycle(state: str, code: int, cli: Run, server: FakeServer) -> None:
    server.script["WatchCycle"].append(lambda request, context: iter([cycle(admin_pb2.Cycle.State.Value(state))]))
    assert cli("cycles", "trigger", "--watch").exit_code == code


def test_without_a_cycle_the_remedy_is_said(cli: Run, server: FakeServer) -> None:
    server.script["ListCycles"].extend([lambda request, context: admin_pb2.ListCyclesResponse()] * 2)
    watched, listed = cli("cycles", "watch"), cli("cycles", "list")
    assert (watched.exit_code, listed.exit_code) == (2, 0)
    assert "nightschool cycles trigger" in watched.stderr
    assert "nightschool cycles trigger" in listed.stderr
    assert listed.stdout == ""


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "PERMISSION_DENIED"])
def test_a_mistake_of_the_user_is_one_sentence_and_exit_code_2(code: str, cli: Run, server: FakeServer) -> None:
    server.script["GetAdapter"].append(failing(grpc.StatusCode[code], "adapter 'x' is not known: see the list"))
    result = cli("adapters", "show", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "nightschool: adapter 'x' is not known: see the list\n"


def test_status_says_which_engine_runs_and_what_is_merged(cli: Run) -> None:
    lines = dict(line.split("  ", 1) for line in cli("status").stdout.splitlines())
    found = {name: value.strip() for name, value in lines.items()}
    assert (found["engine"], found["merged adapter"]) == ("transformers, 1 running, 2 waiting", "4-00ff00ff")


def test_a_fault_of_the_server_is_exit_code_1(cli: Run, server: FakeServer) -> None:
    server.script["GetStatus"].append(failing(grpc.StatusCode.INTERNAL, "internal error, id 7"))
    result = cli("status")
    assert (result.exit_code, result.stderr) == (1, "nightschool: internal error, id 7\n")


def test_a_wrong_token_is_said_with_the_remedy(cli: Run) -> None:
    result = cli("--token", "wrong", "status")
    assert result.exit_code == 2
    assert "nightschool token create" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("statsu",),
        ("status", "--jsn"),
        ("generate",),
        ("generate", "x", "--seed", "y"),
        ("--address", "x", "status"),
        ("cycles", "trigger", "--set", "epochs"),
        ("generate", "x", "--image", "/missing"),
        ("pairs", "exprt"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_one_sentence_and_exit_code_2(arguments: tuple[str, ...], cli: Run) -> None:
    result = cli(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1


def test_no_server_is_exit_code_1_in_a_real_process(tmp_path: Path) -> None:
    command = [*COMMAND, "--address", "127.0.0.1:1", "--home", str(tmp_path), "status"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "nightschool serve" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_interrupt_ends_a_watch_with_exit_code_130(server: FakeServer, tmp_path: Path) -> None:
    watching, ended = threading.Event(), threading.Event()

    def hang(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(ended.set)
        yield cycle(admin_pb2.Cycle.RUNNING, 1)
        watching.set()
        ended.wait(WAIT_S)

    server.script["WatchCycle"].append(hang)
    command = [*COMMAND, "--address", server.address, "--token", TOKEN, "--home", str(tmp_path), "cycles", "watch"]
    # A shell starts what runs in its background deaf to interrupts; the watch of a person at a terminal is not.
    hear = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", hear, *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert watching.wait(WAIT_S)
        assert process.stderr is not None
        # The first line says that the process is past its imports and reads the stream.
        assert process.stderr.readline() == "cyc_1 running\n"
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "nightschool: interrupted"
    assert "Traceback" not in rest
    assert ended.wait(WAIT_S)


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("serve", "server"),
        ("doctor", "server"),
        ("learn", "learner"),
        ("train", "learner"),
        ("evaluate", "learner"),
        ("token", "server"),
    ],
)
def test_a_missing_extra_is_one_sentence(command: str, extra: str, tmp_path: Path) -> None:
    # None in sys.modules is how Python itself says that a module is not there.
    code = "import sys; sys.modules['torch'] = None; from nightschool.cli import main; main()"
    start = [sys.executable, "-c", code, "--home", str(tmp_path), command]
    done = subprocess.run(start, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert f"pip install 'nightschool[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    helped = subprocess.run([*start, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert f"Example: nightschool {command}" in helped.stdout


def test_the_server_s_own_help_is_passed_through(tmp_path: Path) -> None:
    command = [*COMMAND, "--home", str(tmp_path), "serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "--no-learner" in done.stdout


def test_tokens_are_made_in_the_home_folder(tmp_path: Path) -> None:
    home = tmp_path / "school"
    command = [*COMMAND, "--home", str(home), "token"]
    made = subprocess.run([*command, "create", "app"], capture_output=True, text=True, timeout=120, check=True)
    assert made.stdout.startswith("ns_")
    assert (home / "nightschool.db").exists()
    refused = subprocess.run([*command, "destroy"], capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2


def test_a_cycle_is_shown_with_the_gates_rules_families_and_diversity(cli: Run) -> None:
    shown = cli("cycles", "show").stdout
    assert "version 2, 5e7d19355e7d, n 400" in shown
    assert "7.0 points in 8 of 10 runs" in shown
    assert "the evaluation set changed" in shown
    assert re.search(r"held +significance +p below 0.001", shown)
    assert re.search(r"noted +pass@2 +narrowed", shown)
    assert re.search(r"stock +50 +50.0% +90.0% +20 +0 +2e-06 +1e-09", shown)
    assert re.search(r"pass@2 +80.0% +70.0%", shown)
    assert re.search(r"different first actions +1.90 +1.20", shown)
