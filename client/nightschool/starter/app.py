"""The application: what the model is told, the tools that it may call, and the tasks that it is measured on.

`nightschool check app:app` says what is wrong with it, `nightschool serve --app app:app --model MODEL` serves it.
Everything here is an example: replace it with what your agent is for.
"""

from __future__ import annotations

import json
from pathlib import Path

from nightschool_server.app import App, ToolContext, tool

# What is expensive to load belongs up here: it is loaded once, and every call of a tool finds it.
PRICES = {"mug": 7, "plain mug": 9, "lamp": 25, "chair": 60}


# A tool is a function. Its name, type hints and docstring are what the model sees of it, so write them for a reader.
# The effect says what a call changes, which decides what may happen in practice, where the model tries each step
# several times:
#
#   read_only   nothing                                   practice calls it as often as it likes
#   workspace   only context.state and the task's files   practice calls it in copies of both
#   external    the world outside (what is not declared)  practice never calls it, only its simulator
@tool(effect="read_only")
def price(item: str) -> int:
    """The price of one item.

    Args:
        item: The item's name.
    """
    if item not in PRICES:
        # The model reads the message and may try again: say what would be right.
        raise ValueError(f"no item is called {item!r}; there are {', '.join(PRICES)}")
    return PRICES[item]


@tool(effect="workspace")
def reserve(item: str, quantity: int, context: ToolContext) -> int:
    """Put items in the basket; gives the number of pieces in it.

    Args:
        item: The item's name.
        quantity: How many.
    """
    # `context` is filled in and hidden from the model. `context.state` lasts as long as the task and holds JSON
    # values; the working directory is the task's own folder.
    basket = context.state.setdefault("basket", {})
    basket[item] = basket.get(item, 0) + quantity
    Path("basket.json").write_text(json.dumps(basket))
    return sum(basket.values())


def simulated_order(address: str, context: ToolContext) -> str:
    """What `order` would answer, without an order: practice calls this instead."""
    return f"ordered {sum(context.state.get('basket', {}).values())} pieces"


@tool(effect="external", simulate=simulated_order, timeout_s=10)
def order(address: str, context: ToolContext) -> str:
    """Order what is in the basket.

    Args:
        address: Where to send it.
    """
    # Here the real shop would be called. Open connections inside the function: every call runs in a process of its own.
    return f"ordered {sum(context.state.get('basket', {}).values())} pieces"


app = App(
    name="starter",
    system_prompt="You help in a shop. Use the tools; answer with the result alone.",
    tools=[price, reserve, order],
    # Tools of MCP servers, programs or URLs, are offered beside these; McpServer is imported where App is:
    # mcp=[McpServer("time", command=["mcp-server-time"])],
    # Tasks with exact answers that no training ever sees. A new adapter must be better on them than the one before
    # it, or it never serves. See evaluation/tasks.jsonl.
    evaluation=Path(__file__).with_name("evaluation") / "tasks.jsonl",
    # What `context.state` holds when a task begins.
    initial_state={"basket": {}},
    # Steps (answers of the model) that a task may take.
    max_steps=6,
)
