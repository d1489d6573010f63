"""Arithmetic on a line of text: + - * / and brackets over numbers, by recursive descent, never `eval`."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LENGTH = 200
"""Characters of an expression."""

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|[-+*/()])")


def calculate(expression: str) -> int | float:
    """The value of `expression`, an int where it is whole.

    Raises ValueError for anything that is not arithmetic, and for a division by zero.
    """
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"the expression has {len(expression)} characters; at most {MAX_LENGTH} are read")
    reader = _Reader(_split(expression))
    value = reader.sum()
    if reader.position != len(reader.tokens):
        raise ValueError(f"cannot read {reader.tokens[reader.position]!r} in {expression!r}")
    return int(value) if value == int(value) else round(value, 6)


def _split(expression: str) -> tuple[str, ...]:
    tokens, position, text = [], 0, expression.strip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ValueError(f"cannot read {text[position:]!r} in {expression!r}")
        tokens.append(match[1])
        position = match.end()
    return tuple(tokens)


@dataclass
class _Reader:
    tokens: tuple[str, ...]
    position: int = 0

    def sum(self) -> float:
        value = self.product()
        while (operator := self.take("+", "-")) is not None:
            value = value + self.product() if operator == "+" else value - self.product()
        return value

    def product(self) -> float:
        value = self.factor()
        while (operator := self.take("*", "/")) is not None:
            factor = self.factor()
            if operator == "/" and factor == 0:
                raise ValueError("division by zero")
            value = value * factor if operator == "*" else value / factor
        return value

    def factor(self) -> float:
        if self.take("-") is not None:
            return -self.factor()
        if self.take("(") is not None:
            value = self.sum()
            if self.take(")") is None:
                raise ValueError("a bracket is not closed")
            return value
        if self.position == len(self.tokens) or not self.tokens[self.position][0].isdigit():
            raise ValueError("a number is missing")
        self.position += 1
        return float(self.tokens[self.position - 1])

    def take(self, *wanted: str) -> str | None:
        if self.position < len(self.tokens) and self.tokens[self.position] in wanted:
            self.position += 1
            return self.tokens[self.position - 1]
        return None
