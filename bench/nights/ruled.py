"""A critic that knows the shop's rules, behind an OpenAI-compatible endpoint on this machine.

The shop's model judges by one wording alone, that of rubric step-1: it cannot write or answer a checklist. So that
recipes can be set beside each other at an equal critic, this one reads a case out of the fences of rubric step-2 or of
a checklist, asks `truth.py`, and says so in the form that was asked for. Of its answers a share is wrong, drawn from
the question, so that it errs alike in every run and independently between two orders or two candidates.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nightschool_learner.checklist import CHECK, WRITE
from nightschool_learner.prompts import NO_HISTORY
from nightschool_learner.rubrics import NO_RESULT

from bench.nights.truth import Action, Pictures, is_right, task_of

ERRORS = 0.1
"""Share of its answers that are wrong."""
QUESTIONS = (
    "Does the step call the tool that the task needs next, or answer once the result is known?",
    "Are its arguments, or its answer, exactly what the task and the results so far ask for?",
    "Is nothing made up that a tool should say?",
)
CONFIDENCE = 0.95
KEY = "BENCH_CRITIC_KEY"

_BLOCK = re.compile(r"^([^\n]+)\n\[data (\w{16})\]\n(.*?)\n\[end \2\]$", re.DOTALL | re.MULTILINE)
_TURN = re.compile(r"^(assistant|tool): ", re.MULTILINE)


@contextmanager
def ruled_endpoint(pictures: Pictures, errors: float = ERRORS) -> Iterator[str]:
    """Serve it on a free port until the block ends. Yields its base URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            data = json.dumps(completion(body, answer(body["messages"], pictures, errors))).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def ruled_critic(base_url: str) -> tuple[str, ...]:
    """A cycle's overrides that make it the critic. Sets the key in the environment, which servers inherit."""
    os.environ[KEY] = "none"
    endpoint = {"base_url": base_url, "model": "ruled", "key_env": KEY}
    settings = ("critic.kind=endpoint", "critic.rubric=step-2")
    return (*settings, *(f"critic.endpoint.{name}={value}" for name, value in endpoint.items()))


def answer(messages: list[dict[str, Any]], pictures: Pictures, errors: float) -> str:
    """What it says to a question."""
    told, asked = _text(messages[0]), _text(messages[-1])
    if told.startswith(_opening(WRITE)):
        return "\n".join(QUESTIONS)
    blocks = {title.rstrip(":"): text for title, _, text in _BLOCK.findall(asked)}
    images = [_sha256(part) for part in _parts(messages[-1]) if part["type"] == "image_url"]
    errs = int.from_bytes(hashlib.sha256(asked.encode()).digest()[:4], "big") < errors * 2**32
    if told.startswith(_opening(CHECK)):
        right = _is_right(blocks, images, pictures, blocks["Next step"], blocks["Its result"])
        said = ("yes",) * 3 if bool(right) != errs else ("yes", "no", "no")
        return "\n".join(f"{number}: {word}" for number, word in enumerate(said, start=1))
    found = [
        _is_right(blocks, images, pictures, blocks[f"Candidate {letter}"], blocks[f"Result of {letter}"])
        for letter in "AB"
    ]
    if bool(found[0]) == bool(found[1]) and not errs:
        return json.dumps({"better": "A", "confidence": 0.5})
    return json.dumps({"better": "A" if bool(found[0]) != errs else "B", "confidence": CONFIDENCE})


def completion(body: Mapping[str, Any], text: str) -> dict[str, Any]:
    """A chat completion; a token is a word."""
    read, written = sum(len(_text(message).split()) for message in body["messages"]), len(text.split())
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": body["model"],
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }


def _is_right(
    blocks: Mapping[str, str], images: list[str], pictures: Pictures, step: str, observation: str
) -> bool | None:
    task = task_of(re.sub(r"^(\[picture \d+\] )+", "", blocks["Task"]), images[:1], pictures)
    if task is None:
        return None
    return is_right(task, _so_far(blocks["So far"]), Action(step, "" if observation == NO_RESULT else observation))


def _so_far(text: str) -> list[Action]:
    """The steps in a history as the critic is shown it."""
    actions: list[Action] = []
    if text == NO_HISTORY:
        return actions
    spoken = _TURN.split(text)[1:]
    for who, said in zip(spoken[::2], spoken[1::2], strict=True):
        if who == "assistant":
            actions.append(Action(said.rstrip("\n"), ""))
        elif actions:
            actions[-1] = Action(actions[-1].text, said.rstrip("\n"))
    return actions


def _opening(wording: str) -> str:
    return wording.split(".", 1)[0]


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _text(message: Mapping[str, Any]) -> str:
    return "".join(part.get("text", "") for part in _parts(message))


def _sha256(part: Mapping[str, Any]) -> str:
    return hashlib.sha256(base64.b64decode(part["image_url"]["url"].partition(",")[2])).hexdigest()
