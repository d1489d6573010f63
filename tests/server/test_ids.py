"""Identifiers: whoever sorts them has them in the order in which they were made."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from nightschool_server.ids import new_id


def test_identifiers_sort_by_age_within_a_millisecond_too() -> None:
    made = [new_id("task") for _ in range(5000)]
    assert made == sorted(set(made))
    assert {len(one) for one in made} == {len("task_") + 24}


def test_threads_never_make_the_same_one() -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: [new_id("task") for _ in range(1000)], range(8)))
    assert all(some == sorted(some) for some in made)
    assert len({one for some in made for one in some}) == 8000
