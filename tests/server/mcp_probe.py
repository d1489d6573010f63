"""An MCP server of the standard library alone, which does on demand what servers do wrong.

    python tests/server/mcp_probe.py [--tools JSON] [--http PORT]

It speaks the handshake of 2025 on its standard input and output. `--tools` replaces its list of tools. `--http` serves
the same over streamable HTTP on loopback, on a free port where it is 0, and prints the port when it listens.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

READ_ONLY = {"readOnlyHint": True}
TEXT = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
PNG = b"\x89PNG\r\n\x1a\n" + b"".join(
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"\0" + b"\xff\0\0" * 2 + b"\0" + b"\0\0\xff" * 2)),
        (b"IEND", b""),
    )
)

RELEASED = threading.Event()
"""`wait` waits for it, `release` sets it."""
CANCELLED: list[int] = []
WAITING: list[int] = []


def text(value: str, **fields: Any) -> dict[str, Any]:
    """A result of one text."""
    return {"content": [{"type": "text", "text": value}], **fields}


def everything(_: dict[str, Any]) -> dict[str, Any]:
    """A result of every kind of content."""
    png = base64.b64encode(PNG).decode()
    return {
        "content": [
            {"type": "text", "text": "one"},
            {"type": "image", "data": png, "mimeType": "image/png"},
            {"type": "image", "data": "AAAA", "mimeType": "image/png"},
            {"type": "audio", "data": "AAAA", "mimeType": "audio/wav"},
            {"type": "resource_link", "name": "log", "uri": "file:///log.txt", "mimeType": "text/plain"},
            {"type": "resource", "resource": {"uri": "memo://1", "text": "a memo"}},
            {"type": "resource", "resource": {"uri": "blob://1", "blob": "AAAA", "mimeType": "application/zip"}},
            {"type": "text", "text": "two"},
        ]
    }


def structured(_: dict[str, Any]) -> dict[str, Any]:
    return {"content": [], "structuredContent": {"b": 2, "a": 1}}


def fail(arguments: dict[str, Any]) -> dict[str, Any]:
    return text(arguments["text"], isError=True)


def refuse(arguments: dict[str, Any]) -> dict[str, Any]:
    raise ValueError(arguments["text"])


def die(_: dict[str, Any]) -> dict[str, Any]:
    sys.stderr.write("something is badly wrong\n")
    sys.stderr.flush()
    os._exit(3)


def kill(_: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def freeze(_: dict[str, Any]) -> dict[str, Any]:
    while True:
        time.sleep(1)


def spawn(_: dict[str, Any]) -> dict[str, Any]:
    """Start what outlives a careless end: a child in its group, and one that has left it."""
    near = subprocess.Popen(["sleep", "1000"])
    far = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return text(f"{os.getpid()} {near.pid} {far.pid}")


def wait(_: dict[str, Any]) -> dict[str, Any]:
    RELEASED.wait()
    return text("released")


def wait_once(arguments: dict[str, Any]) -> dict[str, Any]:
    """Wait for ever, unless it was called with this path before."""
    if not os.path.exists(arguments["text"]):
        open(arguments["text"], "x").close()
        threading.Event().wait()
    return text("this time it came through")


def release(_: dict[str, Any]) -> dict[str, Any]:
    RELEASED.set()
    return text("done")


def slightly_broken(_: dict[str, Any]) -> dict[str, Any]:
    """A picture with a remark whose checksum is wrong, which browsers show."""
    remark = struct.pack(">I", 4) + b"tEXta\0bc" + b"\0\0\0\0"
    head = 8 + 12 + 13
    data = base64.b64encode(PNG[:head] + remark + PNG[head:]).decode()
    return {"content": [{"type": "image", "data": data, "mimeType": "image/png"}]}


def noisy(_: dict[str, Any]) -> dict[str, Any]:
    LISTED.append({"name": "late", "inputSchema": NOTHING})
    sys.stdout.write("this line is no JSON-RPC\n")
    sys.stderr.write("a line of stderr\n")
    sys.stderr.flush()
    send({"jsonrpc": "2.0", "method": "notifications/tools/list_changed"})
    return text("said")


Tool = tuple[Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any], dict[str, Any]]
TOOLS: dict[str, Tool] = {
    "echo": (lambda arguments: text(arguments["text"]), TEXT, READ_ONLY),
    "environment": (lambda arguments: text(os.environ.get(arguments["text"], "")), TEXT, READ_ONLY),
    "long": (lambda _: text("x" * 3_000_000), NOTHING, READ_ONLY),
    "everything": (everything, NOTHING, READ_ONLY),
    "slightly_broken": (slightly_broken, NOTHING, READ_ONLY),
    "look_up": (lambda _: text("found"), NOTHING, {**READ_ONLY, "openWorldHint": True}),
    "count": (lambda _: text("3", structuredContent={"result": 3}), NOTHING, READ_ONLY),
    "structured": (structured, NOTHING, READ_ONLY),
    "fail": (fail, TEXT, READ_ONLY),
    "refuse": (refuse, TEXT, READ_ONLY),
    "send": (lambda arguments: text(f"sent {arguments['text']}"), TEXT, {"destructiveHint": False}),
    "die": (die, NOTHING, {}),
    "kill": (kill, NOTHING, {}),
    "freeze": (freeze, NOTHING, READ_ONLY),
    "spawn": (spawn, NOTHING, READ_ONLY),
    "wait": (wait, NOTHING, {}),
    "wait_once": (wait_once, TEXT, READ_ONLY),
    "release": (release, NOTHING, READ_ONLY),
    "noisy": (noisy, NOTHING, READ_ONLY),
    "pid": (lambda _: text(str(os.getpid())), NOTHING, READ_ONLY),
    "cancelled": (lambda _: text(str(len(CANCELLED))), NOTHING, READ_ONLY),
    "waiting": (lambda _: text(str(len(WAITING))), NOTHING, READ_ONLY),
}
LISTED = [
    {"name": name, "description": f"Does {name}.", "inputSchema": schema, "annotations": annotations}
    for name, (_, schema, annotations) in TOOLS.items()
]


def answer(message: dict[str, Any], listed: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The response to a message; None for a notification, and for a call that never ends."""
    method, params = message.get("method"), message.get("params", {})
    if "id" not in message:
        if method == "notifications/cancelled":
            CANCELLED.append(params["requestId"])
        return None
    reply = {"jsonrpc": "2.0", "id": message["id"]}
    if method == "initialize":
        info = {"name": "probe", "version": "1"}
        capabilities = {"tools": {"listChanged": True}}
        version = params["protocolVersion"]
        return {**reply, "result": {"protocolVersion": version, "capabilities": capabilities, "serverInfo": info}}
    if method == "ping":
        return {**reply, "result": {}}
    if method == "tools/list":
        # Two pages, as servers with many tools have.
        half = len(listed) // 2
        page = {"tools": listed[half:]} if "cursor" in params else {"tools": listed[:half], "nextCursor": "2"}
        return {**reply, "result": page}
    if method != "tools/call":
        return {**reply, "error": {"code": -32601, "message": f"no method {method}"}}
    try:
        return {**reply, "result": TOOLS[params["name"]][0](params["arguments"])}
    except ValueError as error:
        return {**reply, "error": {"code": -32602, "message": str(error)}}


_lock = threading.Lock()


def send(message: dict[str, Any]) -> None:
    """Write a message to standard output."""
    with _lock:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def serve_stdio(listed: list[dict[str, Any]]) -> None:
    """Answer each line; calls that wait on a thread of their own, everything else in order."""
    for line in sys.stdin:
        message = json.loads(line)
        if message.get("params", {}).get("name") in ("wait", "wait_once"):
            WAITING.append(message["id"])
            threading.Thread(target=lambda sent=message: send(answer(sent, listed) or {}), daemon=True).start()
        elif (response := answer(message, listed)) is not None:
            send(response)


def serve_http(listed: list[dict[str, Any]], port: int) -> None:
    """One JSON response for each POST, with a session that is known to this process alone."""
    session = str(os.getpid())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = self.headers.get("Mcp-Session-Id", session) == session
            if self.headers.get("Authorization") != "Bearer secret" or not known:
                return self._send(404 if not known else 401, None)
            if message.get("params", {}).get("name") == "wait":
                WAITING.append(message["id"])
            return self._send(200, answer(message, listed))

        def do_GET(self) -> None:
            self._send(405, None)

        do_DELETE = do_GET

        def _send(self, status: int, body: dict[str, Any] | None) -> None:
            data = json.dumps(body).encode() if body is not None else b""
            self.send_response(status if body is not None or status != 200 else 202)
            self.send_header("Content-Type", "application/json" if data else "text/plain")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Mcp-Session-Id", session)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    sys.stdout.write(f"{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--tools", type=json.loads, default=LISTED)
    parser.add_argument("--http", type=int)
    given = parser.parse_args()
    if given.http is not None:
        serve_http(given.tools, given.http)
    else:
        serve_stdio(given.tools)
