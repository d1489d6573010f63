"""What code that a model wrote may use up: the `[agent.code]` table of the configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MIB = 1024 * 1024
Positive = Annotated[int, Field(ge=1)]


class CodeConfig(BaseModel):
    """Limits of one step of code, each of one process."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    timeout_s: Annotated[float, Field(gt=0, le=3600)] = 20.0
    """Wall time of a step without that of the tools which it calls, seconds; then it is killed."""
    cpu_s: Positive = 10
    """CPU time of a step, seconds."""
    memory_bytes: Annotated[int, Field(ge=128 * MIB)] = 1024 * MIB
    """Address space of a step, bytes."""
    disk_bytes: Annotated[int, Field(ge=1 * MIB)] = 256 * MIB
    """What a task's workspace and a step's temporary files may hold, bytes; one file a quarter of it."""
    max_files: Annotated[int, Field(ge=16)] = 10_000
    """Files and folders in them."""
    variables_bytes: Annotated[int, Field(ge=1024, le=64 * MIB)] = 4 * MIB
    """What variables that are kept for the next step may hold, pickled, bytes."""
    num_processes: Positive = 4
    """Steps of code that run at once; further ones wait."""
