"""Settings of the screen that written tasks, seeds and what callers say pass before anything is learned from them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Similarity = Annotated[float, Field(gt=0, le=1)]


class ScreenConfig(BaseModel):
    """What counts as a held-out task, and what as a task that is there already."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    held_out_files: tuple[str, ...] = ()
    """Files of further held-out tasks, in the format of an evaluation set: of other applications, of benchmarks."""
    earlier_sets: bool = True
    """Refuse tasks of earlier versions of the evaluation set, too, and of every set that this home has met."""
    max_held_out_similarity: Similarity = 0.9
    """A text as similar to a held-out one as this, with the same numbers, is that. 1: only the same words."""
    max_task_similarity: Similarity = 0.9
    """Of a task to one that is there already, with pictures that look the same. 1: only the same words."""
    max_image_distance: Annotated[int, Field(ge=-1, le=64)] = 10
    """Bits of 64 by which the hashes of two pictures of the same thing may differ. -1: only the same bytes."""
