"""Statuses become exceptions: every code, every detail, and the server's own table the other way round."""

from __future__ import annotations

from typing import Any

import grpc
import nightschool
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from nightschool import NO_RETRIES, AsyncClient, Client, NightschoolError, errors
from nightschool.errors import BY_REASON, TABLE
from nightschool.status import Origin, details_of, error_of
from nightschool_server import errors as server_errors
from nightschool_server.service import status as server_status

from tests.client.fake_server import FakeServer, failing, retry_info

ORIGIN = Origin("127.0.0.1:1", "Generate", 2.5)


class FailedCall(grpc.RpcError):
    """What gRPC raises, made by hand."""

    def __init__(self, code: grpc.StatusCode, details: str = "", metadata: Any = ()) -> None:
        self._parts = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._parts[0]

    def details(self) -> str:
        return self._parts[1]

    def trailing_metadata(self) -> Any:
        return self._parts[2]


def test_the_table_knows_every_code_but_ok() -> None:
    assert set(TABLE) == set(grpc.StatusCode) - {grpc.StatusCode.OK}


@pytest.mark.parametrize("code", sorted(TABLE, key=str))
def test_every_code_becomes_its_exception(code: grpc.StatusCode) -> None:
    error = error_of(FailedCall(code, "why"), ORIGIN)
    assert type(error) is TABLE[code]
    assert error.code is code
    assert str(error) == error.message != ""


@pytest.mark.parametrize("code", sorted(TABLE, key=str))
def test_every_code_of_the_server_arrives_typed(code: grpc.StatusCode, client: Client, server: FakeServer) -> None:
    server.script["Generate"].extend([failing(code, "scripted words")] * 4)
    with pytest.raises(TABLE[code], match="scripted words") as caught:
        client.generate("hello")
    assert (caught.value.code, caught.value.reason) == (code, code.name)


@pytest.mark.parametrize("cls", sorted(server_status.TABLE, key=str))
def test_every_error_of_the_server_is_read_back(cls: type[server_errors.NightschoolError]) -> None:
    row = server_status.TABLE[cls]
    metadata = rpc_status.to_status(server_status.status_of(_make(cls))).trailing_metadata
    error = error_of(FailedCall(row.code, "why", metadata), ORIGIN)
    assert type(error) is BY_REASON.get(row.reason, TABLE[row.code])
    assert error.reason == row.reason


def _make(cls: type[server_errors.NightschoolError]) -> server_errors.NightschoolError:
    if issubclass(cls, server_errors.InvalidRequestError):
        return cls("sampling.n", "sampling.n is 0")
    if cls is server_errors.NotFoundError:
        return cls("task", "t1", "no such task")
    return cls("x")


def test_details_name_field_resource_and_delay(client: Client, server: FakeServer) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.n", description="must be at least 1")
    bad = error_details_pb2.BadRequest(field_violations=[violation])
    overflow = failing(grpc.StatusCode.INVALID_ARGUMENT, "too long", bad, reason="CONTEXT_OVERFLOW")
    resource = error_details_pb2.ResourceInfo(resource_type="adapter", resource_name="9-x")
    busy = failing(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", retry_info(999), reason="OVERLOADED")
    server.script["Generate"].extend([overflow, failing(grpc.StatusCode.NOT_FOUND, "no", resource), busy])
    with pytest.raises(nightschool.ContextOverflowError) as invalid:
        client.generate("hello")
    assert (invalid.value.field, invalid.value.reason) == ("sampling.n", "CONTEXT_OVERFLOW")
    with pytest.raises(nightschool.NotFoundError) as missing:
        client.generate("hello")
    assert missing.value.resource == nightschool.Resource("adapter", "9-x")
    with pytest.raises(nightschool.OverloadedError) as full:
        client.generate("hello")
    assert full.value.retry_after_s == 999


async def test_both_clients_raise_the_same(client: Client, aclient: AsyncClient, server: FakeServer) -> None:
    server.script["Generate"].extend([failing(grpc.StatusCode.NOT_FOUND, "no such adapter", retry_info(2))] * 2)
    with pytest.raises(nightschool.NotFoundError) as blocking:
        client.generate("hello")
    with pytest.raises(nightschool.NotFoundError) as awaited:
        await aclient.generate("hello")
    assert vars(blocking.value) == vars(awaited.value)


def test_foreign_and_broken_details_are_not_ours() -> None:
    assert details_of([("grpc-status-details-bin", b"\xff\xff")]).reason is None
    assert details_of([("other", "x")]).field is None


def test_no_server_is_said_with_the_remedy() -> None:
    with Client("127.0.0.1:1", token="t", retry=NO_RETRIES) as client, pytest.raises(errors.UnavailableError) as caught:
        client.generate("hello")
    assert "127.0.0.1:1" in str(caught.value)
    assert "nightschool serve" in str(caught.value)


def test_a_message_over_the_limit_is_refused_with_both_sizes(client: Client) -> None:
    with pytest.raises(errors.MessageTooLargeError, match=r"has \d+ bytes, at most 67108864"):
        client.generate("look", images=[bytes(65 * 2**20)])


def test_a_method_that_the_server_lacks_is_said_with_the_remedy() -> None:
    error = error_of(FailedCall(grpc.StatusCode.UNIMPLEMENTED, "Method not found!"), ORIGIN)
    assert "does not know Generate" in str(error)


def test_every_error_is_exported() -> None:
    names = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert names <= set(nightschool.__all__)
    assert all(issubclass(getattr(nightschool, name), NightschoolError) for name in names)
