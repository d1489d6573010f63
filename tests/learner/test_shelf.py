"""What can be found for a plan: from whom, by what, how alike it must be, and how often."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nightschool_learner import seed_records
from nightschool_learner.endpoint_records import costs_of
from nightschool_learner.roles import Model
from nightschool_learner.seed_records import Seed
from nightschool_learner.stages import Cycle
from nightschool_learner.synthesis.describing import Describer, Document, documents_of
from nightschool_learner.synthesis.embedders import LexicalEmbedder, open_embedder
from nightschool_learner.synthesis.plan import PlannedFile
from nightschool_learner.synthesis.reading import FileReader
from nightschool_learner.synthesis.records import FileOrigin, insert_origins
from nightschool_learner.synthesis.shelf import Shelf, vectors_of
from nightschool_learner.writer import Writer
from nightschool_server.chat import File
from nightschool_server.config.files import FilesConfig
from nightschool_server.engine import Prompt, Sampling
from nightschool_server.errors import InvalidRequestError
from nightschool_server.store import request_rows
from nightschool_server.store.store import Store

from tests.learner.endpoints import endpoint
from tests.learner.practice_home import FakeSampler, cycle_on, log_request, open_home
from tests.server.files_app import png

CAPTIONS = {
    "mug": "A photo of a red coffee mug on a wooden shelf, price 12",
    "map": "A map of the town with the river and two bridges",
    "bill": "An invoice for three desk lamps, total 90",
}
TABLE = "month,rain in mm\njanuary,80\nfebruary,64\n"


def plan(description: str, type_: str = "picture", name: str = "it") -> PlannedFile:
    return PlannedFile(name, type_, "retrieve", description)


def document(name: str, text: str, type_: str = "picture") -> Document:
    return Document(name.ljust(64, "0"), "", type_, "image/png", 10, f"resp_{name}", text)


async def shelf(documents: Sequence[Document], **settings: float) -> Shelf:
    embedder = LexicalEmbedder.of([one.found_by for one in documents])
    vectors = await embedder.embed([one.found_by for one in documents])
    return Shelf(FilesConfig.model_validate(settings), documents, vectors, embedder)


async def pictures(**settings: float) -> Shelf:
    return await shelf([document(name, text) for name, text in CAPTIONS.items()], **settings)


LIKE = [
    ("a coffee mug with its price", "mug"),
    ("town map showing the bridges over a river", "map"),
    ("an invoice of a lamp shop", "bill"),
    ("horses in a field", None),
    ("", None),
]


@pytest.mark.parametrize(("description", "name"), LIKE)
async def test_what_is_most_like_the_description_is_found_or_nothing(description: str, name: str | None) -> None:
    found = await (await pictures()).find(plan(description))
    assert (found and found.document.response_id) == (name and f"resp_{name}"), found
    assert found is None or found.similarity >= FilesConfig().min_similarity


async def test_the_threshold_is_a_setting_and_another_type_is_never_found() -> None:
    assert await (await pictures(min_similarity=0.99)).find(plan("a coffee mug")) is None
    assert await (await pictures()).find(plan("a coffee mug", "csv", "mug.csv")) is None
    assert await (await shelf([])).find(plan("a coffee mug")) is None


async def test_nothing_is_used_beyond_the_cap_and_a_dropped_task_gives_it_back() -> None:
    near = [
        document("one", CAPTIONS["mug"]),
        document("two", CAPTIONS["mug"] + " and a saucer"),
        document("map", "map"),
    ]
    stocked = await shelf(near, max_reuse=1, top_k=2)
    mug = plan("a red coffee mug on a shelf")
    first, second = await stocked.find(mug), await stocked.find(mug)
    assert [found.document.response_id for found in (first, second) if found] == ["resp_one", "resp_two"]
    assert await stocked.find(mug) is None, "the third is not among the two most alike"
    stocked.give_back(near[1].sha256)
    assert await stocked.find(mug, without={near[1].sha256}) is None
    again = await stocked.find(mug)
    assert again is not None
    assert again.document is near[1]


def test_what_users_sent_can_be_found_but_nothing_held_out(tmp_path: Path) -> None:
    store = open_home(tmp_path / "home")
    cycle = cycle_on(store)
    picture, other = store.put_blob(png(), "image/png"), store.put_blob(b"40\n2\n", "text/plain")
    held_out = tmp_path / "held.txt"
    held_out.write_text("1\n")
    secret = store.put_blob(held_out.read_bytes(), "text/plain")
    (tmp_path / "held.jsonl").write_text(
        '{"id": "a", "family": "f", "prompt": "Add up held.txt", "answer": "1", "files": ["held.txt"]}'
    )
    files = [File(f"{sha[:4]}.txt", "text/plain", 2, sha) for sha in (other, secret, "f" * 64)]
    seeds = [Seed("a", "What?", (picture, picture), ""), Seed("b", "Sum", (picture,), "", tuple(files))]
    cycle = replace(cycle, app=replace(cycle.app, evaluation=tmp_path / "held.jsonl"))
    found = documents_of(cycle, seeds, 10)
    assert [(one.type, one.sha256, one.response_id) for one in found] == [
        ("picture", picture, "a"),
        ("txt", other, "b"),
    ]
    assert len(documents_of(cycle, seeds, 1)) == 1


async def described(cycle: Cycle, documents: Sequence[Document], sampler: FakeSampler) -> list[Document]:
    async with Writer(cycle.store) as writer:
        model = Model(sampler, "base", "served/base", True, True)
        reader = FileReader(None, cycle.folder)
        return await Describer(cycle, model, 32, reader, writer, 4).describe(documents)


async def test_each_picture_is_captioned_once_and_a_text_is_found_by_its_own_words(tmp_path: Path) -> None:
    store = open_home(tmp_path)
    cycle = cycle_on(store)
    picture = document("", "")
    picture = replace(picture, sha256=store.put_blob(png(), "image/png"))
    table = Document(store.put_blob(TABLE.encode(), "text/csv"), "rain.csv", "csv", "text/csv", len(TABLE), "resp_b")
    lost = replace(picture, sha256=store.put_blob(b"no picture", "image/png"))

    def caption(prompt: Prompt, sampling: Sampling, index: int) -> str:
        if prompt.messages[-1].images == (lost.sha256,):
            raise InvalidRequestError("messages", "no picture")
        return "A green\n square"

    sampler = FakeSampler(caption)
    found = await described(cycle, [picture, table, lost], sampler)
    assert [one.found_by for one in found] == ["A green square", f"rain.csv {TABLE.strip()}"]
    assert [prompt.messages[-1].images for prompt, _, _ in sampler.calls] == [(picture.sha256,), (lost.sha256,)]
    assert await described(cycle, [picture, table], sampler) == found
    assert len(sampler.calls) == 2, "asked once for a blob"
    store.connection.execute("DELETE FROM blobs WHERE sha256 = ?", (picture.sha256,))
    assert [row["model"] for row in store.query("SELECT model FROM descriptions")] == ["text"], "it goes with its blob"


async def test_vectors_of_an_endpoint_are_kept_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_KEY", "secret")
    store = open_home(tmp_path)
    documents = [
        replace(document(name, text), sha256=store.put_blob(name.encode(), "image/png"))
        for name, text in CAPTIONS.items()
    ]
    with endpoint(lambda body: "") as local:
        where = f"synthesize.files.embedder.endpoint.base_url={local.url}"
        named = (
            "synthesize.files.embedder.endpoint.model=letters",
            "synthesize.files.embedder.endpoint.key_env=TEST_KEY",
        )
        cycle = cycle_on(store, "synthesize.files.embedder.kind=endpoint", where, *named)
        config = cycle.config.synthesize.files
        async with AsyncExitStack() as stack:
            writer = await stack.enter_async_context(Writer(store))
            embedder = await stack.enter_async_context(open_embedder(cycle, config.embedder, []))
            vectors = await vectors_of(store, writer, embedder, documents)
            np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
            again = await vectors_of(store, writer, embedder, documents[::-1])
            np.testing.assert_array_equal(again, vectors[::-1])
            assert len(local.seen) == 1, "each text is embedded once"
            found = await Shelf(config, documents, vectors, embedder).find(plan("a red coffee mug on a wooden shelf"))
            assert found is not None
            assert found.document is documents[0]
        [cost] = costs_of(store, cycle.id)
        assert (cost.role, cost.num_calls, cost.completion_tokens) == ("embedder", 2, 0)
        assert cost.prompt_tokens > 20


async def test_forgetting_takes_a_task_whose_file_the_caller_had_sent(tmp_path: Path) -> None:
    store: Store = open_home(tmp_path)
    log_request(store, "a", "What is this?")
    cycle = cycle_on(store)
    picture = store.put_blob(png(), "image/png")
    origin = FileOrigin("it", "picture", "a square", "retrieved", picture, 0.5, "resp_a")
    with store.transaction() as db:
        task = seed_records.new_task(0, "Tell me of it", (picture,), "kept")
        seed_records.insert_task(db, cycle.id, task, [], [])
        insert_origins(db, task.id, [origin])
        request_rows.delete_caller(store, db, "tester")
    assert store.query("SELECT * FROM tasks") == store.query("SELECT * FROM task_files") == []
