"""Opens channels.

Idempotent unary calls are tried again by gRPC itself while a server is UNAVAILABLE: a batch counts once however often
it is sent, and queries change nothing. Streams are not: their users resend what is unacknowledged.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import Sequence
from typing import Any, Final

import grpc

from topk_grpc.errors import SettingError
from topk_grpc.rpc.tracing import client_interceptors

MESSAGE_BYTES_MAX: Final = 64 << 20
"""The largest answer taken, bytes."""

_RETRIED: Final = {
    "topk.v1.TopKService": ("RecordPlays", "GetTopK", "GetSongs", "ListCharts", "DescribeCluster"),
    "topk.v1.ShardService": ("QueryTopK", "QueryCounts", "QueryRanks", "QueryCharts", "DescribeShard"),
}

SERVICE_CONFIG: Final[dict[str, Any]] = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [
                {"service": service, "method": method} for service, methods in _RETRIED.items() for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
"""Round robin over all addresses of a target, and the retries."""


def _split(address: str) -> tuple[str, str]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()):
        raise SettingError(f"{address!r} is no address: write HOST:PORT, as in 127.0.0.1:50050")
    return host.removeprefix("[").removesuffix("]"), port


def _numeric(address: str) -> list[str]:
    """The address, or those that its host's name stands for now, as gRPC's lists take only numbers."""
    host, port = _split(address)
    try:
        hosts = [str(ipaddress.ip_address(host))]
    except ValueError:
        try:
            found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            raise SettingError(f"the host of {address!r} cannot be resolved ({error}): check its spelling") from error
        hosts = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        # gRPC takes no mixed lists; where a name has both kinds, IPv4 does for reaching it.
        hosts = [each for each in hosts if ":" not in each] or hosts
    return [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in hosts]


def target_of(target: str | Sequence[str]) -> str:
    """gRPC's target for what callers name.

    Args:
        target: `HOST:PORT`, a URI such as `dns:///gateways:50050` (all its addresses in turn, and asked again when
            connections fail), or a list of HOST:PORT. Names in a list are resolved once, here.

    Raises:
        SettingError: it names nothing, or IPv4 and IPv6 at once.
    """
    if isinstance(target, str):
        if not target.strip():
            raise SettingError("the address to connect to is empty: write HOST:PORT, as in 127.0.0.1:50050")
        return target.strip()
    if len(target) == 1:
        return target_of(target[0])
    addresses = list(dict.fromkeys(numeric for address in target for numeric in _numeric(address)))
    if not addresses:
        raise SettingError("the list of addresses to connect to is empty: name at least one HOST:PORT")
    scheme = "ipv6" if addresses[0].startswith("[") else "ipv4"
    if any(address.startswith("[") != (scheme == "ipv6") for address in addresses):
        raise SettingError(f"the list {', '.join(target)} mixes IPv4 and IPv6: name addresses of one kind")
    return f"{scheme}:{','.join(addresses)}"


def open_channel(
    target: str | Sequence[str],
    *,
    message_bytes_max: int = MESSAGE_BYTES_MAX,
    options: Sequence[tuple[str, Any]] = (),
    credentials: grpc.ChannelCredentials | None = None,
) -> grpc.aio.Channel:
    """Opens a channel; it connects when first used, and again whenever the connection is lost.

    Args:
        target: as in `target_of`.
        message_bytes_max: the largest answer taken. What is sent is bounded by the server.
        options: gRPC's, over those given here.
        credentials: for TLS; None: plaintext.

    Raises:
        SettingError: as in `target_of`.
    """
    chosen: dict[str, Any] = {
        "grpc.service_config": json.dumps(SERVICE_CONFIG),
        "grpc.enable_retries": 1,
        "grpc.max_receive_message_length": message_bytes_max,
        "grpc.max_send_message_length": -1,
        # Else channels of one process to one address share a connection, and with it its flow control.
        "grpc.use_local_subchannel_pool": 1,
        # A peer that vanished without a word is noticed within 25 s. Servers refuse pings that come much faster.
        "grpc.keepalive_time_ms": 15_000,
        "grpc.keepalive_timeout_ms": 10_000,
        # gRPC pings for its own ends too, and while one of those is under way it sends no other: 60 s by default.
        "grpc.http2.ping_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_pings_without_data": 0,
        # A process that restarts is back within a second or two; gRPC's own backoff grows to two minutes.
        "grpc.initial_reconnect_backoff_ms": 100,
        "grpc.min_reconnect_backoff_ms": 3_000,  # the time one attempt may take
        "grpc.max_reconnect_backoff_ms": 2_000,
        "grpc.enable_http_proxy": 0,
    }
    chosen.update(options)
    if credentials is not None:
        return grpc.aio.secure_channel(
            target_of(target), credentials, options=list(chosen.items()), interceptors=client_interceptors()
        )
    return grpc.aio.insecure_channel(
        target_of(target), options=list(chosen.items()), interceptors=client_interceptors()
    )
