"""Run the application's tools in this process, for demonstrations and probes.

The product runs them in worker processes with timeouts; here only the observation matters.
"""

from __future__ import annotations

from typing import Any

from nightschool_server.chat import ToolSpec, canonical_json

from examples.shop import basket as baskets
from examples.shop.app import app
from examples.shop.calculator import calculate
from examples.shop.catalogue import price_of, stock_of
from examples.shop.catalogue_server import TOOLS as LISTED

SYSTEM_PROMPT = app.system_prompt
_OFFERED = {
    **{spec.name: spec for spec in app.specs},
    **{tool.name: ToolSpec(tool.name, tool.description or "", canonical_json(tool.input_schema)) for tool in LISTED},
}
TOOLS: tuple[ToolSpec, ...] = tuple(_OFFERED[name] for name in app.tool_order)
"""As a server lists them to the model: the functions and the catalogue's."""


def run_tool(name: str, arguments: dict[str, Any], basket: dict[str, int]) -> str:
    """The observation of one call; `basket` is the rollout's state and is changed by `reserve`."""
    try:
        match name:
            case "calculator":
                return str(calculate(arguments["expression"]))
            case "price":
                return str(price_of(arguments["item"]))
            case "stock":
                return str(stock_of(arguments["item"]))
            case "reserve":
                return str(baskets.add(basket, arguments["item"], arguments["quantity"]))
            case "basket_total":
                return str(baskets.total(basket))
            case _:
                return f"error: no tool is called {name!r}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return f"error: {error}"
