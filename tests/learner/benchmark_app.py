"""An application with tools of GTA's names."""

from __future__ import annotations

from nightschool_server.app import App, tool


@tool(effect="read_only")
def OCR(query: str) -> str:
    """Read the text on the picture."""
    return "mugs 3 x 4"


@tool(effect="read_only")
def Calculator(query: str) -> int:
    """Multiply two numbers."""
    left, right = query.split("*")
    return int(left) * int(right)


@tool(effect="read_only")
def TextToImage(query: str) -> str:
    """Paint a picture."""
    return "painted"


app = App(name="benchmark", system_prompt="Help.", tools=[OCR, Calculator, TextToImage])
