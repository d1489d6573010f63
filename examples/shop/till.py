"""The shop at a till that has a calculator of its own: the tool runs at the client, not at the server.

    nightschool serve --app examples.shop.till:app --model examples/shop/model
    python -m examples.shop.till "What do 3 of the plain mug cost Emma?"

`app` is the shop without its calculator, whose place among the tools stays, so that the prompts are those that the
model was trained on. `main` is the till: a small client that brings the calculator.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from nightschool import Client, NightschoolError, ToolCalled, ToolReturned

from examples.shop import app as shop
from examples.shop.calculator import calculate

app = replace(shop.app, tools=[tool for tool in shop.app.tools if tool.spec.name != "calculator"])


def calculator(expression: str) -> int | float:
    """Work out a sum.

    Args:
        expression: Numbers with + - * / and brackets.
    """
    return calculate(expression)


def serve_customer(client: Client, question: str) -> str:
    """The answer to a customer; the till's paper shows who calculated and looked up what."""
    task = client.run_task(question, tools=[calculator], temperature=0.0)
    for event in task:
        if isinstance(event, ToolCalled):
            where = "till" if event.call.name == "calculator" else "server"
            print(f"{where}: {event.call.name} {event.call.arguments}")
        elif isinstance(event, ToolReturned):
            print(f"  {event.result.content}")
    return task.result().answer


def main(arguments: Sequence[str]) -> int:
    """Answer the question on the command line."""
    if len(arguments) != 1:
        print('usage: python -m examples.shop.till "What do 3 of the plain mug cost Emma?"', file=sys.stderr)
        return 2
    try:
        with Client() as client:
            print(serve_customer(client, arguments[0]))
    except NightschoolError as error:
        print(f"till: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
