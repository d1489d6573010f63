"""An application with an opinion of its own: answers in digits are right, other words wrong, tool calls unknown."""

from __future__ import annotations

import os

from nightschool_server.app import App, ScoredStep, tool


@tool(effect="read_only")
def price(item: str) -> int:
    """The price of one item."""
    return 12


app = App(name="scored", system_prompt="Help.", tools=[price])


@app.scorer
async def score(step: ScoredStep) -> float | None:
    """1 for digits, 0 for words, nothing for a call; and what else the tests ask for."""
    assert step.task
    match step.answer:
        case None:
            return None
        case "crash":
            os._exit(1)
        case "not a number":
            return float("nan")
        case "whose process?":
            assert step.turns == (("assistant", "hm"), ("user", "well?")), step.turns
            return float(os.getpid())
    return 1.0 if step.answer.isdigit() else 0.0
