"""Adapters over AdminService on the real model: import, promote, roll back, pin, delete; what is refused, and why."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from nightschool_proto.v1 import admin_pb2, agent_pb2

from tests.harness import SHOP_MODEL, Running, Stubs, ask, failure, server_thread
from tests.server.tiny_models import make_adapter


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters that change the model's answers."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(SHOP_MODEL, root / str(seed), seed) for seed in (1, 2)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose adapters this module changes."""
    with server_thread(tmp_path_factory.mktemp("adapters-home") / "home") as running:
        yield running


@pytest.fixture
async def wire(server: Running) -> Any:
    async with server.stubs() as found:
        yield found


async def imported(wire: Stubs, server: Running, folder: Path) -> str:
    """The name of the adapter in `folder`; the same content is the same adapter."""
    request = admin_pb2.ImportAdapterRequest(path=str(folder), reason="a test")
    return (await wire.admin.ImportAdapter(request, metadata=server.admin)).name


async def promote(wire: Stubs, server: Running, name: str) -> admin_pb2.RouteChange:
    request = admin_pb2.PromoteAdapterRequest(name=name, reason="a test", force=True)
    return await wire.admin.PromoteAdapter(request, metadata=server.admin)


async def test_an_imported_adapter_is_a_candidate_with_its_trail(
    wire: Stubs, server: Running, folders: list[Path]
) -> None:
    name = await imported(wire, server, folders[0])
    adapter = await wire.admin.GetAdapter(admin_pb2.GetAdapterRequest(name=name), metadata=server.admin)
    assert adapter.state == admin_pb2.Adapter.CANDIDATE
    assert (adapter.rank, adapter.parent, adapter.loaded) == (4, "base", True)
    assert [(event.actor, event.action, event.reason) for event in adapter.events] == [("cli", "import", "a test")]


async def test_files_over_the_wire_make_the_same_adapter_as_their_folder(
    wire: Stubs, server: Running, folders: list[Path]
) -> None:
    files = {name: (folders[0] / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    request = admin_pb2.ImportAdapterRequest(files=files)
    assert (await wire.admin.ImportAdapter(request, metadata=server.admin)).name == await imported(
        wire, server, folders[0]
    )


async def test_a_promotion_is_visible_to_the_next_request_and_a_rollback_too(
    wire: Stubs, server: Running, folders: list[Path]
) -> None:
    first, second = [await imported(wire, server, folder) for folder in folders]
    change = await promote(wire, server, first)
    assert change.active_adapter == first
    assert (await wire.agent.Generate(ask("hi"), metadata=server.user)).adapter == first
    await promote(wire, server, second)
    back = await wire.admin.RollbackAdapter(admin_pb2.RollbackAdapterRequest(reason="worse"), metadata=server.admin)
    assert back.active_adapter == first
    assert (await wire.agent.Generate(ask("hi"), metadata=server.user)).adapter == first
    base = admin_pb2.PromoteAdapterRequest(name="base", reason="a test")
    assert (await wire.admin.PromoteAdapter(base, metadata=server.admin)).active_adapter == "base"
    adapters = (await wire.admin.ListAdapters(admin_pb2.ListAdaptersRequest(), metadata=server.admin)).adapters
    assert [adapter.name for adapter in adapters] == [second, first]
    models = (await wire.agent.ListModels(agent_pb2.ListModelsRequest(), metadata=server.user)).models
    assert [model.name for model in models] == ["base", second, first]


async def test_the_status_says_which_engine_runs_and_which_adapter_it_has_merged(
    wire: Stubs, server: Running, folders: list[Path]
) -> None:
    name = await imported(wire, server, folders[0])
    for wanted in (name, "base"):
        await promote(wire, server, wanted)
        async with asyncio.timeout(60):
            while True:
                status = await wire.admin.GetStatus(admin_pb2.GetStatusRequest(), metadata=server.admin)
                assert (status.engine, status.active_adapter) == ("transformers", wanted)
                # The lane follows in the background.
                if status.engine_status.merged_adapter == wanted:
                    break


async def test_a_promotion_without_a_passed_gate_is_refused_unless_forced(
    wire: Stubs, server: Running, folders: list[Path], tmp_path: Path
) -> None:
    name = await imported(wire, server, make_adapter(SHOP_MODEL, tmp_path / "never", 3))
    request = admin_pb2.PromoteAdapterRequest(name=name, reason="it looks fine")
    found = await failure(wire.admin.PromoteAdapter(request, metadata=server.admin))
    assert found.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "force" in found.message
    rejected = await wire.admin.RejectAdapter(admin_pb2.RejectAdapterRequest(name=name), metadata=server.admin)
    assert rejected.state == admin_pb2.Adapter.REJECTED


async def test_a_request_begun_before_a_promotion_ends_on_its_adapter(
    wire: Stubs, server: Running, folders: list[Path]
) -> None:
    first, second = [await imported(wire, server, folder) for folder in folders]
    await promote(wire, server, first)
    stream = wire.agent.StreamGenerate(ask("hi", max_tokens=150, ignore_eos=True), metadata=server.user)
    started = (await stream.read()).started
    await stream.read()
    await promote(wire, server, second)
    assert (await wire.agent.Generate(ask("hi"), metadata=server.user)).adapter == second
    events = []
    while (event := await stream.read()) is not grpc.aio.EOF:
        events.append(event)
    assert started.adapter == first
    assert events[-1].usage.completion_tokens == 150
    alone = await wire.agent.Generate(ask("hi", max_tokens=150, ignore_eos=True, adapter=first), metadata=server.user)
    assert next(event.finished.text for event in events if event.HasField("finished")) == alone.answers[0].text


async def test_a_session_keeps_its_adapter_across_promotions(wire: Stubs, server: Running, folders: list[Path]) -> None:
    first, second = [await imported(wire, server, folder) for folder in folders]
    await promote(wire, server, first)

    async def adapter_of(session_id: str, who: Any) -> str:
        return (await wire.agent.Generate(ask("hi", session_id=session_id), metadata=who)).adapter

    assert await adapter_of("s1", server.user) == first
    await promote(wire, server, second)
    assert await adapter_of("s1", server.user) == first
    assert await adapter_of("s2", server.user) == second
    assert await adapter_of("s1", server.other_user) == second, "a session is its caller's own"


async def test_an_adapter_in_use_cannot_be_deleted_and_an_idle_one_can(
    wire: Stubs, server: Running, tmp_path: Path
) -> None:
    name = await imported(wire, server, make_adapter(SHOP_MODEL, tmp_path / "short", 4))
    pinned = ask("hi", adapter=name, max_tokens=1500, ignore_eos=True)
    stream = wire.agent.StreamGenerate(pinned, metadata=server.admin)
    await stream.read()
    delete = admin_pb2.DeleteAdapterRequest(name=name)
    found = await failure(wire.admin.DeleteAdapter(delete, metadata=server.admin))
    assert found.code is grpc.StatusCode.FAILED_PRECONDITION
    assert "held" in found.message
    stream.cancel()
    async with asyncio.timeout(120):
        while (await wire.admin.GetAdapter(admin_pb2.GetAdapterRequest(name=name), metadata=server.admin)).num_leases:
            pass
    await wire.admin.DeleteAdapter(delete, metadata=server.admin)
    assert (await failure(wire.admin.DeleteAdapter(delete, metadata=server.admin))).reason == "UNKNOWN_ADAPTER"
    assert (await failure(wire.agent.Generate(pinned, metadata=server.admin))).reason == "UNKNOWN_ADAPTER"


async def test_a_user_may_not_pin_what_has_not_passed_the_gate(wire: Stubs, server: Running, tmp_path: Path) -> None:
    name = await imported(wire, server, make_adapter(SHOP_MODEL, tmp_path / "unproven", 5))
    found = await failure(wire.agent.Generate(ask("hi", adapter=name), metadata=server.user))
    assert found.code is grpc.StatusCode.PERMISSION_DENIED
    assert (await wire.agent.Generate(ask("hi", adapter=name), metadata=server.admin)).adapter == name


async def test_a_promotion_asked_for_twice_happens_once(wire: Stubs, server: Running, folders: list[Path]) -> None:
    first, second = [await imported(wire, server, folder) for folder in folders]
    request = admin_pb2.PromoteAdapterRequest(name=first, reason="a test", force=True, request_id="promote-1")
    change = await wire.admin.PromoteAdapter(request, metadata=server.admin)
    await promote(wire, server, second)
    again = await wire.admin.PromoteAdapter(request, metadata=server.admin)
    assert again == change
    assert (await wire.agent.Generate(ask("hi"), metadata=server.user)).adapter == second
    other = admin_pb2.PromoteAdapterRequest(name=second, request_id="promote-1")
    assert (await failure(wire.admin.PromoteAdapter(other, metadata=server.admin))).reason == "ALREADY_EXISTS"


def garble(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


def truncate(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def use_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"weights": [1.0]}))


def raise_rank(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 4096}))


def lose_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def lose_everything(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "garbled weights": (garble, "adapter_model.safetensors"),
    "truncated weights": (truncate, "adapter_model.safetensors"),
    "a pickle": (use_pickle, "safetensors"),
    "a rank over the limit": (raise_rank, "4096"),
    "no configuration": (lose_config, "adapter_config.json"),
    "no folder": (lose_everything, "folder"),
}


@pytest.mark.parametrize("name", DAMAGES)
async def test_a_damaged_adapter_is_refused_by_name_and_the_server_goes_on(
    name: str, wire: Stubs, server: Running, tmp_path: Path
) -> None:
    damage, says = DAMAGES[name]
    folder = make_adapter(SHOP_MODEL, tmp_path / "damaged", 6)
    damage(folder)
    request = admin_pb2.ImportAdapterRequest(path=str(folder))
    found = await failure(wire.admin.ImportAdapter(request, metadata=server.admin))
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ADAPTER_FORMAT")
    assert says in found.message
    assert (await wire.agent.Generate(ask("hi"), metadata=server.user)).answers


async def test_an_import_names_exactly_one_source_and_an_absolute_path(wire: Stubs, server: Running) -> None:
    for request in (
        admin_pb2.ImportAdapterRequest(),
        admin_pb2.ImportAdapterRequest(path="/a", files={"adapter_config.json": b"{}"}),
        admin_pb2.ImportAdapterRequest(path="relative/folder"),
    ):
        assert (await failure(wire.admin.ImportAdapter(request, metadata=server.admin))).field == "path"


async def test_adapters_are_listed_by_page_and_state(wire: Stubs, server: Running, folders: list[Path]) -> None:
    for folder in folders:
        await imported(wire, server, folder)
    everything = (await wire.admin.ListAdapters(admin_pb2.ListAdaptersRequest(), metadata=server.admin)).adapters
    names, token = [], ""
    while True:
        page = admin_pb2.ListAdaptersRequest(page_size=1, page_token=token)
        reply = await wire.admin.ListAdapters(page, metadata=server.admin)
        names += [adapter.name for adapter in reply.adapters]
        token = reply.next_page_token
        if not token:
            break
    assert names == [adapter.name for adapter in everything]
    first = admin_pb2.ListAdaptersRequest(page_size=1)
    token = (await wire.admin.ListAdapters(first, metadata=server.admin)).next_page_token
    other = admin_pb2.ListAdaptersRequest(page_token=token, state=admin_pb2.Adapter.ACTIVE)
    assert (await failure(wire.admin.ListAdapters(other, metadata=server.admin))).field == "page_token"
