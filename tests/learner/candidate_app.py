"""An application whose held-out tasks the tiny model solves in part: sums by tool."""

from __future__ import annotations

from pathlib import Path

from nightschool_server.app import App, tool


@tool(effect="read_only")
def calculator(expression: str) -> int:
    """Work out a sum.

    Args:
        expression: Two numbers and a sign.
    """
    left, sign, right = expression.split()
    return int(left) + int(right) if sign == "+" else int(left) - int(right)


app = App(
    name="candidate",
    system_prompt="You help in a shop. Use the tools; answer with the result alone.",
    tools=[calculator],
    evaluation=Path(__file__).parent / "candidate_held_out.jsonl",
    max_steps=4,
)
