"""Makes gRPC servers, binds them, and puts handlers of raw bytes beside generated ones.

The order is: `create_server`, add the generated servicers, `add_raw_handlers` over them, `add_reflection`,
`Health.register`, `bind`, `server.start()`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection

from topk_grpc.errors import AddressInUseError, SettingError
from topk_grpc.rpc import tracing
from topk_grpc.rpc.health import Health
from topk_grpc.rpc.interceptor import ErrorInterceptor, parse
from topk_grpc.rpc.lifecycle import StopRequest, graceful_stop, serve_until_stopped

__all__ = [
    "ErrorInterceptor",
    "Health",
    "Patience",
    "StopRequest",
    "add_raw_handlers",
    "add_reflection",
    "bind",
    "create_server",
    "graceful_stop",
    "parse",
    "serve_until_stopped",
    "start_health_server",
]

HEALTH_SERVICE: Final = "grpc.health.v1.Health"

CONCURRENT_CALLS_MAX: Final = 4096
"""Calls under way on one server; one more is refused with RESOURCE_EXHAUSTED."""

STREAMS_PER_CONNECTION_MAX: Final = 1000
"""Calls under way on one connection; one more waits at the client, as HTTP/2 has it."""

METADATA_BYTES_MAX: Final = 16 << 10
"""All metadata of a call together; a call with more is refused with RESOURCE_EXHAUSTED."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server bears with connections, in seconds.

    Attributes:
        handshake: until they have introduced themselves: who says nothing, or half of it, holds a descriptor.
        idle: without a call.
        age: until they take no new calls; 0: for ever.
        grace: after that, until what is still under way is cut.
    """

    handshake: float = 10.0
    idle: float = 900.0
    age: float = 0.0
    grace: float = 0.0

    def options(self) -> list[tuple[str, int]]:
        """As gRPC has them."""
        chosen = {"grpc.server_handshake_timeout_ms": self.handshake, "grpc.max_connection_idle_ms": self.idle}
        if self.age:
            chosen |= {"grpc.max_connection_age_ms": self.age, "grpc.max_connection_age_grace_ms": self.grace}
        return [(name, min(int(seconds * 1000), (1 << 31) - 1)) for name, seconds in chosen.items()]


UnaryHandler = Callable[[bytes, "grpc.aio.ServicerContext[bytes, bytes]"], Awaitable[bytes]]
StreamHandler = Callable[[AsyncIterator[bytes], "grpc.aio.ServicerContext[bytes, bytes]"], Any]


def create_server(
    message_bytes_max: int,
    *,
    concurrent_calls_max: int = CONCURRENT_CALLS_MAX,
    access: grpc.aio.ServerInterceptor | None = None,
    patience: Patience = Patience(),
) -> grpc.aio.Server:
    """A server whose handlers may raise any error of errors.py.

    Args:
        message_bytes_max: the largest message taken; larger ones are refused by gRPC with RESOURCE_EXHAUSTED. Answers
            are as large as they are: the limits of queries bound them.
        concurrent_calls_max: calls under way; one more is refused with RESOURCE_EXHAUSTED.
        access: is asked who may call, before any handler; None: everybody may.
        patience: with connections.
    """
    return grpc.aio.server(
        interceptors=[*tracing.server_interceptors(), ErrorInterceptor(), *([] if access is None else [access])],
        maximum_concurrent_rpcs=concurrent_calls_max,
        options=[
            ("grpc.so_reuseport", 0),  # on, a second server would bind a used port without a word
            ("grpc.max_receive_message_length", message_bytes_max),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
            # The lower of the two begins to refuse by chance, so they are the same.
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            ("grpc.absolute_max_metadata_size", METADATA_BYTES_MAX),
            # Clients may ping each 10 s, with or without calls; the default answers that with "too many pings".
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            # A client that vanished without a word is noticed within 80 s.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.ping_timeout_ms", 20_000),  # of all pings, those that gRPC sends for its own ends too
            *patience.options(),
        ],
    )


def add_raw_handlers(
    server: grpc.aio.Server,
    service: str,
    *,
    stream_stream: Mapping[str, StreamHandler] | None = None,
    unary_unary: Mapping[str, UnaryHandler] | None = None,
) -> None:
    """Replaces generated methods by handlers that take and give bytes.

    Call it after the generated `add_…Servicer_to_server` of the same service: the later registration wins.

    Args:
        server: not started yet.
        service: its full name, `topk.v1.TopKService`.
        stream_stream: async generators, or coroutines that use `context.read` and `context.write`, by method name.
        unary_unary: coroutines, by method name.
    """
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for name, stream in (stream_stream or {}).items():
        handlers[name] = grpc.stream_stream_rpc_method_handler(stream)
    for name, unary in (unary_unary or {}).items():
        handlers[name] = grpc.unary_unary_rpc_method_handler(unary)
    server.add_registered_method_handlers(service, handlers)


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Lets clients without the protos list and call services (grpc.reflection.v1alpha).

    Args:
        server: not started yet.
        services: full names; health and reflection are added to them.
    """
    reflection.enable_server_reflection([*services, HEALTH_SERVICE, reflection.SERVICE_NAME], server)


# --- Addresses --------------------------------------------------------------------------------------------------------


def split_address(address: str, flag: str = "--listen") -> tuple[str, int]:
    """HOST and PORT of `HOST:PORT`, brackets of IPv6 removed.

    Raises:
        SettingError: it is not of that form, or the port not in 0 to 65535. (gRPC would take 99999 modulo 65536.)
    """
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    named = colon and bare and (bracketed or ":" not in bare)
    if not named or not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise SettingError(
            f"{flag} is {address!r}: write HOST:PORT with a port of 0 to 65535, as in 127.0.0.1:50050 or [::1]:50050"
        )
    return bare, int(port)


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _probe(host: str, port: int, flag: str) -> None:
    """Tries every address that the name stands for.

    gRPC is content with one: `localhost` on a used port would serve IPv6 alone, and IPv4 callers would reach the other
    process.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SettingError(
            f"{flag} names the host {host!r}, which cannot be resolved ({error}): name an address of this machine"
        ) from error
    failures: list[OSError] = []
    for family, kind, protocol, _, where in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(where)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise _in_use(host, port, flag) from error
            failures.append(error)
    if len(failures) == len(found):
        raise SettingError(
            f"{flag} is {_join(host, port)}, which cannot be listened on ({failures[0].strerror}): "
            "name an address of this machine and a port that this user may bind"
        ) from failures[0]


def _in_use(host: str, port: int, flag: str) -> AddressInUseError:
    other = "PORT" if flag == "--health-port" else f"{_join(host, 0)} (0 takes a free one)"
    return AddressInUseError(
        f"port {port} of {host} is in use by another process: stop that one, or choose another port with {flag} {other}"
    )


async def bind(
    server: grpc.aio.Server,
    address: str,
    flag: str = "--listen",
    credentials: grpc.ServerCredentials | None = None,
) -> str:
    """Opens the port a server listens on.

    Args:
        server: not started yet.
        address: HOST:PORT; port 0 takes a free one.
        flag: the setting that errors tell to change.
        credentials: for TLS; None: plaintext.

    Returns:
        HOST:PORT, with the port that was taken.

    Raises:
        AddressInUseError: another process listens there.
        SettingError: no such address on this machine, or not allowed.
    """
    host, port = split_address(address, flag)
    if port:
        _probe(host, port, flag)
    try:
        where = _join(host, port)
        bound = server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)
    except RuntimeError as error:
        if port:
            raise _in_use(host, port, flag) from error  # since the probe
        raise SettingError(
            f"{flag} is {address!r}, which cannot be listened on: name an address of this machine"
        ) from error
    return _join(host, bound)


async def start_health_server(health: Health, listen: str, port: int) -> tuple[grpc.aio.Server, str]:
    """A started second server with the health service alone, in plaintext, for probes.

    Args:
        health: of the main server.
        listen: the main server's address; its host is taken.
        port: above 0 for a given one, 0 for a free one.

    Returns:
        The server, and the HOST:PORT it listens on.

    Raises:
        AddressInUseError: another process listens there.
    """
    server = create_server(1 << 16, concurrent_calls_max=64)
    await health.register(server)
    host, _ = split_address(listen)
    bound = await bind(server, _join(host, port), "--health-port")
    await server.start()
    return server, bound
