"""The shop with strict tools."""

from __future__ import annotations

from dataclasses import replace

from examples.shop.app import app as shop

app = replace(
    shop,
    tools=[replace(tool, spec=replace(tool.spec, strict=True)) for tool in shop.tools],
    mcp=[replace(server, strict=True) for server in shop.mcp],
)
