"""What servers count, for Prometheus: one table, and nothing is counted that is not in it.

The values of a label come from a closed set, never from a caller: whoever calls could make series without end.
docs/metrics.md has the same table; a test holds the two against each other.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, start_http_server

from topk_grpc.errors import AddressInUseError, SettingError

REGISTRY: Final = CollectorRegistry()
"""Of this process; what the operating system says of it is in it too (`process_…`)."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table.

    Attributes:
        name: as Prometheus has it.
        kind: `counter` or `gauge`.
        unit: of the value.
        labels: their names.
        help: what it says.
    """

    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    help: str


TABLE: Final[list[Metric]] = []
"""All metrics, in the order of declaration."""


def _counter(name: str, unit: str, labels: tuple[str, ...], text: str) -> Counter:
    TABLE.append(Metric(name, "counter", unit, labels, text))
    return Counter(name, text, labels, registry=REGISTRY)


def _gauge(name: str, unit: str, labels: tuple[str, ...], text: str) -> Gauge:
    TABLE.append(Metric(name, "gauge", unit, labels, text))
    return Gauge(name, text, labels, registry=REGISTRY)


# fmt: off
CALLS_ADMITTED: Final = _counter("topk_calls_admitted_total", "calls", ("role",), "Calls let in, by the role that the method needs: ingest, query, admin, cluster (a gateway's, at a shard), any (every valid token will do), open (health).")
CALLS_REFUSED: Final = _counter("topk_calls_refused_total", "calls", ("reason",), "Calls refused for who makes them, and streams ended for it, by the reason of the status: TOKEN_MISSING, TOKEN_UNKNOWN, TOKEN_EXPIRED, PERMISSION_DENIED, FOREIGN_CALLER; and RecordPlays over its rate: RATE_LIMITED.")
TLS_HANDSHAKES_FAILED: Final = _counter("topk_tls_handshakes_failed_total", "handshakes", ("reason",), "Connections that ended in the TLS handshake, by reason: no_client_certificate, expired_certificate, foreign_certificate, invalid_certificate, not_tls, refused_by_peer, other.")
BATCHES_DELAYED: Final = _counter("topk_batches_delayed_total", "batches", ("limit",), "Batches on streams that waited for their rate, by whose it is: producer, token.")
PLAYS_DELAYED: Final = _counter("topk_plays_delayed_total", "plays", ("limit",), "Plays of these batches.")
DELAY_SECONDS: Final = _counter("topk_rate_delay_seconds_total", "s", ("limit",), "How long these batches waited.")
TOKENS: Final = _gauge("topk_tokens", "tokens", (), "Tokens in the tokens file as it was read last, expired ones included.")
TOKENS_FILE_FAILED: Final = _gauge("topk_tokens_file_failed", "0 or 1", (), "1 while the tokens file cannot be used and the tokens before stay in force.")
TOPOLOGY_STORE_AWAY: Final = _gauge("topk_topology_store_away", "0 or 1", (), "1 while etcd does not answer: the last topology stays in use, and changes of it wait.")
CONTROLLER_ACTIVE: Final = _gauge("topk_controller_active", "0 or 1", (), "1 at the controller that plans and moves now; 0 at those that stand by.")
MIGRATIONS: Final = _counter("topk_migrations_total", "migrations", ("outcome",), "Migrations that this controller has seen decided, by outcome: committed, aborted.")
SLOTS_MOVED: Final = _counter("topk_slots_moved_total", "slots", (), "Slots that this controller has moved.")
SLOTS_LEFT: Final = _gauge("topk_slots_left", "slots", (), "Slots that have yet to move until the plan is reached, as the active controller saw it last.")
LONGEST_STALL_SECONDS: Final = _gauge("topk_longest_stall_seconds", "s", (), "The longest that plays of a slot had to wait for one move of this controller's, aborted ones included.")
SHARD_QUERY_MESSAGES: Final = _counter("topk_shard_query_messages_total", "messages", ("method",), "Messages between a gateway and its shards for queries, in both directions, by the shards' method.")
SHARD_QUERY_BYTES: Final = _counter("topk_shard_query_bytes_total", "bytes", ("method",), "Bytes of these messages, as protobuf.")
# fmt: on


def serve(host: str, port: int) -> None:
    """Serves /metrics from a thread of its own, until the process ends.

    Args:
        host: to listen on.
        port: above 0.

    Raises:
        AddressInUseError: another process listens there.
        SettingError: it cannot be listened on.
    """
    try:
        start_http_server(port, host, REGISTRY)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(
                f"port {port} of {host} is in use by another process: stop that one, or choose another --metrics-port"
            ) from error
        raise SettingError(f"--metrics-port is {port}, which cannot be listened on: {error.strerror}") from error
    ProcessCollector(registry=REGISTRY)
