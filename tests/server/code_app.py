"""An application whose tools code calls."""

from __future__ import annotations

import os
from pathlib import Path

from nightschool_server.app import App, ToolContext, tool

PRICES = {"mug": 7, "lamp": 25}


@tool(effect="read_only")
def price(item: str) -> int:
    """The price of one item.

    Args:
        item: The item's name.
    """
    if item not in PRICES:
        raise ValueError(f"no item is called {item!r}")
    return PRICES[item]


@tool(effect="read_only")
def describe(item: str) -> dict[str, object]:
    """All that is known of an item."""
    return {"name": item, "tags": ["cup", "white"]}


@tool(effect="workspace")
def note(item: str, context: ToolContext, quantity: int = 1) -> list[str]:
    """Put an item on the list; gives the list."""
    context.state.setdefault("list", []).extend([item] * quantity)
    Path("list.txt").write_text("\n".join(context.state["list"]))
    return list(context.state["list"])


@tool(effect="workspace")
def files() -> list[str]:
    """The files of the task."""
    return sorted(os.listdir())


@tool(effect="external")
def send(to: str) -> str:
    """Send a mail."""
    return f"sent to {to}"


def would_order(item: str) -> str:
    return f"would order {item}"


@tool(effect="external", simulate=would_order)
def order(item: str) -> str:
    """Order an item."""
    return f"ordered {item}"


app = App("code", "Help.", [price, describe, note, files, send, order])
