"""The table of errors and statuses, and the way there and back over a real call."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from topk_grpc import errors
from topk_grpc.rpc import status


def all_errors(root: type[errors.TopKError] = errors.TopKError) -> Iterator[type[errors.TopKError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from all_errors(child)


ERRORS = sorted(set(all_errors()), key=str)


def make(error_class: type[errors.TopKError], message: str = "what, where, what to do") -> errors.TopKError:
    if error_class is errors.CorruptError:
        return errors.CorruptError(message, "/data/log/0", 17)
    return error_class(message)


def over_the_wire(error: BaseException) -> grpc.aio.AioRpcError:
    """What a client of grpc.aio would get; the tests of servers do it with a real one."""
    sent = status.status_of(error).to_grpc()
    trailers = grpc.aio.Metadata(*((key, value) for key, value in sent.trailing_metadata or ()))
    return grpc.aio.AioRpcError(sent.code, grpc.aio.Metadata(), trailers, sent.details)


@pytest.mark.parametrize("error_class", ERRORS)
def test_every_error_has_a_row_of_its_own(error_class: type[errors.TopKError]) -> None:
    assert error_class in status.TABLE


def test_reasons_are_words_for_programs_and_name_one_class_each() -> None:
    reasons = [row.reason for row in status.TABLE.values()]
    assert len(set(reasons)) == len(reasons)
    for reason in reasons:
        assert reason.replace("_", "").isalpha()
        assert reason == reason.upper()


@pytest.mark.parametrize("error_class", ERRORS)
def test_the_client_raises_the_class_that_the_server_raised(error_class: type[errors.TopKError]) -> None:
    back = status.from_rpc_error(over_the_wire(make(error_class)))
    assert type(back) is error_class
    assert str(back) == "what, where, what to do" or error_class is errors.TopKError


def test_corruption_keeps_file_and_offset() -> None:
    back = status.from_rpc_error(over_the_wire(errors.CorruptError("damaged", "/data/log/0", 17)))
    assert isinstance(back, errors.CorruptError)
    assert (back.path, back.offset) == ("/data/log/0", 17)


def test_subclasses_of_elsewhere_take_the_row_of_the_nearest_base() -> None:
    class LateError(errors.NotReadyError):
        pass

    assert status.status_of(LateError("x")).reason == "NOT_READY"


def test_diskfull_is_what_it_says_first() -> None:
    found = status.status_of(errors.DiskFullError("full"))
    assert (found.code, found.reason, found.retry_after_ms) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL", 5000)


def wrapped(inner: BaseException, outer: Exception) -> BaseException:
    try:
        raise outer from inner
    except Exception as error:
        return error


def test_wrapped_causes_are_looked_through() -> None:
    once = wrapped(errors.DiskFullError("disk"), ValueError("outer"))
    assert status.status_of(wrapped(once, errors.TopKError("root"))).reason == "DISK_FULL"
    assert (
        status.status_of(wrapped(errors.DiskFullError("disk"), errors.WindowError("nearer"))).reason == "INVALID_WINDOW"
    )


def test_groups_are_looked_through() -> None:
    group = ExceptionGroup("tasks", [ValueError("x"), ExceptionGroup("inner", [errors.NotReadyError("recovering")])])
    assert status.status_of(group).message == "recovering"


def test_a_circle_of_causes_ends() -> None:
    first, second = ValueError("1"), ValueError("2")
    first.__cause__, second.__cause__ = second, first
    assert status.status_of(first).code is grpc.StatusCode.INTERNAL


def test_unknown_errors_do_not_tell_their_words() -> None:
    found = status.status_of(ValueError("secret"), "4711")
    assert found.code is grpc.StatusCode.INTERNAL
    assert "secret" not in found.message
    assert "4711" in found.message


def test_a_failed_call_keeps_its_meaning_one_server_further() -> None:
    assert status.status_of(over_the_wire(errors.NotReadyError("recovering"))).reason == "NOT_READY"


@given(st.text(max_size=3000))
def test_any_message_fits_the_trailers(message: str) -> None:
    sent = status.status_of(errors.InvalidArgumentError(message or "x")).to_grpc()
    packed = (sent.trailing_metadata or ())[0][1]
    assert len(packed) < 2048
    assert len(sent.details.encode()) <= 1003


def foreign(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "somebody else's words")


@pytest.mark.parametrize(
    ("code", "error_class", "retriable"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.UnavailableError, True),
        (grpc.StatusCode.UNKNOWN, errors.UnavailableError, True),
        (grpc.StatusCode.CANCELLED, errors.UnavailableError, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineError, True),
        (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            errors.ResourceExhaustedError,
            False,
        ),  # a message that is too large stays so
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidArgumentError, False),
        (grpc.StatusCode.UNIMPLEMENTED, errors.TopKError, False),
    ],
)
def test_statuses_of_strangers_go_by_their_code(
    code: grpc.StatusCode, error_class: type[errors.TopKError], retriable: bool
) -> None:
    back = status.from_rpc_error(foreign(code))
    assert type(back) is error_class
    assert code.name in str(back)
    assert status.is_retriable(foreign(code)) is retriable


def test_retry_is_said_by_the_server() -> None:
    assert status.is_retriable(over_the_wire(errors.ResourceExhaustedError("queue")))
    assert status.retry_after_ms(over_the_wire(errors.ResourceExhaustedError("queue"))) == 1000
    assert not status.is_retriable(over_the_wire(errors.ProducerExpiredError("gone")))
    assert status.retry_after_ms(over_the_wire(errors.ProducerExpiredError("gone"))) is None


def test_cancelled_tasks_are_no_errors() -> None:
    assert not status.is_known(asyncio.CancelledError())
