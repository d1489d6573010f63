"""The way of writing tasks with a file plan: the writer plans, each file is retrieved or made, or the draft is dropped.

Owns what a plan comes to. The plan's form is `plan.py`'s, finding `shelf.py`'s, making `maker.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nightschool_server.chat import File, Message, ToolSpec
from nightschool_server.config.files import FilesConfig
from nightschool_server.errors import ContextOverflowError

from nightschool_learner.errors import EndpointError
from nightschool_learner.seed_records import KEPT, Seed
from nightschool_learner.synthesis.drafts import Belongings, Draft, Place, Screen, views_of
from nightschool_learner.synthesis.maker import ROLE, FileMaker
from nightschool_learner.synthesis.plan import PlanError, PlannedFile, PlannedTask, parse_plan, planner_messages
from nightschool_learner.synthesis.records import FileOrigin
from nightschool_learner.synthesis.shelf import Shelf

NO_MATCH, UNMADE = "no_match", "unmade"
"""Why a draft is dropped: nothing like a planned file was found; no program made it."""


@dataclass(frozen=True)
class PlannedDrafter:
    """The writer plans the files of its task."""

    tools: tuple[ToolSpec, ...]
    config: FilesConfig
    screen: Screen
    shelf: Shelf
    maker: FileMaker

    def messages(self, examples: Sequence[Seed]) -> tuple[Message, ...]:
        shown = views_of(examples)
        return planner_messages(self.tools, shown, max_files=self.config.max_files, found=self.shelf.types)

    async def draft(self, text: str, examples: Sequence[Seed], place: Place) -> Draft:
        try:
            planned = parse_plan(text, self.config.max_files)
        except PlanError as error:
            return Draft(verdict=error.reason, reason=str(error))
        # Words cost nothing to check, files do.
        if (verdict := self.screen.look_at_words(planned.prompt)) != KEPT:
            return Draft(planned.prompt, verdict=verdict)
        return await self._furnished(planned, place)

    def discard(self, draft: Draft) -> None:
        for origin in draft.brings.origins:
            if origin.source == "retrieved":
                self.shelf.give_back(origin.sha256)

    async def _furnished(self, planned: PlannedTask, place: Place) -> Draft:
        """The draft with its files, as far as they came."""
        basket = _Basket()
        for position, one in enumerate(planned.files):
            if one.source == "retrieve":
                try:
                    fault, verdict = await self._retrieve(one, basket), NO_MATCH
                except (EndpointError, ContextOverflowError) as error:
                    fault, verdict = str(error), "unavailable"
            else:
                fault, verdict = await self._make(planned.prompt, one, place, position, basket), UNMADE
            if fault:
                return Draft(planned.prompt, basket.whole, verdict, fault, basket.tokens)
        return Draft(planned.prompt, basket.whole, tokens=basket.tokens)

    async def _retrieve(self, planned: PlannedFile, basket: _Basket) -> str:
        found = await self.shelf.find(planned, {origin.sha256 for origin in basket.origins})
        if found is None:
            return f"nothing like {planned.name!r} was found: {planned.description}"
        document = found.document
        file = File(planned.name, document.media_type, document.size_bytes, document.sha256)
        basket.put(planned, file, FileOrigin(
            planned.name, planned.type, planned.description, "retrieved", document.sha256,
            similarity=round(found.similarity, 4), response_id=document.response_id,
        ))  # fmt: skip
        return ""

    async def _make(self, task: str, planned: PlannedFile, place: Place, position: int, basket: _Basket) -> str:
        made = await self.maker.make(task, planned, place, position)
        basket.tokens[ROLE] = basket.tokens.get(ROLE, 0) + made.num_tokens
        if made.file is None:
            return f"{planned.name!r} was not made in {made.num_attempts} attempts, the last: {made.fault}"
        basket.put(planned, made.file, FileOrigin(
            planned.name, planned.type, planned.description, "made", made.file.sha256,
            num_attempts=made.num_attempts, code=made.code,
        ))  # fmt: skip
        return ""


@dataclass
class _Basket:
    """What a task has so far."""

    images: list[str] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    origins: list[FileOrigin] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> Belongings:
        return Belongings(tuple(self.images), tuple(self.files), tuple(self.origins))

    def put(self, planned: PlannedFile, file: File, origin: FileOrigin) -> None:
        """Have a file, as a picture or in the workspace."""
        if planned.is_shown:
            self.images.append(file.sha256)
        else:
            self.files.append(file)
        self.origins.append(origin)
