"""A draft: what came of one answer of the writer, and the seam at which a way of writing tasks is chosen.

Owns the plain way, whose task takes pictures and files over from its examples, and the screen that every draft passes.
The way with a file plan is `planned.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from nightschool_server.chat import File, Message, ToolSpec
from nightschool_server.config.practice import SynthesizeConfig

from nightschool_learner.prompts import SeedView, WrittenTask, parse_written_task, writer_messages
from nightschool_learner.screening import HeldOut, Pool, TaskKey, task_key
from nightschool_learner.seed_records import KEPT, Seed, contents_of
from nightschool_learner.synthesis.records import FileOrigin, Verification


@dataclass(frozen=True)
class Belongings:
    """What a written task brings."""

    images: tuple[str, ...] = ()
    files: tuple[File, ...] = ()
    origins: tuple[FileOrigin, ...] = ()
    """How each that was planned came; empty where they are those of the examples."""


@dataclass(frozen=True)
class Place:
    """Which answer of which slot: what every random choice about it derives from."""

    cycle_seed: int
    slot: int
    attempt: int


@dataclass(frozen=True)
class Draft:
    """A task on its way, or the reason why it is none."""

    prompt: str = ""
    brings: Belongings = Belongings()
    verdict: str = KEPT
    """`kept`, or the reason for dropping it."""
    reason: str = ""
    """That in a sentence, where somebody gave one."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """By role, beside the writer's."""
    verification: Verification | None = None

    @property
    def contents(self) -> tuple[str, ...]:
        """sha256 of its pictures and files."""
        return contents_of(self.brings.images, self.brings.files)


class Drafter(Protocol):
    """A way of writing tasks."""

    def messages(self, examples: Sequence[Seed]) -> tuple[Message, ...]:
        """What the writer is asked."""
        ...

    async def draft(self, text: str, examples: Sequence[Seed], place: Place) -> Draft:
        """Read the writer's answer, and see to what the task needs."""
        ...

    def discard(self, draft: Draft) -> None:
        """Let go of what a dropped draft had reserved."""
        ...


@dataclass(frozen=True)
class PlainDrafter:
    """The writer names the example whose pictures the task reuses; files are those of the examples."""

    tools: tuple[ToolSpec, ...]

    def messages(self, examples: Sequence[Seed]) -> tuple[Message, ...]:
        return writer_messages(self.tools, views_of(examples))

    async def draft(self, text: str, examples: Sequence[Seed], place: Place) -> Draft:
        try:
            written = parse_written_task(text, views_of(examples))
        except ValueError as error:
            return Draft(verdict="parse", reason=str(error))
        return Draft(written.prompt, belongings_of(written, examples))

    def discard(self, draft: Draft) -> None:
        """Nothing is reserved."""


def views_of(examples: Sequence[Seed]) -> list[SeedView]:
    """The examples as the writer is shown them: a line for each file in front of the text."""
    return [SeedView("".join(file.line for file in seed.files) + seed.prompt, seed.images) for seed in examples]


def belongings_of(written: WrittenTask, examples: Sequence[Seed]) -> Belongings:
    """The pictures of the example that the writer named, and the files that the task's text names.

    Of two files of one name the first counts. A text that names none, where every example has files, is about those of
    the first one.
    """
    images = () if written.image_of is None else examples[written.image_of].images
    files: dict[str, File] = {}
    for seed in examples:
        for file in seed.files:
            if file.name in written.prompt:
                files.setdefault(file.name, file)
    if not files and examples and all(seed.files for seed in examples):
        files = {file.name: file for file in examples[0].files}
    return Belongings(images, tuple(files.values()))


@dataclass
class Screen:
    """The checks that a written task passes, and the tasks that are there already."""

    config: SynthesizeConfig
    held_out: HeldOut
    known: Pool

    def look_at_words(self, prompt: str) -> str:
        """What can be said before there are files: `kept`, or the reason for dropping it."""
        key = task_key(prompt)
        return self._length(key, prompt) or self._held_out(key) or KEPT

    def look(self, draft: Draft, examples: Sequence[Seed]) -> str:
        """`kept`, or the reason for dropping it."""
        return self._reason(task_key(draft.prompt, draft.contents), draft.prompt, examples)

    def admit(self, draft: Draft, examples: Sequence[Seed]) -> str:
        """The same; a task that is kept is known from now on."""
        key = task_key(draft.prompt, draft.contents)
        reason = self._reason(key, draft.prompt, examples)
        if reason == KEPT:
            self.known.add(key)
        return reason

    def _reason(self, key: TaskKey, prompt: str, examples: Sequence[Seed]) -> str:
        if reason := self._length(key, prompt) or self._held_out(key):
            return reason
        if any(key == task_key(seed.prompt, seed.contents) for seed in examples):
            return "copy"
        return self.known.match(key) or KEPT

    def _length(self, key: TaskKey, prompt: str) -> str:
        fits = self.config.min_words <= len(key.words) and len(prompt) <= self.config.max_chars
        return "" if fits else "length"

    def _held_out(self, key: TaskKey) -> str:
        contaminated = self.held_out.match(key)
        return f"held_out_{contaminated}" if contaminated else ""
