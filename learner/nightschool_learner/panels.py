"""The panel that a cycle's configuration names, with whatever its components need while they work.

Owns the making alone: `learner.critic.kinds` and `learner.critic.vetoes` to components.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from nightschool_server.config.roles import Component as Kind

from nightschool_learner.checklist import open_checklist
from nightschool_learner.feedback import open_feedback
from nightschool_learner.panel import Component, JudgeComponent, Panel, ScoreComponent, consistency
from nightschool_learner.sampling import AnswerSampler
from nightschool_learner.scoring import open_scorer
from nightschool_learner.stages import Cycle


@asynccontextmanager
async def open_panel(cycle: Cycle, sampler: AnswerSampler) -> AsyncIterator[Panel]:
    """The cycle's panel, for as long as the block runs; `sampler` samples the served model.

    Raises StageFailedError where a component cannot be had.
    """
    config = cycle.config.critic
    async with AsyncExitStack() as stack:
        made: dict[Kind, Component] = {}
        for kind in dict.fromkeys((*config.kinds, *config.vetoes)):
            match kind:
                case "judge":
                    made[kind] = JudgeComponent(config.margin_nats)
                case "checklist":
                    held = await stack.enter_async_context(open_checklist(cycle, sampler))
                    made[kind] = ScoreComponent("checklist", config.checklist_margin, held)
                case "scorer":
                    score = await stack.enter_async_context(open_scorer(cycle))
                    made[kind] = ScoreComponent("scorer", config.scorer_margin, score)
                case "feedback":
                    made[kind] = ScoreComponent("feedback", config.feedback_margin, open_feedback(cycle))
                case "consistency":
                    made[kind] = ScoreComponent("consistency", config.consistency_margin_nats, consistency)
        yield Panel([made[kind] for kind in config.kinds if kind in made], [made[kind] for kind in config.vetoes])
