"""From the settings of the agent loop to what an episode and a call are held to, alike live and in practice.

Steps, tokens and wall time are each caller's own affair; all else is the same wherever a task runs, so that practice
meets no other world than the one it is for.
"""

from __future__ import annotations

from nightschool_server.agent.episode import Limits
from nightschool_server.config.serving import AgentConfig
from nightschool_server.image_check import DEFAULT_LIMITS, ImageLimits
from nightschool_server.tools.returned import ReturnLimits
from nightschool_server.tools.workers import CallLimits


def episode_limits(
    config: AgentConfig,
    *,
    max_steps: int,
    max_step_tokens: int,
    max_tokens: int,
    max_time_s: float,
    max_tool_s: float | None = None,
) -> Limits:
    """What an episode may use up. None takes the setting."""
    return Limits(
        max_steps=max_steps,
        max_step_tokens=max_step_tokens,
        max_tokens=max_tokens,
        max_time_s=max_time_s,
        max_malformed_steps=config.max_malformed_steps,
        max_calls=config.max_calls,
        max_parallel_calls=config.max_parallel_calls,
        max_tool_s=config.max_tool_s if max_tool_s is None else max_tool_s,
    )


def call_limits(config: AgentConfig, images: ImageLimits = DEFAULT_LIMITS) -> CallLimits:
    """What one call is held to; `images` is what it may give back of them."""
    return CallLimits(
        timeout_s=config.tool_timeout_s,
        max_output_chars=config.max_output_chars,
        max_memory_bytes=config.max_tool_memory_bytes,
        returned=ReturnLimits(images, max_files=config.max_files, max_file_bytes=config.max_file_bytes),
    )
