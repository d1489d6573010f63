"""An application of another kind than the shop: text alone, no critic of its own, one tool that it hardly needs."""

from __future__ import annotations

from pathlib import Path

from nightschool_server.app import App, tool


@tool(effect="read_only")
def look_up(name: str) -> str:
    """Look a name up."""
    return f"{name}: unknown"


app = App(
    name="plain",
    system_prompt="Answer.",
    tools=[look_up],
    evaluation=Path(__file__).with_name("plain_held_out.jsonl"),
    max_steps=1,
)
