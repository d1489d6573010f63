"""A small application for the learner's tests: a tool of each effect, one that fails, two held-out tasks."""

from __future__ import annotations

import os
from pathlib import Path

from nightschool_server.app import App, ToolContext, tool

PRICES = {"mug": 12, "lamp": 30}
ORDERED = "NIGHTSCHOOL_TEST_ORDERED"
"""Variable of the environment: the file that the tool `order` leaves behind when it runs."""


@tool(effect="read_only")
def price(item: str) -> int:
    """The price of one item."""
    if item not in PRICES:
        raise ValueError(f"no item is called {item!r}")
    return PRICES[item]


@tool(effect="workspace")
def note(text: str, context: ToolContext) -> str:
    """Write a line into the notes and read all of them."""
    notes = context.workspace / "notes.txt"
    with notes.open("a") as file:
        file.write(text + ";")
    context.state["lines"] = context.state.get("lines", 0) + 1
    return f"{context.state['lines']}: {notes.read_text()}"


@tool(effect="external")
def order(item: str) -> str:
    """Order an item from the wholesaler."""
    Path(os.environ[ORDERED]).touch()
    return f"ordered {item}"


@tool(effect="workspace")
def dig() -> str:
    """Nest folders until no path reaches the last one."""
    for _ in range(25):
        Path("d" * 200).mkdir()
        os.chdir("d" * 200)
    return "dug"


def booked(room: str, context: ToolContext) -> str:
    """Books in the task's own state, as the hotel would."""
    context.state["room"] = room
    if room == "attic":
        raise ValueError("there is no attic")
    return f"booked {room}"


@tool(effect="external", simulate=booked)
def book(room: str) -> str:
    """Book a room of the hotel."""
    raise AssertionError("practice and evaluation must never book a room")


app = App(
    name="practice",
    system_prompt="Help.",
    tools=[price, note, order, dig, book],
    evaluation=Path(__file__).parent / "practice_held_out.jsonl",
    max_steps=4,
)
