"""Who may call what: asked once a call, before any handler, so that the way of plays costs nothing more.

A gate decides by the method and the credential that the call carries; an interceptor asks it, and refuses in its name.
Nothing of the server is touched before: not even whether it has such a method is told to a stranger. Who was let in
stands in `caller` for the handler.

A stream can outlive the credential it began with. So each one that runs is remembered, and asked about again when the
gate says that something has changed; if it would not be let in now, it ends with the same error that a new call gets.
"""

from __future__ import annotations

import asyncio
import hmac
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import grpc

from topk_grpc import metrics
from topk_grpc.errors import ForeignCallerError, PermissionDeniedError, TopKError
from topk_grpc.rpc.refusals import LimitedLog
from topk_grpc.rpc.status import status_of

CLUSTER_SECRET_KEY: Final = "topk-cluster-secret"
"""The metadata by which a part of the cluster shows that it is one."""

OPEN: Final = "open"
"""Not a role: everybody may call."""

CLUSTER: Final = "cluster"
"""Not a role either: a part of the cluster itself."""

_LASTING: Final = frozenset({OPEN, CLUSTER})  # what no gate takes back while it runs

OPEN_METHODS: Final = frozenset(f"/grpc.health.v1.Health/{method}" for method in ("Check", "List", "Watch"))
"""Health: a probe carries no credentials."""

_METHOD_CHARACTERS_MAX: Final = 120  # of a name that the caller has chosen, in the log


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call.

    Attributes:
        name: the token's, for the log; empty where nobody asks who it is.
        role: the one that let the call in, for metrics.
        plays_per_second: what the caller may send; 0: as much as it likes.
    """

    name: str = ""
    role: str = OPEN
    plays_per_second: float = 0.0


ANYBODY: Final = Caller()

caller: ContextVar[Caller] = ContextVar("topk_caller", default=ANYBODY)
"""Who makes the call that is being handled."""


class Gate(Protocol):
    """Decides."""

    def credential(self, metadata: Mapping[str, Any]) -> str:
        """What `admit` goes by; nothing that could be used to make a call, where it is kept."""
        ...

    def admit(self, method: str, credential: str) -> Caller:
        """Who it is, if they may call the method.

        Raises:
            UnauthenticatedError: nobody knows.
            PermissionDeniedError: they may not.
        """
        ...

    def knows(self, method: str) -> bool:
        """Whether the gate has a rule for the method: what has none is served to nobody."""
        ...

    def name_of(self, credential: str) -> str:
        """Whose credential it is, for the log; empty where that is not known."""
        ...


@dataclass(slots=True, eq=False)
class _Stream:
    method: str
    credential: str
    peer: str
    ended: asyncio.Future[TopKError]


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Asks a gate about every call of a server. Belongs to one event loop.

    Args:
        gate: decides.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._log = LimitedLog("caller_refused")
        self._streams: set[_Stream] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Lets one call through to its handler, or puts a refusal in its place."""
        method = str(handler_call_details.method)
        credential = self._gate.credential(dict(handler_call_details.invocation_metadata or ()))
        try:
            admitted = self._gate.admit(method, credential)
        except TopKError as error:
            return self._refusal(method, credential, error)
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # gRPC answers UNIMPLEMENTED
        if not self._gate.knows(method):
            return self._refusal(method, credential, PermissionDeniedError(f"{method} is open to no role"))
        metrics.CALLS_ADMITTED.labels(admitted.role).inc()
        caller.set(admitted)
        if admitted.role in _LASTING or not handler.response_streaming:
            return handler  # type: ignore[no-any-return]
        return self._revocable(method, credential, handler)

    def recheck(self) -> None:
        """Ends the streams that would not be let in any more."""
        for stream in list(self._streams):
            try:
                self._gate.admit(stream.method, stream.credential)
            except TopKError as error:
                self._note(stream.method, stream.credential, stream.peer, error, open_stream=True)
                if not stream.ended.done():
                    stream.ended.set_result(error)

    # --- Refusing -----------------------------------------------------------------------------------------------------

    def _note(self, method: str, credential: str, peer: str, error: TopKError, *, open_stream: bool) -> None:
        reason = status_of(error).reason
        metrics.CALLS_REFUSED.labels(reason).inc()
        shown = method if len(method) <= _METHOD_CHARACTERS_MAX else f"{method[:_METHOD_CHARACTERS_MAX]}…"
        fields = {"method": shown, "peer": peer, "reason": reason}
        if name := self._gate.name_of(credential):
            fields["token"] = name
        if open_stream:
            fields["stream"] = "open"
        self._log.warning(**fields)

    def _refusal(self, method: str, credential: str, error: TopKError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._note(method, credential, context.peer(), error, open_stream=False)
            raise error  # becomes its status in ErrorInterceptor

        # Of a kind that waits for no request: what a stranger sends is not read.
        return grpc.stream_stream_rpc_method_handler(refuse)

    # --- Streams that run ---------------------------------------------------------------------------------------------

    def _revocable(self, method: str, credential: str, handler: Any) -> grpc.RpcMethodHandler[Any, Any]:
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream

        def begin(context: grpc.aio.ServicerContext[Any, Any]) -> _Stream:
            stream = _Stream(method, credential, context.peer(), asyncio.get_running_loop().create_future())
            self._streams.add(stream)
            return stream

        async def run(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            stream = begin(context)
            work = asyncio.ensure_future(behaviour(request, context))
            try:
                await asyncio.wait((work, stream.ended), return_when=asyncio.FIRST_COMPLETED)
                if work.done():
                    return work.result()
            finally:
                self._streams.discard(stream)
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
            raise stream.ended.result()

        async def generate(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            stream = begin(context)
            responses = behaviour(request, context)
            step: asyncio.Future[Any] | None = None
            try:
                while True:
                    step = asyncio.ensure_future(anext(responses))
                    await asyncio.wait((step, stream.ended), return_when=asyncio.FIRST_COMPLETED)
                    if stream.ended.done():
                        raise stream.ended.result()
                    try:
                        response = step.result()
                    except StopAsyncIteration:
                        return
                    yield response
            finally:
                self._streams.discard(stream)
                if step is not None:
                    step.cancel()
                    await asyncio.gather(step, return_exceptions=True)
                await responses.aclose()

        wrapped: Any = generate if inspect.isasyncgenfunction(behaviour) else run
        make: Any = (
            grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        )
        return make(wrapped, handler.request_deserializer, handler.response_serializer)  # type: ignore[no-any-return]


class ClusterGate:
    """A shard's gate: lets in who knows the secret of the cluster, and probes of health.

    Args:
        secret: the cluster's.
    """

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def credential(self, metadata: Mapping[str, Any]) -> str:
        """`cluster` for one who knows the secret; compared in a time that says nothing of it."""
        given = metadata.get(CLUSTER_SECRET_KEY, "")
        raw = given if isinstance(given, bytes) else str(given).encode()
        return "cluster" if hmac.compare_digest(raw, self._secret) else ""

    def admit(self, method: str, credential: str) -> Caller:
        """As `Gate.admit`."""
        if method in OPEN_METHODS:
            return ANYBODY
        if credential:
            return Caller("cluster", CLUSTER)
        raise ForeignCallerError(
            "this is a shard, which answers the gateways of its own cluster alone: call a gateway. (A gateway that is"
            " told this was started with another --topology)"
        )

    def knows(self, method: str) -> bool:
        """All that a shard serves is for its cluster."""
        return True

    def name_of(self, credential: str) -> str:
        """Nobody else has a name here."""
        return credential
