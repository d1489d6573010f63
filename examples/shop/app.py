"""A shopkeeper's assistant, as a user of nightschool writes it: its own functions, and a catalogue behind MCP.

`nightschool serve --app examples.shop.app:app --model examples/shop/model` serves it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from nightschool_server.app import App, McpServer, ToolContext, tool

from examples.shop import basket
from examples.shop import calculator as arithmetic


@tool(effect="read_only")
def calculator(expression: str) -> int | float:
    """Work out a sum.

    Args:
        expression: Numbers with + - * / and brackets.
    """
    return arithmetic.calculate(expression)


@tool(effect="workspace")
def reserve(item: str, quantity: int, context: ToolContext) -> int:
    """Put items in the basket.

    Args:
        item: The item's name.
        quantity: How many.
    """
    return basket.add(context.state.setdefault("basket", {}), item, quantity)


@tool(effect="read_only")
def basket_total(context: ToolContext) -> int:
    """The price of all in the basket."""
    return basket.total(context.state.get("basket", {}))


catalogue = McpServer(
    "catalogue",
    command=[sys.executable, "-m", "examples.shop.catalogue_server"],
    cwd=Path(__file__).parents[2],
    prefix="",
)

app = App(
    name="shop",
    system_prompt="You help in a shop. Use the tools; answer with the result alone.",
    tools=[calculator, reserve, basket_total],
    mcp=[catalogue],
    tool_order=["calculator", "price", "stock", "reserve", "basket_total"],
    evaluation=Path(__file__).with_name("evaluation") / "tasks.jsonl",
    gold=Path(__file__).with_name("gold") / "pairs.jsonl",
)
