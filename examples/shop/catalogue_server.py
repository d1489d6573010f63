"""The catalogue's own server: prices and stock over MCP, as a shop's stock system would offer them.

    python -m examples.shop.catalogue_server

Speaks MCP on standard input and output; `app.py` names it. It knows nothing of nightschool. The names, texts and
schemas of its tools are part of the prompts that the example's model was trained on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from mcp import MCPError
from mcp.server import Server, ServerRequestContext
from mcp.server.stdio import stdio_server
from mcp_types import (
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    ListToolsResult,
    PaginatedRequestParams,
    TextContent,
    Tool,
    ToolAnnotations,
)

from examples.shop import catalogue

Context = ServerRequestContext[Any]

ITEM = {
    "type": "object",
    "properties": {"item": {"type": "string", "description": "The item's name."}},
    "required": ["item"],
}
LOOKUPS: Mapping[str, Callable[[str], int]] = {"price": catalogue.price_of, "stock": catalogue.stock_of}
READS = ToolAnnotations(read_only_hint=True, open_world_hint=False)
TOOLS = (
    Tool(name="price", description="The price of one item.", input_schema=ITEM, annotations=READS),
    Tool(name="stock", description="How many of an item are in stock.", input_schema=ITEM, annotations=READS),
)


async def list_tools(context: Context, params: PaginatedRequestParams | None) -> ListToolsResult:
    """What the server offers."""
    return ListToolsResult(tools=list(TOOLS))


async def call_tool(context: Context, params: CallToolRequestParams) -> CallToolResult:
    """Look an item up; one that is not sold is an error that the model reads."""
    look_up, item = LOOKUPS.get(params.name), (params.arguments or {}).get("item")
    if look_up is None or not isinstance(item, str):
        raise MCPError(INVALID_PARAMS, f"no tool is called {params.name!r}, or item is not text")
    try:
        value = look_up(item)
    except catalogue.UnknownProductError as error:
        return CallToolResult(content=[TextContent(text=str(error))], is_error=True)
    return CallToolResult(content=[TextContent(text=str(value))], structured_content={"result": value})


async def main() -> None:
    """Serve until standard input closes."""
    server: Server[Any] = Server("shop-catalogue", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


if __name__ == "__main__":
    asyncio.run(main())
