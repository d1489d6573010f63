"""The application without a model: `python -m pytest`."""

from __future__ import annotations

from pathlib import Path

import pytest
from nightschool_server.app import ToolContext, load_app, load_evaluation

from app import price, reserve, simulated_order


def test_a_tool_is_still_a_function() -> None:
    assert price("mug") == 7
    with pytest.raises(ValueError, match="no item is called 'moon'"):
        price("moon")


def test_the_basket_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    context = ToolContext(state={}, workspace=tmp_path)
    assert reserve("mug", 2, context) == 2
    assert reserve("lamp", 1, context) == 3
    assert simulated_order("1 Road", context) == "ordered 3 pieces"


def test_the_application_can_be_served() -> None:
    app = load_app("app:app")
    assert [spec.name for spec in app.specs] == ["price", "reserve", "order"]
    assert {task.family for task in load_evaluation(app).tasks} == {"price", "total"}
