"""An OpenAI-compatible endpoint on this machine that answers by a rule, and everything that goes wrong with one."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Rule = Callable[[Body], str]
"""What to answer to a request."""
Fault = str
"""`429`, `500` and so on; `retry:SECONDS` is a 429 that names a rest; `hang`, `garbage`, `empty`, `dies`."""


@dataclass
class LocalEndpoint:
    """What a running endpoint was asked, and what it is still to do wrong, first things first."""

    url: str
    seen: list[Body] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    hang_up: threading.Event = field(default_factory=threading.Event)
    """Set at the end, so that nothing hangs on."""


@contextmanager
def endpoint(rule: Rule) -> Iterator[LocalEndpoint]:
    """Serve `rule` on a free port until the block ends."""
    state = LocalEndpoint("")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.seen.append({"path": self.path, **body})
            state.keys.append(self.headers["authorization"])
            fault = state.faults.pop(0) if state.faults else ""
            match fault.partition(":"):
                case ("", _, _) if self.path.endswith("/embeddings"):
                    self._send(200, embeddings(body))
                case ("", _, _):
                    self._send(200, completion(rule(body), body))
                case ("hang", _, _):
                    state.hang_up.wait()
                case ("garbage", _, _):
                    self._send(200, "<html>busy</html>", content_type="application/json")
                case ("empty", _, _):
                    self._send(200, json.dumps({"object": "chat.completion", "choices": []}))
                case ("dies", _, _):
                    self._send(200, completion(rule(body), body), cut=20)
                case ("retry", _, seconds):
                    self._send(429, '{"error": {"message": "busy"}}', headers={"retry-after": seconds})
                case (status, _, code):
                    error = {"error": {"message": "no", "code": code or None}}
                    self._send(int(status), json.dumps(error))

        def _send(
            self, status: int, text: str, *, headers: dict[str, str] | None = None, cut: int = 0, content_type: str = ""
        ) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("content-type", content_type or "application/json")
            self.send_header("content-length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) - cut])
            self.close_connection = bool(cut)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.hang_up.set()
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str, body: Body) -> str:
    """A chat completion; a token is a word."""
    asked = sum(len(text_of(message).split()) for message in body["messages"])
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": asked, "completion_tokens": len(text.split()), "total_tokens": asked + len(text.split())}
    value = {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"]}
    return json.dumps({**value, "choices": [choice], "usage": usage})


def embeddings(body: Body) -> str:
    """A vector for each text: how often each letter is in it, the last text's vector first."""
    vectors = [[float(text.lower().count(letter)) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in body["input"]]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
    num_tokens = sum(len(text.split()) for text in body["input"])
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return json.dumps({"object": "list", "model": body["model"], "data": data[::-1], "usage": usage})


def text_of(message: Body) -> str:
    """The text of a message in either of its forms."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def prefers_longer(body: Body) -> str:
    """A critic under rubric step-1 that finds the longer action better."""
    asked = text_of(body["messages"][-1])
    first = asked.split("A:\n<data>", 1)[1].split("</data>", 1)[0]
    second = asked.split("B:\n<data>", 1)[1].split("</data>", 1)[0]
    return json.dumps({"better": "A" if len(first) > len(second) else "B", "confidence": 0.9})
