"""The workshop of a cycle's synthesis: the way of writing tasks, and the verifier, with all that they need.

Owns what is opened, in which order, and how it is closed. Where files are off it is empty: tasks are then written as
the plain writer does, and no sandbox, index or further model is there.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from nightschool_server.errors import ContextOverflowError, FailedPreconditionError
from nightschool_server.sandbox.folder import remove
from nightschool_server.sandbox.proof import open_sandbox
from nightschool_server.sandbox.sandbox import Sandbox

from nightschool_learner.errors import EndpointError, StageFailedError
from nightschool_learner.roles import open_role
from nightschool_learner.sampling import AnswerSampler
from nightschool_learner.seed_records import Seed
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesis import maker, verifier
from nightschool_learner.synthesis.describing import Describer, documents_of
from nightschool_learner.synthesis.drafts import Drafter, PlainDrafter, Screen
from nightschool_learner.synthesis.embedders import open_embedder
from nightschool_learner.synthesis.maker import FileMaker
from nightschool_learner.synthesis.planned import PlannedDrafter
from nightschool_learner.synthesis.reading import FileReader, check_packages
from nightschool_learner.synthesis.records import reuse_of
from nightschool_learner.synthesis.shelf import Shelf, vectors_of
from nightschool_learner.synthesis.verifier import Verifier
from nightschool_learner.writer import Writer

MIN_VARIABLES_BYTES = 1024
"""A program of synthesis is one step: nothing of it is kept for a next one."""


@dataclass(frozen=True)
class Workshop:
    """What drafts are made and looked at with."""

    drafter: Drafter
    verifier: Verifier | None


@dataclass(frozen=True)
class _Opening:
    """What is handed through while the workshop opens."""

    cycle: Cycle
    served: AnswerSampler
    writer: Writer
    stack: AsyncExitStack
    folder: Path


@asynccontextmanager
async def open_workshop(
    cycle: Cycle, served: AnswerSampler, writer: Writer, *, seeds: Sequence[Seed], screen: Screen
) -> AsyncIterator[Workshop]:
    """What `learner.synthesize` asks for, for as long as the block runs; `served` samples the served model.

    Raises StageFailedError where files are on and there is no sandbox, or a package is missing.
    """
    config, folder = cycle.config.synthesize, cycle.folder / "making"
    async with AsyncExitStack() as stack:
        opening = _Opening(cycle, served, writer, stack, folder)
        drafter: Drafter = PlainDrafter(cycle.tools)
        sandbox = None
        if config.files.enabled:
            await asyncio.to_thread(_empty, folder)
            stack.callback(remove, folder)
            sandbox = await stack.enter_async_context(open_maker_sandbox(cycle))
        reader = FileReader(sandbox, folder)
        if sandbox is not None:
            drafter = await _planned(opening, seeds, screen, reader, sandbox)
        looking = None
        if config.verifier.enabled:
            model = await stack.enter_async_context(open_role(cycle, verifier.ROLE, config.verifier, served))
            looking = Verifier(model, config.verifier, cycle.tools, cycle.store, reader)
        yield Workshop(drafter, looking)


@asynccontextmanager
async def open_maker_sandbox(cycle: Cycle) -> AsyncIterator[Sandbox]:
    """Where programs that make and read files run. Raises StageFailedError where it cannot be, with the remedy."""
    check_packages()
    limits = cycle.agent.code.model_copy(update={"variables_bytes": MIN_VARIABLES_BYTES})
    async with AsyncExitStack() as stack:
        try:
            sandbox = await stack.enter_async_context(open_sandbox(limits, unsafe=cycle.agent.unsafe_code))
        except FailedPreconditionError as error:
            raise StageFailedError(f"learner.synthesize.files makes and reads files with code: {error}") from error
        yield sandbox


async def _planned(
    opening: _Opening, seeds: Sequence[Seed], screen: Screen, reader: FileReader, sandbox: Sandbox
) -> PlannedDrafter:
    cycle, stack = opening.cycle, opening.stack
    config = cycle.config.synthesize.files
    shelf = await _shelf(opening, seeds, reader)
    model = await stack.enter_async_context(open_role(cycle, maker.ROLE, config.maker, opening.served))
    making = FileMaker(model, config.maker, sandbox, reader, cycle.store, opening.folder)
    return PlannedDrafter(cycle.tools, config, screen, shelf, making)


async def _shelf(opening: _Opening, seeds: Sequence[Seed], reader: FileReader) -> Shelf:
    """Everything that can be found, described and embedded once."""
    cycle, writer = opening.cycle, opening.writer
    config = cycle.config.synthesize.files
    documents = await asyncio.to_thread(documents_of, cycle, seeds, config.max_blobs)
    async with open_role(cycle, "captioner", config.captioner, opening.served) as captioner:
        describer = Describer(
            cycle, captioner, config.captioner.max_tokens, reader, writer, cycle.config.synthesize.concurrency
        )
        described = await describer.describe(documents)
    texts = [document.found_by for document in described]
    embedder = await opening.stack.enter_async_context(open_embedder(cycle, config.embedder, texts))
    try:
        vectors = await vectors_of(cycle.store, writer, embedder, described)
    except (EndpointError, ContextOverflowError) as error:
        raise StageFailedError(
            f"what can be found has no vectors: {error}: start the cycle again when the embedder answers"
        ) from error
    return Shelf(config, described, vectors, embedder, Counter(reuse_of(cycle.store, cycle.id)))


def _empty(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True, mode=0o700)
