"""The table from exceptions to statuses: total over the tree of errors, small enough for the trailing metadata."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2
from nightschool_server import errors
from nightschool_server.service import status


def error_classes(root: type[errors.NightschoolError] = errors.NightschoolError) -> Iterator[type]:
    for cls in root.__subclasses__():
        if cls.__module__ == errors.__name__:
            yield cls
            yield from error_classes(cls)


def example(cls: type) -> errors.NightschoolError:
    if issubclass(cls, errors.InvalidRequestError):
        return cls("sampling.n", "sampling.n is 0")
    if issubclass(cls, (errors.UnknownAdapterError, errors.UnknownCycleError, errors.UnknownPairError)):
        return cls("missing")
    if issubclass(cls, errors.NotFoundError):
        return cls("response", "missing", "response 'missing' is not known")
    return cls("what went wrong")


def detail(found: object, kind: type) -> object | None:
    for entry in found.details:  # type: ignore[attr-defined]
        message = kind()
        if entry.Unpack(message):
            return message
    return None


@pytest.mark.parametrize("cls", sorted(error_classes(), key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_every_error_class_has_a_row_of_its_own_with_code_reason_and_domain(cls: type) -> None:
    error = example(cls)
    found = status.status_of(error)
    assert cls in status.TABLE
    assert status.code_of(found) is status.TABLE[cls].code
    assert status.reason_of(found) == status.TABLE[cls].reason
    assert found.message == str(error)
    info = detail(found, error_details_pb2.ErrorInfo)
    assert info.domain == "nightschool"


def test_a_class_without_a_row_takes_that_of_its_nearest_base() -> None:
    class TooManyStopsError(errors.InvalidRequestError):
        pass

    assert status.row_of(TooManyStopsError("stop", "nine")) is status.TABLE[errors.InvalidRequestError]
    assert status.row_of(errors.NightschoolError("anything")) is status.INTERNAL


def test_every_code_that_the_server_raises_is_one_of_grpc_and_reasons_are_told_apart() -> None:
    rows = [*status.TABLE.values(), status.STARTING, status.INTERNAL, status.DEADLINE]
    assert len({row.reason for row in rows}) == len(rows)
    raised = {row.code for row in rows}
    grpcs_own = {
        grpc.StatusCode.OK,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.DATA_LOSS,
    }
    assert raised | grpcs_own == set(grpc.StatusCode)
    assert not raised & grpcs_own


def test_a_broken_rule_names_its_field() -> None:
    found = status.status_of(errors.InvalidRequestError("sampling.max_tokens", "sampling.max_tokens is -1"))
    violation = detail(found, error_details_pb2.BadRequest).field_violations[0]
    assert violation.field == "sampling.max_tokens"
    assert violation.description == "sampling.max_tokens is -1"


def test_something_missing_names_its_kind_and_name() -> None:
    info = detail(status.status_of(errors.UnknownAdapterError("12-3fae")), error_details_pb2.ResourceInfo)
    assert (info.resource_type, info.resource_name) == ("adapter", "12-3fae")


def test_overload_says_when_to_try_again() -> None:
    info = detail(status.status_of(errors.OverloadedError("full", retry_after_s=2.5)), error_details_pb2.RetryInfo)
    assert info.retry_delay.ToMilliseconds() == 2500


def test_a_bug_shows_nothing_but_where_to_look() -> None:
    found = status.internal_status("call_1")
    assert found.message == "internal error, see the server's log, id call_1"
    assert status.code_of(found) is grpc.StatusCode.INTERNAL


def test_a_long_message_is_clipped_to_what_trailing_metadata_carries() -> None:
    found = status.status_of(errors.InvalidRequestError("tools[0].parameters_json", "ü" * 50_000))
    assert len(found.SerializeToString()) < 3 * status.MAX_MESSAGE_BYTES
    assert found.message.endswith(" ...")
