"""Settings that switch something off, seen from outside a running server."""

from __future__ import annotations

from pathlib import Path

from nightschool_server.home import Home
from nightschool_server.store.store import Store

from tests.harness import ask, server_thread


async def test_redaction_can_be_switched_off(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with server_thread(home, {"log.redact": "false"}) as running:
        async with running.stubs() as stubs:
            request = ask("write to ada@example.org")
            request.request_id = "durable-before-the-reply"
            reply = await stubs.agent.Generate(request, metadata=running.user)
        store = Store.open(Home(home), migrate=False)
        rows = store.query("SELECT parts FROM messages WHERE response_id = ?", (reply.response_id,))
        store.close()
    assert "ada@example.org" in rows[0]["parts"]
