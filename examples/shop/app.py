"""A shopkeeper's assistant, as a user of nightschool writes it.

`nightschool serve --app examples.shop.app:app --model examples/shop/model` serves it.
"""

from __future__ import annotations

from pathlib import Path

from nightschool_server.app import App, ToolContext, tool

from examples.shop import basket, catalogue
from examples.shop import calculator as arithmetic


@tool(effect="read_only")
def calculator(expression: str) -> int | float:
    """Work out a sum.

    Args:
        expression: Numbers with + - * / and brackets.
    """
    return arithmetic.calculate(expression)


@tool(effect="read_only")
def price(item: str) -> int:
    """The price of one item.

    Args:
        item: The item's name.
    """
    return catalogue.price_of(item)


@tool(effect="read_only")
def stock(item: str) -> int:
    """How many of an item are in stock.

    Args:
        item: The item's name.
    """
    return catalogue.stock_of(item)


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


app = App(
    name="shop",
    system_prompt="You help in a shop. Use the tools; answer with the result alone.",
    tools=[calculator, price, stock, reserve, basket_total],
    evaluation=Path(__file__).with_name("evaluation") / "tasks.jsonl",
)
