"""What every server does first: its log, its traces, its certificates, its metrics."""

from __future__ import annotations

import os
from typing import Any, Final

import grpc

from topk_grpc import metrics
from topk_grpc._version import VERSION
from topk_grpc.config import ServerSettings, is_loopback
from topk_grpc.kernels import compiled
from topk_grpc.rpc import log, native_log, process, tracing
from topk_grpc.rpc.health import Health
from topk_grpc.rpc.server import split_address, start_health_server
from topk_grpc.rpc.tls import server_credentials

_QUIET: Final = {"ERROR", "NONE"}


def begin(settings: ServerSettings, role: str, name: str = "") -> None:
    """Call it before anything that may log.

    Args:
        settings: the role's.
        role: of the server; each log line carries it.
        name: of a shard; the same.

    Raises:
        SettingError: a setting that cannot be used, or an extra that it needs is not installed.
        AddressInUseError: the port for metrics is taken.
    """
    if settings.tls_cert:
        native_log.capture()
    common: dict[str, Any] = {"shard": name} if name else {}
    log.configure(settings.log_level, role=role, **common)
    if settings.tracing:
        tracing.start(role, name)
    process.prepare()
    if not compiled():
        log.warning(
            "kernels_uncompiled",
            consequence="hundreds of times slower",
            remedy="install a C compiler, then `make install`",
        )
    if settings.tls_cert and os.environ.get("GRPC_VERBOSITY", "").upper() in _QUIET:
        log.warning(
            "tls_failures_unseen",
            consequence="failed TLS handshakes are neither logged nor counted",
            remedy="leave GRPC_VERBOSITY unset",
        )
    if settings.metrics_port:
        host, _ = split_address(settings.listen)
        metrics.SERVER_INFO.labels(role, name, VERSION, "compiled" if compiled() else "uncompiled").set(1)
        metrics.serve(host, settings.metrics_port, role)


async def serve_health(settings: ServerSettings, health: Health) -> list[grpc.aio.Server]:
    """Starts the health server where one was asked for: live, and not ready until `health` is told.

    Raises:
        AddressInUseError: its port is taken.
    """
    if not settings.health_port:
        return []
    server, _ = await start_health_server(health, settings.listen, settings.health_port)
    return [server]


def credentials_of(settings: ServerSettings, client_ca: str) -> grpc.ServerCredentials | None:
    """What the server listens with; None for plaintext.

    Args:
        settings: the role's.
        client_ca: the file of the CAs that callers' certificates have to be signed by; empty: they need none.

    Raises:
        SettingError: a file cannot be used.
    """
    if settings.tls_cert:
        return server_credentials(settings.tls_cert, settings.tls_key, client_ca)
    if not is_loopback(split_address(settings.listen)[0]):
        log.warning("plaintext", listen=settings.listen, consequence="whoever is on the way can read everything")
    return None


def tell_supervisor(settings: ServerSettings, address: str) -> None:
    """Says on standard output that the server answers, where somebody supervises it who waits for that."""
    if settings.exit_with_stdin:
        print(f"ready: {address}", flush=True)  # noqa: T201
