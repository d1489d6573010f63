"""The ten families of the shop's tasks: how each is worded, drawn and answered.

Owns `Task`, the generator of one task of a family, and the split of every family's parameters into
evaluation, traffic and training, which never overlap. How an assistant should act on a task, and how
the practice dummy was taught to act wrongly, is in `demonstrations.py`.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nightschool_server.evaluation_set import EvaluationTask, Match, is_correct

from examples.shop.catalogue import MAX_STOCK, PRODUCTS, price_of, stock_of
from examples.shop.pictures import CELLS, COLOURS, MAX_SHIFT, SHAPES, Shape, draw_shapes, draw_tag

Split = Literal["evaluation", "traffic", "training"]

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Farid", "Grace", "Hugo",
    "Irene", "Jonas", "Kira", "Leo", "Mina", "Noah", "Olga", "Paul",
)  # fmt: skip

WORDINGS: dict[str, tuple[str, ...]] = {
    "sum": (
        "{name} sells {a} things and then {b} more. How many is that?",
        "{name} asks for {a} plus {b}.",
        "Add {a} and {b} for {name}.",
    ),
    "change": (
        "{name} pays {a} for goods worth {b}. How much change is due?",
        "{name} hands over {a} and owes {b}. Work out the change.",
        "What change does {name} get from {a} after spending {b}?",
    ),
    "price": (
        "{name} asks for the price of the {item}.",
        "What does one {item} cost {name}?",
        "How much is the {item} that {name} likes?",
    ),
    "total": (
        "{name} buys {q} of the {item}. What is the total?",
        "What do {q} of the {item} cost {name}?",
        "Work out what {name} pays for {q} of the {item}.",
    ),
    "stock": (
        "How many of the {item} are left for {name}?",
        "{name} asks how many of the {item} are in stock.",
        "Tell {name} the stock of the {item}.",
    ),
    "enough": (
        "{name} wants {q} of the {item}. Is there enough in stock?",
        "Can {name} get {q} of the {item} today?",
        "Is the stock enough for {name} to take {q} of the {item}?",
    ),
    "basket": (
        "Reserve {q} of the {item} for {name}. What does the basket come to?",
        "Put {q} of the {item} in the basket for {name} and tell its total.",
        "{name} reserves {q} of the {item}. Give the total of the basket.",
    ),
    "count": (
        "How many shapes are in the picture of {name}?",
        "{name} asks you to count the shapes.",
        "Count the shapes in the picture for {name}.",
    ),
    "colour": (
        "What colour is the {shape} in the picture of {name}?",
        "{name} asks for the colour of the {shape}.",
        "Tell {name} which colour the {shape} has.",
    ),
    "tag": (
        "{name} takes {q} at the price on the tag. What is the total?",
        "The tag shows the price of one. What do {q} cost {name}?",
        "Read the tag and work out {q} of them for {name}.",
    ),
}
FAMILIES = tuple(WORDINGS)
CLEAR = 12
"""How far stock and demand are apart where the question is whether there is enough."""
PICTURE_FAMILIES = ("count", "colour", "tag")


@dataclass(frozen=True)
class Task:
    """One task, its right answer, and the values it was made from."""

    family: str
    prompt: str
    answer: str
    picture: bytes | None = None
    """PNG."""
    item: str = ""
    first: int = 0
    """The first number to calculate with: of the prompt, or on the price tag."""
    second: int = 0
    quantity: int = 0
    shapes: tuple[Shape, ...] = ()

    @property
    def match(self) -> Match:
        """How an answer is compared."""
        return "text" if self.family in ("enough", "colour") else "number"

    def is_solved_by(self, answer: str) -> bool:
        """Whether `answer` is right by the product's rule."""
        return is_correct(EvaluationTask("", self.family, self.prompt, self.answer, self.match), answer)


def make_task(family: str, split: Split, rng: random.Random) -> Task:
    """A task of `family` whose values belong to `split`."""
    while True:
        task, values = _MAKERS[family](rng)
        if split_of(family, values) == split:
            return task


def split_of(family: str, values: str) -> Split:
    """Where values belong: a tenth to evaluation, two to traffic, the rest to training.

    The values of a picture family are its picture's hash, whichever family shows it.
    """
    domain = "picture" if family in PICTURE_FAMILIES else family
    bucket = hashlib.sha256(f"{domain}|{values}".encode()).digest()[0] % 10
    if bucket == 0:
        return "evaluation"
    return "traffic" if bucket <= 2 else "training"


def word(family: str, rng: random.Random, **slots: object) -> str:
    """A prompt of `family` in one of its wordings, for one of the customers."""
    return rng.choice(WORDINGS[family]).format(name=rng.choice(NAMES), **slots)


def _sum(rng: random.Random) -> tuple[Task, str]:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    return Task("sum", word("sum", rng, a=a, b=b), str(a + b), first=a, second=b), f"{a} {b}"


def _change(rng: random.Random) -> tuple[Task, str]:
    a = rng.randint(20, 99)
    b = rng.randint(10, a - 1)
    return Task("change", word("change", rng, a=a, b=b), str(a - b), first=a, second=b), f"{a} {b}"


def _price(rng: random.Random) -> tuple[Task, str]:
    item = rng.choice(PRODUCTS)
    prompt = word("price", rng, item=item)
    return Task("price", prompt, str(price_of(item)), item=item), prompt


def _stock(rng: random.Random) -> tuple[Task, str]:
    item = rng.choice(PRODUCTS)
    prompt = word("stock", rng, item=item)
    return Task("stock", prompt, str(stock_of(item)), item=item), prompt


def _total(rng: random.Random) -> tuple[Task, str]:
    item, q = rng.choice(PRODUCTS), rng.randint(2, 9)
    task = Task("total", word("total", rng, q=q, item=item), str(q * price_of(item)), item=item, quantity=q)
    return task, f"{item} {q}"


def _basket(rng: random.Random) -> tuple[Task, str]:
    item, q = rng.choice(PRODUCTS), rng.randint(2, 9)
    task = Task("basket", word("basket", rng, q=q, item=item), str(q * price_of(item)), item=item, quantity=q)
    return task, f"{item} {q}"


def _enough(rng: random.Random) -> tuple[Task, str]:
    item = rng.choice(PRODUCTS)
    stock = stock_of(item)
    q = rng.choice([q for q in range(1, MAX_STOCK + 1) if abs(stock - q) >= CLEAR])
    answer = "yes" if stock >= q else "no"
    return Task("enough", word("enough", rng, q=q, item=item), answer, item=item, quantity=q), f"{item} {q}"


def _count(rng: random.Random) -> tuple[Task, str]:
    shapes = _scatter(rng, [rng.choice(SHAPES) for _ in range(rng.randint(1, 6))])
    task = Task("count", word("count", rng), str(len(shapes)), draw_shapes(shapes), shapes=shapes)
    return task, _picture_hash(task)


def _colour(rng: random.Random) -> tuple[Task, str]:
    shapes = _scatter(rng, rng.sample(SHAPES, rng.randint(2, 3)))
    task = colour_task(shapes, rng)
    return task, _picture_hash(task)


def colour_task(shapes: tuple[Shape, ...], rng: random.Random) -> Task:
    """A question for the colour of one of `shapes`, whose kinds differ."""
    shape = rng.choice(shapes)
    return Task("colour", word("colour", rng, shape=shape.kind), shape.colour, draw_shapes(shapes), shapes=shapes)


def _tag(rng: random.Random) -> tuple[Task, str]:
    price, colour = rng.randint(10, 99), rng.choice(list(COLOURS))
    task = tag_task(price, draw_tag(price, colour, _shift(rng)), rng)
    return task, _picture_hash(task)


def _picture_hash(task: Task) -> str:
    assert task.picture is not None
    return hashlib.sha256(task.picture).hexdigest()


def tag_task(price: int, picture: bytes, rng: random.Random) -> Task:
    """A question for the cost of several at the price on the tag."""
    q = rng.randint(2, 9)
    return Task("tag", word("tag", rng, q=q), str(q * price), picture, first=price, quantity=q)


def _scatter(rng: random.Random, kinds: list[str]) -> tuple[Shape, ...]:
    cells = sorted(rng.sample(range(CELLS), len(kinds)))
    return tuple(
        Shape(kind, rng.choice(list(COLOURS)), cell, _shift(rng)) for kind, cell in zip(kinds, cells, strict=True)
    )


def _shift(rng: random.Random) -> tuple[int, int]:
    return rng.randint(-MAX_SHIFT, MAX_SHIFT), rng.randint(-MAX_SHIFT, MAX_SHIFT)


_MAKERS: dict[str, Callable[[random.Random], tuple[Task, str]]] = {
    "sum": _sum,
    "change": _change,
    "price": _price,
    "total": _total,
    "stock": _stock,
    "enough": _enough,
    "basket": _basket,
    "count": _count,
    "colour": _colour,
    "tag": _tag,
}
