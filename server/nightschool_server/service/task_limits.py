"""The limits that a task asks for, within those that the server has.

Owns the fields `max_*` of TaskStart: 0 takes the server's limit, more than that is refused with the setting's name.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nightschool_proto.v1 import agent_pb2

from nightschool_server.agent.episode import Limits
from nightschool_server.agent.limits import episode_limits
from nightschool_server.app import App
from nightschool_server.config.serving import AgentConfig
from nightschool_server.errors import InvalidRequestError


@dataclass(frozen=True)
class AskedLimits:
    """What a task may use up at most; 0 where it does not say."""

    max_steps: int = 0
    max_task_tokens: int = 0
    max_time_s: float = 0.0
    max_tool_s: float = 0.0


NOTHING_ASKED = AskedLimits()


def asked_limits(start: agent_pb2.TaskStart) -> AskedLimits:
    """What `start` asks for. Raises InvalidRequestError."""
    for field in fields(AskedLimits):
        value = getattr(start, field.name)
        if not value >= 0:  # Not a number is none either.
            message = f"{field.name} is {value}, but must be at least 0: 0 takes the server's limit"
            raise InvalidRequestError(field.name, message)
    return AskedLimits(start.max_steps, start.max_task_tokens, start.max_time_s, start.max_tool_s)


def task_limits(asked: AskedLimits, config: AgentConfig, app: App | None, *, max_step_tokens: int) -> Limits:
    """What the task is held to. Raises InvalidRequestError where it asks for more than the server gives."""
    steps = config.max_steps if app is None else app.max_steps
    limits = episode_limits(
        config,
        max_steps=asked.max_steps or steps,
        max_step_tokens=max_step_tokens,
        max_tokens=asked.max_task_tokens or config.max_task_tokens,
        max_time_s=asked.max_time_s or config.max_task_s,
        max_tool_s=asked.max_tool_s or config.max_tool_s,
    )
    _check("max_steps", limits.max_steps, max(steps, config.max_steps), "agent.max_steps")
    _check("max_task_tokens", limits.max_tokens, config.max_task_tokens, "agent.max_task_tokens")
    _check("max_time_s", limits.max_time_s, config.max_task_s, "agent.max_task_s")
    _check("max_tool_s", limits.max_tool_s, config.max_tool_s, "agent.max_tool_s")
    return limits


def _check(field: str, asked: float, most: float, setting: str) -> None:
    if asked > most:
        raise InvalidRequestError(
            f"start.{field}", f"start.{field} is {asked:g}, but at most {most:g} are taken ({setting}): lower it"
        )
