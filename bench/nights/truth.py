"""Which actions of practice were right: the shop's own rules, over tasks that the model wrote.

A written task is read back by the wordings of the ten families; what its picture shows is known from the traffic that
it came with. A task in no such wording, or about a picture of another kind, has no known answer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nightschool_server.agent.toolcalls import parse_answer
from nightschool_server.chat import Message, ToolResult, messages_from_json
from nightschool_server.store.store import Store

from examples.shop.catalogue import PRODUCTS, price_of, stock_of
from examples.shop.demonstrations import Step, right_steps
from examples.shop.families import WORDINGS, Task
from examples.shop.traffic import Request

Verdict = Literal["right", "wrong", "both_right", "both_wrong", "unknown"]
"""Of a pair; `right`: the chosen action is right, the rejected one is not."""

Pictures = Mapping[str, Task]
"""What is known of a picture, by its sha256."""

_SLOTS = {"name": "[A-Z][a-z]+", "a": "[0-9]+", "b": "[0-9]+", "q": "[0-9]+", "item": "[a-z]+ [a-z]+"} | {
    "shape": "circle|square|triangle"
}
_PAIRS = (
    "SELECT t.prompt, t.images, s.history, w.text AS chosen, w.observation AS chosen_saw, "
    " l.text AS rejected, l.observation AS rejected_saw "
    "FROM pairs p JOIN steps s ON s.id = p.step_id JOIN rollouts r ON r.id = s.rollout_id "
    "JOIN tasks t ON t.id = r.task_id JOIN candidates w ON w.id = p.chosen JOIN candidates l ON l.id = p.rejected "
    "WHERE p.cycle_id = ? ORDER BY p.id"
)


@dataclass(frozen=True)
class Action:
    """What was done at a step and what came of it."""

    text: str
    observation: str
    """Empty for a final answer."""


def pictures_of(requests: Iterable[Request]) -> Pictures:
    """What the pictures of these requests show."""
    tasks = (request.task for request in requests)
    return {hashlib.sha256(task.picture).hexdigest(): task for task in tasks if task.picture is not None}


def pair_verdicts(store: Store, cycle_id: str, pictures: Pictures) -> dict[Verdict, int]:
    """How many of a cycle's pairs prefer the right action, and how many the wrong one."""
    found: Counter[Verdict] = Counter()
    for row in store.query(_PAIRS, (cycle_id,)):
        task = task_of(row["prompt"], json.loads(row["images"]), pictures)
        before = actions_of(messages_from_json(row["history"]))
        chosen, rejected = (
            None if task is None else is_right(task, before, Action(row[side], row[f"{side}_saw"]))
            for side in ("chosen", "rejected")
        )
        found[_verdict(chosen, rejected)] += 1
    return dict(found)


def accuracy(verdicts: Mapping[Verdict, int]) -> float | None:
    """Of the pairs with one right and one wrong action, the share that chose the right one."""
    right, wrong = verdicts.get("right", 0), verdicts.get("wrong", 0)
    return right / (right + wrong) if right + wrong else None


def task_of(prompt: str, images: Sequence[str], pictures: Pictures) -> Task | None:
    """The task behind a prompt with its right answer; None where it is in no known wording."""
    for family, wordings in _PATTERNS.items():
        for wording in wordings:
            if (found := wording.fullmatch(prompt)) is not None:
                shown = pictures.get(images[0]) if len(images) == 1 else None
                return _made(family, prompt, found.groupdict(), shown)
    return None


def actions_of(history: Sequence[Message]) -> list[Action]:
    """The steps of a conversation, each with what came back."""
    actions: list[Action] = []
    for message in history:
        if message.role == "assistant":
            actions.append(Action(message.text, ""))
        elif message.role == "tool" and actions:
            seen = "\n".join(part.content for part in message.parts if isinstance(part, ToolResult))
            actions[-1] = Action(actions[-1].text, seen)
    return actions


def is_right(task: Task, before: Sequence[Action], action: Action) -> bool | None:
    """Whether `action` is the next step of the one right way; off that way, whether it is the right answer.

    None for a call off the right way: it may lead back.
    """
    right = right_steps(task)
    is_final = not parse_answer(action.text).calls
    if len(before) >= len(right) or not all(map(_same, right, before)):
        return task.is_solved_by(action.text) if is_final else None
    expected = right[len(before)]
    if not expected.observation:
        return is_final and task.is_solved_by(action.text)
    return _same(expected, action)


def _same(expected: Step, action: Action) -> bool:
    """Whether the action calls what was expected; a sum may be written in another way where it comes to the same."""
    [wanted], asked = parse_answer(expected.action).calls, parse_answer(action.text).calls
    if len(asked) != 1 or asked[0].name != wanted.name:
        return False
    if wanted.name == "calculator" and action.observation == expected.observation:
        return True
    return bool(json.loads(asked[0].arguments) == json.loads(wanted.arguments))


def _verdict(chosen: bool | None, rejected: bool | None) -> Verdict:
    if chosen is None or rejected is None:
        return "unknown"
    if chosen == rejected:
        return "both_right" if chosen else "both_wrong"
    return "right" if chosen else "wrong"


def _made(family: str, prompt: str, values: Mapping[str, str], shown: Task | None) -> Task | None:
    if family in ("sum", "change"):
        a, b = int(values["a"]), int(values["b"])
        return Task(family, prompt, str(a + b if family == "sum" else a - b), first=a, second=b)
    if family in ("count", "colour", "tag"):
        return _about_picture(family, prompt, values, shown) if shown is not None else None
    item, quantity = values["item"], int(values.get("q") or 0)
    if item not in PRODUCTS:
        return None
    answers = {
        "price": str(price_of(item)),
        "stock": str(stock_of(item)),
        "enough": "yes" if stock_of(item) >= quantity else "no",
    }
    return Task(family, prompt, answers.get(family, str(quantity * price_of(item))), item=item, quantity=quantity)


def _about_picture(family: str, prompt: str, values: Mapping[str, str], shown: Task) -> Task | None:
    if family == "tag":
        if shown.family != "tag":
            return None
        quantity = int(values.get("q") or 0)
        return Task(family, prompt, str(quantity * shown.first), shown.picture, first=shown.first, quantity=quantity)
    if not shown.shapes:
        return None
    if family == "count":
        return Task(family, prompt, str(len(shown.shapes)), shown.picture, shapes=shown.shapes)
    colours = {shape.colour for shape in shown.shapes if shape.kind == values["shape"]}
    if len(colours) != 1:
        return None
    return Task(family, prompt, colours.pop(), shown.picture, shapes=shown.shapes)


def _pattern(wording: str) -> re.Pattern[str]:
    escaped = re.escape(wording)
    return re.compile(re.sub(r"\\\{(\w+)\\\}", lambda match: f"(?P<{match[1]}>{_SLOTS[match[1]]})", escaped))


_PATTERNS = {family: [_pattern(wording) for wording in wordings] for family, wordings in WORDINGS.items()}
