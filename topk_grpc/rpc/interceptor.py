"""Turns whatever a handler raises into a status, and garbage bytes into INVALID_ARGUMENT.

gRPC would answer both with UNKNOWN. For that requests of generated methods are parsed here, within the guarded part,
instead of by gRPC before it.
"""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, Never, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from topk_grpc import metrics
from topk_grpc.errors import InvalidArgumentError, StorageError
from topk_grpc.rpc import log, status

MessageT = TypeVar("MessageT", bound=Message)

_SAME_PROTO: Final = "check that client and server use the same .proto"

# These are gRPC's and the loop's own ways to end a handler.
_PASSED: Final = (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit)


def parse(message_class: type[MessageT], raw: bytes) -> MessageT:
    """Reads a message.

    Raises:
        InvalidArgumentError: the bytes are none of this kind, or hold text that is not UTF-8.
    """
    try:
        return message_class.FromString(raw)
    except DecodeError as error:
        raise InvalidArgumentError(
            f"the request's {len(raw)} bytes are no valid {message_class.DESCRIPTOR.full_name}: {_SAME_PROTO}"
        ) from error


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Guards every handler of a server.

    Known errors become their status by the table of rpc/status.py. Unknown ones are faults of this program: they become
    INTERNAL with an id, and the id is logged with the traceback.
    """

    def __init__(self) -> None:
        for row in status.TABLE.values():
            metrics.CALLS_FAILED.labels(row.reason)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Wraps the handler of one call."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        method = str(handler_call_details.method)
        deserializer, serializer = handler.request_deserializer, handler.response_serializer
        # Only single requests are parsed here: `context.read` hands a stream's messages out as gRPC made them.
        inner = None if handler.request_streaming else deserializer
        outer = deserializer if handler.request_streaming else None
        if handler.request_streaming and handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                _guard(method, handler.stream_stream, inner), outer, serializer
            )
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(_guard(method, handler.stream_unary, inner), outer, serializer)
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(_guard(method, handler.unary_stream, inner), outer, serializer)
        return grpc.unary_unary_rpc_method_handler(_guard(method, handler.unary_unary, inner), outer, serializer)


def _guard(method: str, behaviour: Any, deserializer: Callable[[bytes], Any] | None) -> Any:
    """The handler with its errors translated, of the same kind: a generator stays one."""

    def read(request: Any) -> Any:
        if deserializer is None:
            return request
        try:
            return deserializer(request)
        except DecodeError as error:
            raise InvalidArgumentError(
                f"the request's {len(request)} bytes are not what {method} takes: {_SAME_PROTO}"
            ) from error

    if inspect.isasyncgenfunction(behaviour):

        async def guarded_generator(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            responses = None
            try:
                responses = behaviour(read(request), context)
                async for response in responses:
                    yield response
            except _PASSED:
                raise
            except Exception as error:
                await _fail(method, context, error)
            finally:
                if responses is not None:
                    # Else the handler's own `finally` runs when the garbage collector finds it.
                    await responses.aclose()

        return guarded_generator

    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            answer = behaviour(read(request), context)
            # Methods that nobody wrote are the generated code's plain functions, which raise NotImplementedError.
            return await answer if inspect.isawaitable(answer) else answer
        except _PASSED:
            raise
        except Exception as error:
            await _fail(method, context, error)

    return guarded


async def _fail(method: str, context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> Never:
    """Ends the call with the error's status, counts it, and logs what is the server's fault."""
    if isinstance(error, NotImplementedError) and not error.__cause__:
        error = NotImplementedError(f"{method} is not offered by this server")
    error_id = ""
    reason = status.status_of(error).reason
    metrics.CALLS_FAILED.labels(reason).inc()
    if not status.is_known(error):
        error_id = uuid.uuid4().hex[:12]
        log.error("handler_failed", method=method, error_id=error_id, error=error)
    elif isinstance(error, StorageError):
        log.warning("storage_failed", method=method, reason=reason, message=str(error))
    else:
        log.debug("call_refused", method=method, reason=reason, message=str(error))
    await status.abort(context, error, error_id)
