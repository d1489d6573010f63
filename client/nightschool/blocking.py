"""Runs coroutines that never suspend: how `Client` shares every line of `AsyncClient`.

Over the blocking transport an `await` returns only when its result is there, so a coroutine runs to its end in one
`send`, on the caller's thread, with no event loop. `blocking` and `blocking_iterator` make a plain method of an async
one; types, docstring and signature stay those of the original.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


def run(awaitable: Awaitable[T]) -> T:
    """The result of an awaitable that never suspends."""
    steps = awaitable.__await__()
    try:
        next(steps)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError(f"{awaitable!r} suspended: it awaited something beside the blocking transport")


def iterate(source: AsyncGenerator[T, None]) -> Iterator[T]:
    """The items of an async generator that never suspends; leaving the loop closes it."""
    try:
        while True:
            try:
                item = run(source.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        run(source.aclose())


def blocking(method: Callable[Concatenate[Any, P], Awaitable[T]]) -> Callable[Concatenate[Any, P], T]:
    """The blocking form of an async method, for an object whose `_inner` has it."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run(method(self._inner, *args, **kwargs))

    return call


def blocking_iterator(
    method: Callable[Concatenate[Any, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate[Any, P], Iterator[T]]:
    """The blocking form of an async generator method, for an object whose `_inner` has it."""

    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return iterate(method(self._inner, *args, **kwargs))

    return call
