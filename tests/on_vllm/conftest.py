"""What a failed contract with vLLM is reported with: the place in our code that relies on it."""

from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A contract's docstring names that place; it goes into the report whatever its traceback shows."""
    report = yield
    if report.failed and isinstance(item, pytest.Function) and item.path.name.startswith("test_contract"):
        says = f"vLLM changed; look at, below server/nightschool_server/engines:\n{item.function.__doc__}"
        report.sections.append(("relies on it", says))
    return report
