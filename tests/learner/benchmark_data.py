"""Small data sets in exactly the formats of GTA and GAIA, and the model that answers them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nightschool_server.agent.toolcalls import write_call
from nightschool_server.engine import GenerateRequest
from PIL import Image

TOOLS = ("OCR", "Calculator", "TextToImage")


def tool(name: str) -> dict[str, Any]:
    """A tool as GTA describes one."""
    text = {"type": "text", "name": None, "description": None, "optional": False, "default": None, "filetype": None}
    return {"name": name, "description": f"{name}.", "inputs": [{**text, "name": "query"}], "outputs": [text]}


def gta_task(query: str, tools: list[str], answer: Any, image: str = "image/image_1.jpg") -> dict[str, Any]:
    """A task of `dataset.json`: a query, one step a tool, an answer."""
    steps: list[dict[str, Any]] = []
    for name in tools:
        call = {"type": "function", "function": {"name": name, "arguments": {"query": "x"}}}
        steps.append({"role": "assistant", "tool_calls": [call], "thought": f"I use {name}."})
        steps.append({"role": "tool", "name": name, "content": {"type": "text", "content": "y"}})
    final = {"role": "assistant", "content": "the answer"}
    return {
        "tools": [tool(name) for name in dict.fromkeys(tools)],
        "files": [{"type": "image", "path": image, "url": None}],
        "dialogs": [{"role": "user", "content": query}, *steps, final],
        "gt_answer": answer,
    }


GTA_TASKS = {
    "0": gta_task("How many mugs?", ["OCR", "Calculator"], {"whitelist": [["12", "twelve"]], "blacklist": None}),
    "1": gta_task("Which city?", ["OCR"], {"whitelist": [["Rome", "Roma"], ["Italy"]], "blacklist": [["Paris"]]}),
    "2": gta_task("What is it like?", ["OCR"], ["A calm sea.", "The sea is calm.", "Calm water."]),
    "3": gta_task("Paint a boat.", ["TextToImage"], None),
    "10": gta_task("How much in all?", ["Calculator"], {"whitelist": [["36"]], "blacklist": [["360"]]}),
}


def write_gta(folder: Path, tasks: Mapping[str, Any] = GTA_TASKS) -> Path:
    """A folder of GTA."""
    (folder / "image").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "image" / "image_1.jpg")
    (folder / "dataset.json").write_text(json.dumps(tasks))
    (folder / "toolmeta.json").write_text(json.dumps({name: tool(name) for name in TOOLS}))
    return folder


def gaia_line(task_id: str, question: str, answer: Any, level: int = 1, file_name: str = "") -> dict[str, Any]:
    """A line of `metadata.jsonl`."""
    return {
        "task_id": task_id,
        "Question": question,
        "Level": level,
        "Final answer": answer,
        "file_name": file_name,
        "Annotator Metadata": {"Steps": "1. Look.", "Number of steps": "1", "Tools": "1. none", "Number of tools": "0"},
    }


GAIA_LINES = [
    gaia_line("a", "How many mugs?", "17"),
    gaia_line("b", "Which fruits?", "apples, pears", level=2),
    gaia_line("c", "What is on the picture?", "A red square", file_name="c.png"),
    gaia_line("d", "Who knows?", "?", level=3),
]


def write_gaia(folder: Path, lines: list[dict[str, Any]] = GAIA_LINES) -> Path:
    """A folder of GAIA."""
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "c.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


SAID = {
    "How many mugs?": [write_call("OCR", {"query": "x"}), write_call("Calculator", {"query": "3*4"}), "There are 12."],
    "Which city?": [write_call("Calculator", {"query": "oops"}), "Romans live there, in Italy."],
    "What is it like?": ["A calm sea."],
    "Paint a boat.": [write_call("TextToImage", {"query": "boat"}), "Here it is."],
    "How much in all?": ["360"],
    "Which fruits?": ["I looked.\nFINAL ANSWER: Apples,Pears"],
    "What is on the picture?": ["FINAL ANSWER: a  red square!"],
    "Who knows?": ["FINAL ANSWER: nobody"],
}
"""What the model says, step by step, to each query."""


def answer(request: GenerateRequest) -> str:
    """The scripted model."""
    messages = request.prompt.messages
    query = next(message.text for message in messages if message.role == "user").split("\n")[0]
    return SAID[query][sum(message.role == "assistant" for message in messages)]
