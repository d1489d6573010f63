"""The application's scorer as a component of the critic: it runs in a tool worker, as all of the application's code.

Owns what a scorer is given and the worker that runs it. A scorer that fails has no opinion.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nightschool_server.agent.formats import ActionFormat, action_format
from nightschool_server.scorer import SCORER_TOOL
from nightschool_server.tools.state import ToolState
from nightschool_server.tools.workers import ToolWorkers

from nightschool_learner.errors import StageFailedError
from nightschool_learner.panel import Case, Score
from nightschool_learner.prompts import write_turn
from nightschool_learner.stages import Cycle

logger = logging.getLogger(__name__)


@asynccontextmanager
async def open_scorer(cycle: Cycle) -> AsyncIterator[Score]:
    """The application's scorer, for as long as the block runs. Raises StageFailedError where it has none."""
    if cycle.app.scorer.function is None:
        raise StageFailedError(
            f"learner.critic names 'scorer', but app {cycle.app.name!r} has none: "
            "put @app.scorer above a function, or leave 'scorer' out"
        )
    form = action_format(cycle.agent)
    with tempfile.TemporaryDirectory(prefix="scorer-", dir=cycle.folder) as folder:
        async with await ToolWorkers.start(cycle.app_ref, 1) as workers:

            async def score(case: Case, position: int) -> float | None:
                state = ToolState.initial(cycle.app, Path(folder))
                outcome = await workers.run(SCORER_TOOL, arguments(case, position, form), state)
                if outcome.is_error:
                    logger.warning("event=scorer_failed error=%s", outcome.content)
                    return None
                found: float | None = json.loads(outcome.content)["score"]
                return found

            yield score


def arguments(case: Case, position: int, form: ActionFormat) -> dict[str, object]:
    """What the scorer is told of a candidate."""
    view = case.views[position]
    parsed = form.parse(view.action)
    is_answer = parsed.error is None and not parsed.calls
    return {
        "task": case.context.task,
        "turns": [[turn.role, write_turn(turn).removeprefix(f"{turn.role}: ")] for turn in case.context.history],
        "action": view.action,
        "observation": view.observation,
        "answer": parsed.text if is_answer else None,
    }
