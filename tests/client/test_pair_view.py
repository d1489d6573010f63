"""`pairs show` on a terminal: two columns, and nothing that a model wrote is taken for markup."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

from tests.client.fake_server import TOKEN, FakeServer


def test_the_sides_stand_beside_each_other_on_a_terminal(server: FakeServer, tmp_path: Path) -> None:
    (tmp_path / "cli.token").write_text(TOKEN)
    command = [
        sys.executable, "-c", "from nightschool.cli import main; main()",
        "--home", str(tmp_path), "--address", server.address, "pairs", "show", "pair_1",
    ]  # fmt: skip
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=theirs, stdin=subprocess.DEVNULL, env=environment) as shown:
        os.close(theirs)
        written = bytearray()
        while piece := _read(ours):
            written += piece
        assert shown.wait(60) == 0
    os.close(ours)
    lines = written.decode().splitlines()
    assert any("chosen" in line and "rejected" in line for line in lines)
    assert any("2" in line and "[3]" in line for line in lines)
    assert "What is [b]1+1[/b]?" in lines
    assert any("chosen first: first, +1.50 nats for the chosen; 'A'" in line for line in lines)


def _read(descriptor: int) -> bytes:
    """The next bytes; empty at the end, which Linux tells as an error."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
