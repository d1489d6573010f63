"""How an assistant acts on the shop's tasks: the right steps, the taught errors, and random slips.

The practice dummy learns its agent role from `demonstrate`, which in four families is systematically
wrong most of the time, and its critic role from the right steps set against errors and slips.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nightschool_server.agent.toolcalls import parse_answer, write_call

from examples.shop.catalogue import PRODUCTS, price_of, stock_of
from examples.shop.families import Task
from examples.shop.toolbox import run_tool

WRONG_SHARES = {"change": 0.7, "total": 0.6, "basket": 0.6, "tag": 0.7}
"""How much of a corrupted family's demonstrations is wrong; less where the error is the shorter way, for the
loss weighs the tokens of short rows more."""
CORRUPTED = {
    "change": "adds where it should subtract",
    "total": "stops after the first look-up",
    "basket": "makes the total up, ten for each piece, and does not ask for it",
    "tag": "adds where it should multiply",
}


@dataclass(frozen=True)
class Step:
    """One step of a demonstration."""

    action: str
    """The assistant's raw text."""
    observation: str = ""
    """Empty for a final answer."""


def call(name: str, observation: object, **arguments: Any) -> Step:
    """A step that calls one tool."""
    return Step(write_call(name, arguments), str(observation))


def right_steps(task: Task) -> tuple[Step, ...]:
    """The one right way through `task`."""
    final = Step(task.answer)
    match task.family:
        case "sum":
            return call("calculator", task.answer, expression=f"{task.first} + {task.second}"), final
        case "change":
            return call("calculator", task.answer, expression=f"{task.first} - {task.second}"), final
        case "price":
            return call("price", task.answer, item=task.item), final
        case "total":
            price = price_of(task.item)
            multiply = call("calculator", task.answer, expression=f"{task.quantity} * {price}")
            return call("price", price, item=task.item), multiply, final
        case "stock":
            return call("stock", task.answer, item=task.item), final
        case "enough":
            return call("stock", stock_of(task.item), item=task.item), final
        case "basket":
            reserved = call("reserve", task.quantity, item=task.item, quantity=task.quantity)
            return reserved, call("basket_total", task.answer), final
        case "tag":
            return call("calculator", task.answer, expression=f"{task.quantity} * {task.first}"), final
        case _:
            return (final,)


def wrong_steps(task: Task) -> tuple[Step, ...]:
    """The taught error of a corrupted family, from the first step on."""
    match task.family:
        case "change":
            total = task.first + task.second
            return call("calculator", total, expression=f"{task.first} + {task.second}"), Step(str(total))
        case "total":
            look_up = right_steps(task)[0]
            return look_up, Step(look_up.observation)
        case "basket":
            return right_steps(task)[0], Step(str(task.quantity * 10))
        case "tag":
            total = task.quantity + task.first
            return call("calculator", total, expression=f"{task.quantity} + {task.first}"), Step(str(total))
        case family:
            raise ValueError(f"family {family!r} has no taught error")


def demonstrate(task: Task, rng: random.Random) -> tuple[Step, ...]:
    """A demonstration as the agent role learns it."""
    if rng.random() < WRONG_SHARES.get(task.family, 0.0):
        return wrong_steps(task)
    return right_steps(task)


def taught_error(task: Task, position: int) -> Step | None:
    """The taught error that competes with the right step at `position`, if there is one."""
    if task.family not in CORRUPTED:
        return None
    right, wrong = right_steps(task), wrong_steps(task)
    if position < len(wrong) and right[:position] == wrong[:position] and right[position] != wrong[position]:
        return wrong[position]
    return None


def slip(task: Task, position: int, rng: random.Random) -> Step:
    """A random error in place of the right step at `position`."""
    right = right_steps(task)[position]
    while (action := rng.choice(_SLIPS)(task, right, rng)) == right.action:
        pass
    asked = parse_answer(action).calls
    if not asked:
        return Step(action)
    basket = {task.item: task.quantity} if task.family == "basket" and position > 0 else {}
    return Step(action, run_tool(asked[0].name, json.loads(asked[0].arguments), basket))


def _made_up(task: Task, right: Step, rng: random.Random) -> str:
    if task.family == "colour":
        return rng.choice(("red", "green", "blue", "yellow", "black"))
    if task.family == "enough":
        return rng.choice(("yes", "no", str(rng.randint(0, 60))))
    if task.family == "count":
        return str(rng.randint(1, 7))
    near = (task.first, task.quantity, rng.randint(1, 99), 10 * task.quantity, right.observation, task.answer)
    return str(rng.choice([value for value in near if value not in (0, "")]))


def _typo(task: Task, right: Step, rng: random.Random) -> str:
    """One digit of the step is another one."""
    places = [place for place, sign in enumerate(right.action) if sign.isdigit()]
    if not places:
        return _made_up(task, right, rng)
    place = rng.choice(places)
    return right.action[:place] + str(rng.randint(1, 9)) + right.action[place + 1 :]


def _other_operator(task: Task, right: Step, rng: random.Random) -> str:
    operators = [operator for operator in (" + ", " - ", " * ", " / ") if operator in right.action]
    if not operators:
        return _made_up(task, right, rng)
    return right.action.replace(operators[0], rng.choice((" + ", " - ", " * ")))


def _other_item(task: Task, right: Step, rng: random.Random) -> str:
    if not task.item or task.item not in right.action:
        return _other_tool(task, right, rng)
    adjective, noun = task.item.split()
    other = rng.choice(PRODUCTS).split()
    item = f"{adjective} {other[1]}" if rng.random() < 0.5 else f"{other[0]} {noun}"
    return right.action.replace(task.item, item)


def _other_tool(task: Task, right: Step, rng: random.Random) -> str:
    item = task.item or rng.choice(PRODUCTS)
    first, second = task.first or rng.randint(2, 9), task.second or task.quantity or rng.randint(2, 9)
    arguments: dict[str, dict[str, Any]] = {
        "price": {"item": item},
        "stock": {"item": item},
        "reserve": {"item": item, "quantity": max(1, task.quantity)},
        "calculator": {"expression": f"{first} {rng.choice('+-*')} {second}"},
        "basket_total": {},
    }
    name = rng.choice([name for name in arguments if f'"{name}"' not in right.action])
    return write_call(name, arguments[name])


def _needless_step(task: Task, right: Step, rng: random.Random) -> str:
    """Goes on calculating, with a number from nowhere, where the answer is known."""
    known = str(stock_of(task.item)) if task.family == "enough" else task.answer
    if right.observation or not known.isdigit():
        return _other_tool(task, right, rng)
    return write_call("calculator", {"expression": f"{rng.randint(2, 9)} {rng.choice('**+-')} {known}"})


_SLIPS: tuple[Callable[[Task, Step, random.Random], str], ...] = (
    _made_up, _typo, _other_operator, _other_item, _other_tool, _needless_step,
)  # fmt: skip
