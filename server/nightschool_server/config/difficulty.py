"""Settings of what keeps practice at the edge of what the model can do: the probe of written tasks."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class ProbeConfig(BaseModel):
    """A few quick attempts at every written task, to drop those that teach nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    enabled: bool = False
    """Costs `num_samples` whole attempts a task: worth it where a practised task costs several times that."""
    attempt: Literal["episode", "action"] = "episode"
    """Of one sample. `episode`: to the final answer. `action`: the first step alone, not executed; cheap, but what goes
    wrong later is not seen."""
    num_samples: Annotated[int, Field(ge=3, le=64)] = 4
    temperature: Annotated[float, Field(ge=0, le=4)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_solve_rate: Share = 0.0
    """A task that is solved in at most this share of samples is dropped as `never_solved`."""
    max_solve_rate: Share = 1.0
    """A task that is solved in at least this share is dropped as `always_solved`."""
    min_score: float = 0.5
    """An answer to which the application's scorer gives less is not solved."""
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """Sampled by the probes of a cycle; tasks beyond it are kept without one. 0: no limit."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.min_solve_rate >= self.max_solve_rate:
            raise ValueError(
                f"min_solve_rate is {self.min_solve_rate:g} and max_solve_rate {self.max_solve_rate:g}: "
                "no task would be kept; the first must be smaller"
            )
        return self
