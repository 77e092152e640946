"""Traces: OpenTelemetry's own instrumentation of gRPC, as an extra, and off unless a setting says otherwise.

Calls with one request are traced, at the gateway and at each shard that it asks, in one trace: queries, RecordPlays,
`topk cluster`. Streams of plays and watches are not: a span of half an hour says nothing, and theirs is the path where
each microsecond counts; docs/metrics.md has what is known of them. Where spans go, and how many of them, is said as
OpenTelemetry has it, by OTEL_… variables.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc

from topk_grpc._version import VERSION
from topk_grpc.errors import SettingError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_STREAMS: Final = ("StreamPlays", "WatchTopK", "Append", "ServerReflectionInfo")
_HEALTH: Final = "grpc.health.v1.Health"


@dataclass(frozen=True, slots=True)
class _Interceptors:
    server: tuple[grpc.aio.ServerInterceptor, ...] = ()
    client: tuple[grpc.aio.ClientInterceptor, ...] = ()


_interceptors = _Interceptors()


def server_interceptors() -> Sequence[grpc.aio.ServerInterceptor]:
    """What a server has before all others; nothing unless `start` was called."""
    return _interceptors.server


def client_interceptors() -> Sequence[grpc.aio.ClientInterceptor]:
    """What a channel has; nothing unless `start` was called."""
    return _interceptors.client


def start(role: str, name: str) -> None:
    """Has the servers and channels that this process makes from here on traced.

    Args:
        role: of the server: the service is `topk-ROLE`, unless OTEL_SERVICE_NAME says otherwise.
        name: of a shard; it is the service's instance.

    Raises:
        SettingError: the extra is not installed.
    """
    global _interceptors
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise SettingError(
            f"--tracing needs OpenTelemetry, which is not installed ({error}): pip install 'topk-grpc[tracing]'"
        ) from error
    resource = Resource.create(
        {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or f"topk-{role}",
            "service.version": VERSION,
            "service.instance.id": name or f"{socket.gethostname()}:{os.getpid()}",
        }
    )
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _interceptors = _made(provider)


def _made(provider: TracerProvider) -> _Interceptors:
    from opentelemetry.instrumentation import grpc as instrumentation

    make: Any = instrumentation  # most of it is untyped
    left_out = [make.filters.service_name(_HEALTH), *(make.filters.method_name(name) for name in _STREAMS)]
    traced = make.filters.negate(make.filters.any_of(*left_out))
    single = (grpc.aio.UnaryUnaryClientInterceptor, grpc.aio.UnaryStreamClientInterceptor)
    # Interceptors of streams would wrap each message of plays, whether its call is traced or not.
    of_client = [one for one in make.aio_client_interceptors(provider, traced) if isinstance(one, single)]
    return _Interceptors((make.aio_server_interceptor(provider, traced),), tuple(of_client))
