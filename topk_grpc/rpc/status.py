"""Errors and gRPC statuses, both ways, by one table.

A status carries google.rpc.ErrorInfo (a `reason`, domain `topk`) and, where trying again helps, google.rpc.RetryInfo.
The reason says which class of errors.py it was, so that a client raises the same class again; nobody parses messages.

An error is looked up by its class, then by its base classes. Where that finds nothing or only the root, what lies
beneath is asked: the errors of a group (asyncio.TaskGroup), then the cause that was named with `raise … from`. So a
wrapped error keeps its status.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Never

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from topk_grpc import errors

DOMAIN: Final = "topk"
"""The domain of every ErrorInfo."""

_MESSAGE_BYTES_MAX: Final = 1000  # it travels twice in the trailers, once percent-encoded; 8 KiB is their limit
_DEPTH_MAX: Final = 16  # of causes beneath causes: they can form a circle

Code = grpc.StatusCode


class Row(NamedTuple):
    """What a class of errors becomes.

    Attributes:
        code: the status code.
        reason: ErrorInfo.reason, one class's own.
        retry_after_ms: RetryInfo, milliseconds; None where trying again does not help.
    """

    code: grpc.StatusCode
    reason: str
    retry_after_ms: int | None = None


TABLE: Final[Mapping[type[BaseException], Row]] = {
    errors.TopKError: Row(Code.INTERNAL, "INTERNAL"),
    errors.InvalidArgumentError: Row(Code.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    errors.WindowError: Row(Code.INVALID_ARGUMENT, "INVALID_WINDOW"),
    errors.OutOfRangeError: Row(Code.OUT_OF_RANGE, "OUT_OF_RANGE"),
    errors.SettingError: Row(Code.INVALID_ARGUMENT, "INVALID_SETTING"),
    errors.InputError: Row(Code.INVALID_ARGUMENT, "INVALID_INPUT"),
    errors.UnauthenticatedError: Row(Code.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.TokenMissingError: Row(Code.UNAUTHENTICATED, "TOKEN_MISSING"),
    errors.TokenUnknownError: Row(Code.UNAUTHENTICATED, "TOKEN_UNKNOWN"),
    errors.TokenExpiredError: Row(Code.UNAUTHENTICATED, "TOKEN_EXPIRED"),
    errors.ForeignCallerError: Row(Code.UNAUTHENTICATED, "FOREIGN_CALLER"),
    errors.PermissionDeniedError: Row(Code.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.UnsupportedError: Row(Code.UNIMPLEMENTED, "UNSUPPORTED"),
    errors.DuplicateBatchError: Row(Code.ALREADY_EXISTS, "DUPLICATE_BATCH"),
    errors.ProducerExpiredError: Row(Code.FAILED_PRECONDITION, "PRODUCER_EXPIRED"),
    errors.RejectedPlaysError: Row(Code.INVALID_ARGUMENT, "REJECTED_PLAYS"),
    errors.UnavailableError: Row(Code.UNAVAILABLE, "UNAVAILABLE", 500),
    errors.DeadlineError: Row(Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", 500),
    errors.NotReadyError: Row(Code.UNAVAILABLE, "NOT_READY", 1000),
    errors.ResourceExhaustedError: Row(Code.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED", 1000),
    errors.RateLimitedError: Row(Code.RESOURCE_EXHAUSTED, "RATE_LIMITED", 1000),  # or as the error says
    # The caller holds an old topology: the same call to the same address cannot succeed.
    errors.WrongServerError: Row(Code.FAILED_PRECONDITION, "WRONG_SERVER"),
    errors.MigrationError: Row(Code.FAILED_PRECONDITION, "MIGRATION"),
    errors.AddressInUseError: Row(Code.FAILED_PRECONDITION, "ADDRESS_IN_USE"),
    errors.ProcessFailedError: Row(Code.INTERNAL, "PROCESS_FAILED"),
    errors.TopologyError: Row(Code.FAILED_PRECONDITION, "NO_TOPOLOGY"),
    errors.TopologyConflictError: Row(Code.ABORTED, "TOPOLOGY_CONFLICT", 100),
    errors.StaleKernelError: Row(Code.FAILED_PRECONDITION, "STALE_KERNEL"),
    errors.StorageError: Row(Code.INTERNAL, "STORAGE"),
    errors.DirectoryInUseError: Row(Code.FAILED_PRECONDITION, "DIRECTORY_IN_USE"),
    errors.ForeignDirectoryError: Row(Code.FAILED_PRECONDITION, "FOREIGN_DIRECTORY"),
    errors.VersionError: Row(Code.FAILED_PRECONDITION, "NEWER_VERSION"),
    errors.CorruptError: Row(Code.DATA_LOSS, "CORRUPT"),
    errors.DiskFullError: Row(Code.RESOURCE_EXHAUSTED, "DISK_FULL", 5000),
    # The process ends and its log is read anew: the resend then counts what was lost, once.
    errors.WriteFailedError: Row(Code.UNAVAILABLE, "WRITE_FAILED", 1000),
    # Not ours, but raised where ours could be.
    NotImplementedError: Row(Code.UNIMPLEMENTED, "UNIMPLEMENTED"),
    TimeoutError: Row(Code.DEADLINE_EXCEEDED, "TIMEOUT", 500),
}
"""One row for every class of errors.py; a test holds the two against each other."""

_CLASSES: Final = {
    row.reason: error_class for error_class, row in TABLE.items() if issubclass(error_class, errors.TopKError)
}

# What a status without our ErrorInfo means: gRPC itself, a proxy or a stranger's server made it.
_FOREIGN: Final[Mapping[grpc.StatusCode, type[errors.TopKError]]] = {
    Code.INVALID_ARGUMENT: errors.InvalidArgumentError,
    Code.OUT_OF_RANGE: errors.InvalidArgumentError,
    Code.UNAVAILABLE: errors.UnavailableError,
    Code.ABORTED: errors.UnavailableError,
    Code.CANCELLED: errors.UnavailableError,
    Code.UNKNOWN: errors.UnavailableError,
    Code.DEADLINE_EXCEEDED: errors.DeadlineError,
    Code.RESOURCE_EXHAUSTED: errors.ResourceExhaustedError,
    Code.UNAUTHENTICATED: errors.UnauthenticatedError,
    Code.PERMISSION_DENIED: errors.PermissionDeniedError,
}
_RETRIABLE: Final = frozenset({Code.UNAVAILABLE, Code.ABORTED, Code.CANCELLED, Code.UNKNOWN, Code.DEADLINE_EXCEEDED})


@dataclass(frozen=True, slots=True)
class RpcStatus:
    """A status to be sent.

    Attributes:
        code: the status code.
        reason: ErrorInfo.reason.
        message: what is wrong, where, and what to do.
        retry_after_ms: RetryInfo, milliseconds; None: trying again does not help.
        metadata: ErrorInfo.metadata.
    """

    code: grpc.StatusCode
    reason: str
    message: str
    retry_after_ms: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)

    def to_grpc(self) -> grpc.Status:
        """Code, message and trailers, as `context.abort_with_status` takes them."""
        details = [_pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=dict(self.metadata)))]
        if self.retry_after_ms is not None:
            delay = Duration(seconds=self.retry_after_ms // 1000, nanos=self.retry_after_ms % 1000 * 1_000_000)
            details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
        # Status codes are pairs of the number and a word.
        status: grpc.Status = rpc_status.to_status(
            status_pb2.Status(code=self.code.value[0], message=_shorten(self.message), details=details)
        )
        return status


def _pack(message: Any) -> AnyMessage:
    packed = AnyMessage()
    packed.Pack(message)
    return packed


def _shorten(message: str) -> str:
    raw = message.encode("utf-8", "replace")
    return raw[:_MESSAGE_BYTES_MAX].decode("utf-8", "ignore") + ("…" if len(raw) > _MESSAGE_BYTES_MAX else "")


def _row_of(error: BaseException) -> Row | None:
    """The row of the nearest class, the root aside: it says nothing."""
    for error_class in type(error).__mro__:
        if error_class in TABLE and error_class is not errors.TopKError:
            return TABLE[error_class]
    return None


def _beneath(error: BaseException, depth: int = 0) -> Iterator[BaseException]:
    """The error, then what it wraps, nearest first."""
    yield error
    if depth < _DEPTH_MAX:
        if isinstance(error, BaseExceptionGroup):
            for inner in error.exceptions:
                yield from _beneath(inner, depth + 1)
        if error.__cause__ is not None:
            yield from _beneath(error.__cause__, depth + 1)


def status_of(error: BaseException, error_id: str = "") -> RpcStatus:
    """What an exception becomes on the wire.

    Args:
        error: any exception; gRPC's own is read with `from_rpc_error` first.
        error_id: where to find an unknown exception in the server's log; only for those does it appear in the answer.

    Returns:
        The status of the first error with a row, of this one and those that it wraps; INTERNAL, without the
        exception's own words, where there is none.
    """
    for candidate in _beneath(error):
        known = from_rpc_error(candidate) if isinstance(candidate, grpc.RpcError) else candidate
        row = _row_of(known)
        if row is not None:
            metadata = {}
            if isinstance(known, errors.CorruptError):
                metadata = {"path": known.path} | ({} if known.offset is None else {"offset": str(known.offset)})
            if isinstance(known, errors.OutOfRangeError):
                metadata = {"start_ms": str(known.start_ms), "end_ms": str(known.end_ms)}
            retry_ms = known.retry_after_ms if isinstance(known, errors.RateLimitedError) else row.retry_after_ms
            return RpcStatus(row.code, row.reason, str(known) or type(known).__name__, retry_ms, metadata)
    row = TABLE[errors.TopKError]
    if isinstance(error, errors.TopKError):
        return RpcStatus(row.code, row.reason, str(error))
    where = f" {error_id}: look for it in the server's log" if error_id else ""
    metadata = {"error_id": error_id} if error_id else {}
    return RpcStatus(row.code, row.reason, f"internal error{where}", metadata=metadata)


def is_known(error: BaseException) -> bool:
    """Whether the table says what the error is, or one that it wraps. The others are faults of this program."""
    known = (errors.TopKError, grpc.RpcError)
    return any(isinstance(each, known) or _row_of(each) is not None for each in _beneath(error))


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException, error_id: str = "") -> Never:
    """Ends a call with an error's status.

    Raises:
        grpc.aio.AbortError: always; leave it to gRPC.
    """
    status = status_of(error, error_id).to_grpc()
    context.set_code(status.code)  # for interceptors that know no rich status, as those of traces
    context.set_details(status.details)
    await context.abort_with_status(status)


# --- The client's side ------------------------------------------------------------------------------------------------


def _details_of(error: grpc.RpcError) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.RetryInfo | None]:
    """Our ErrorInfo and the RetryInfo of a status, where it has them."""
    try:
        status = rpc_status.from_call(error)
    except (ValueError, DecodeError):  # a proxy rewrote one half of it
        return None, None
    info = retry = None
    for detail in () if status is None else status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            found = error_details_pb2.ErrorInfo()
            if detail.Unpack(found) and found.domain == DOMAIN:
                info = found
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo()
            detail.Unpack(retry)
    return info, retry


def _code_of(error: grpc.RpcError) -> grpc.StatusCode:
    code = error.code() if hasattr(error, "code") else None
    return code if isinstance(code, grpc.StatusCode) else Code.UNKNOWN


def from_rpc_error(error: grpc.RpcError) -> errors.TopKError:
    """The exception to raise, `from` the one given, for a call that failed.

    Returns:
        The class that the server raised, found by ErrorInfo.reason; without one, what the status code means.
    """
    info, _ = _details_of(error)
    code = _code_of(error)
    message = (error.details() if hasattr(error, "details") else None) or code.name
    error_class = _CLASSES.get(info.reason) if info is not None else None
    if info is not None and error_class is errors.CorruptError:
        offset = info.metadata.get("offset", "")
        return errors.CorruptError(message, info.metadata.get("path", ""), int(offset) if offset.isdigit() else None)
    if info is not None and error_class is errors.OutOfRangeError:
        start, end = info.metadata.get("start_ms", "0"), info.metadata.get("end_ms", "0")
        return errors.OutOfRangeError(message, int(start), int(end))
    if error_class is None:
        error_class = _FOREIGN.get(code, errors.TopKError)
        message = message if code.name in message else f"{message} ({code.name})"
    return error_class(message)


def is_own(error: grpc.RpcError) -> bool:
    """Whether a server of this package sent the status; else gRPC made it up here, or somebody on the way did."""
    return _details_of(error)[0] is not None


def retry_after_ms(error: grpc.RpcError) -> int | None:
    """How long the server asks to wait before trying again, milliseconds; None where it does not say."""
    _, retry = _details_of(error)
    return None if retry is None else retry.retry_delay.seconds * 1000 + retry.retry_delay.nanos // 1_000_000


def is_retriable(error: grpc.RpcError) -> bool:
    """Whether the same call may succeed later.

    What this package's servers sent says so itself, by RetryInfo; of the rest UNAVAILABLE, ABORTED, CANCELLED,
    UNKNOWN (a stream that was reset) and DEADLINE_EXCEEDED.
    """
    info, retry = _details_of(error)
    if retry is not None:
        return True
    return info is None and _code_of(error) in _RETRIABLE
