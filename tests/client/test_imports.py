"""Which package may import which, and how little `import nightschool` costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nightschool
import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"nightschool_proto", "nightschool", "nightschool_server", "nightschool_learner", "examples", "tests", "bench"}
ALLOWED = {
    "proto/nightschool_proto": {"nightschool_proto"},
    "client/nightschool": {"nightschool", "nightschool_proto"},
    "server/nightschool_server": {"nightschool_server", "nightschool_proto"},
    # The learner samples through the SDK: to the server it is one more caller.
    "learner/nightschool_learner": {"nightschool_learner", "nightschool_server", "nightschool", "nightschool_proto"},
}
SDK_IMPORTS = {"grpc", "google", *ALLOWED["client/nightschool"], *sys.stdlib_module_names}
CLI_IMPORTS = {*SDK_IMPORTS, "click", "rich"}
FORBIDDEN = ("torch", "numpy", "click", "rich", "pydantic", "nightschool_server", "nightschool_learner", "PIL")


def files_of(room: str) -> list[Path]:
    """The modules of a room. The client's starter is what a user will own: text to the client, never imported."""
    return sorted(path for path in (ROOT / room).rglob("*.py") if "starter" not in path.relative_to(ROOT).parts)


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and top-level package of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.lineno, (node.module or "").partition(".")[0]


@pytest.mark.parametrize("room", sorted(ALLOWED))
def test_imports_go_one_way(room: str) -> None:
    files = files_of(room)
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports_of(path)
        if name in OURS and name not in ALLOWED[room]
    ]
    assert wrong == []


def test_the_client_needs_only_its_base_install() -> None:
    wrong = []
    for path in files_of("client/nightschool"):
        allowed = CLI_IMPORTS if "cli" in path.relative_to(ROOT / "client/nightschool").parts else SDK_IMPORTS
        wrong += [f"{path.name}:{line} imports {name}" for line, name in imports_of(path) if name not in allowed]
    assert wrong == []


def test_the_environment_is_read_in_config_alone() -> None:
    reads = re.compile(r"\bos\.(environ|getenv)\b")
    files = files_of("client/nightschool")
    assert {path.name for path in files if reads.search(path.read_text())} == {"config.py"}


def test_importing_the_sdk_is_light() -> None:
    """Beyond grpc and protobuf it loads itself and the standard library; `bench/imports.py` has the milliseconds."""
    code = (
        "import sys, grpc, google.protobuf.message; before = set(sys.modules); import nightschool; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not loaded & set(FORBIDDEN)
    assert loaded - sys.stdlib_module_names - {"nightschool", "nightschool_proto", "google"} == set()
    assert not loaded & {"unittest", "http", "multiprocessing", "sqlite3", "xml"}


def test_public_names_are_there_once() -> None:
    assert len(nightschool.__all__) == len(set(nightschool.__all__))
    assert all(hasattr(nightschool, name) for name in nightschool.__all__)
