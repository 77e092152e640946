"""What servers count, for Prometheus: one table, and nothing is counted that is not in it.

A metric is of one of two makes. What happens is counted where it happens: a counter, a histogram, or a gauge that is
set. What there is, is read when somebody asks (`Reading`), from attributes that a server keeps anyway: that costs plays
and queries nothing. It is read on the thread of the scrape, so a source looks at single attributes, and at what can be
copied in one step of the interpreter.

The values of a label come from a closed set, never from a caller: whoever calls could make series without end. Where
an alert asks whether a counter grows, its owner makes all of its series at the start: of one that begins at 1
Prometheus sees no growth.

docs/metrics.md has the same table; a test holds the two against each other.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from topk_grpc.errors import AddressInUseError, SettingError

REGISTRY: Final = CollectorRegistry()
"""All metrics, of this process. `serve` answers those of the server's role."""

_GATEWAY: Final = ("gateway",)
_SHARD: Final = ("shard",)
_CONTROLLER: Final = ("controller",)
_BOTH: Final = ("gateway", "shard")
_EVERY: Final = ("gateway", "shard", "controller")

# Upper bounds of the buckets of histograms; beyond the last one there is +Inf.
_CALL_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0)
_DISK_SECONDS: Final = (
    0.0001,
    0.00025,
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    10.0,
)
_SNAPSHOT_SECONDS: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_REQUESTS: Final = tuple(float(1 << power) for power in range(9))
_BYTES: Final = tuple(float(1 << power) for power in range(10, 25, 2))


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the table.

    Attributes:
        servers: the roles that have it.
        name: as Prometheus has it; a histogram adds `_bucket`, `_sum` and `_count`.
        kind: `counter`, `gauge` or `histogram`.
        unit: of the value.
        labels: their names.
        help: what it says.
    """

    servers: tuple[str, ...]
    name: str
    kind: str
    unit: str
    labels: tuple[str, ...]
    help: str


class Reading(Collector):
    """A counter or gauge that is read when it is scraped; without a value until there is something to read it from."""

    def __init__(self, row: Metric) -> None:
        self._row = row
        self._source: Callable[[], float | Mapping[str, float] | None] | None = None

    def read_from(self, source: Callable[[], float | Mapping[str, float] | None]) -> None:
        """Reads from here on.

        Args:
            source: the value now, None where it cannot be told; of a metric with a label the value for each of the
                label's. Called on the thread of a scrape, while the server's own threads run.
        """
        self._source = source

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """The metric as it is now."""
        row = self._row
        kind = CounterMetricFamily if row.kind == "counter" else GaugeMetricFamily
        family = kind(row.name, row.help, labels=row.labels)
        value = None if self._source is None else self._source()
        if isinstance(value, Mapping):
            for label, one in value.items():
                family.add_metric((label,), one)
        elif value is not None:
            family.add_metric((), value)
        return [family]


TABLE: Final[list[Metric]] = []
"""All metrics, in the order of declaration."""

_COLLECTORS: Final[dict[str, Collector]] = {}


def _declare(row: Metric, collector: Collector) -> None:
    TABLE.append(row)
    _COLLECTORS[row.name] = collector
    REGISTRY.register(collector)


def _counter(servers: tuple[str, ...], name: str, unit: str, labels: tuple[str, ...], text: str) -> Counter:
    metric = Counter(name, text, labels, registry=None)
    _declare(Metric(servers, name, "counter", unit, labels, text), metric)
    return metric


def _gauge(servers: tuple[str, ...], name: str, unit: str, labels: tuple[str, ...], text: str) -> Gauge:
    metric = Gauge(name, text, labels, registry=None)
    _declare(Metric(servers, name, "gauge", unit, labels, text), metric)
    return metric


def _histogram(  # noqa: PLR0917
    servers: tuple[str, ...], name: str, unit: str, labels: tuple[str, ...], buckets: tuple[float, ...], text: str
) -> Histogram:
    metric = Histogram(name, text, labels, registry=None, buckets=buckets)
    _declare(Metric(servers, name, "histogram", unit, labels, text), metric)
    return metric


def _reading(servers: tuple[str, ...], name: str, unit: str, labels: tuple[str, ...], text: str) -> Reading:
    row = Metric(servers, name, "counter" if name.endswith("_total") else "gauge", unit, labels, text)
    metric = Reading(row)
    _declare(row, metric)
    return metric


# fmt: off
# Of every server.
SERVER_INFO: Final = _gauge(_EVERY, "topk_server_info", "1", ("role", "name", "version", "kernels"), "1, with the server's role, a shard's name, the release, and whether its kernels are compiled or uncompiled.")
READY: Final = _gauge(_EVERY, "topk_ready", "0 or 1", (), "1 while the server wants calls, as health says it; 0 while it starts, recovers or stops.")
CALLS_FAILED: Final = _counter(_EVERY, "topk_calls_failed_total", "calls", ("reason",), "Calls and streams that ended with an error, by the reason of the status (docs/api.md).")
TOPOLOGY_STORE_AWAY: Final = _gauge(_EVERY, "topk_topology_store_away", "0 or 1", (), "1 while etcd does not answer: the last topology stays in use, and changes of it wait.")
TOPOLOGY_EPOCH: Final = _gauge(_BOTH, "topk_topology_epoch", "epochs", (), "The epoch of the newest topology that the server has seen.")
CALLS_ADMITTED: Final = _counter(_BOTH, "topk_calls_admitted_total", "calls", ("role",), "Calls let in, by the role that the method needs: ingest, query, admin, cluster (a gateway's, at a shard), any (every valid token will do), open (health).")
CALLS_REFUSED: Final = _counter(_BOTH, "topk_calls_refused_total", "calls", ("reason",), "Calls refused for who makes them, and streams ended for it, by the reason of the status: TOKEN_MISSING, TOKEN_UNKNOWN, TOKEN_EXPIRED, PERMISSION_DENIED, FOREIGN_CALLER; and RecordPlays over its rate: RATE_LIMITED.")
TLS_HANDSHAKES_FAILED: Final = _counter(_EVERY, "topk_tls_handshakes_failed_total", "handshakes", ("reason",), "Connections that ended in the TLS handshake, by reason: no_client_certificate, expired_certificate, foreign_certificate, invalid_certificate, not_tls, refused_by_peer, other.")
# Of gateways: plays.
BATCHES_RECEIVED: Final = _counter(_GATEWAY, "topk_batches_received_total", "batches", (), "Batches that could be read.")
BATCHES_DUPLICATE: Final = _counter(_GATEWAY, "topk_batches_duplicate_total", "batches", (), "Batches of which something had been counted before: resends.")
PLAYS_RECEIVED: Final = _counter(_GATEWAY, "topk_plays_received_total", "plays", (), "Plays of the batches that could be read. Those that are neither accepted, rejected nor duplicate are under way or have failed.")
PLAYS_ACCEPTED: Final = _counter(_GATEWAY, "topk_plays_accepted_total", "plays", (), "Plays that were acknowledged as counted, duplicate batches aside.")
PLAYS_REJECTED: Final = _counter(_GATEWAY, "topk_plays_rejected_total", "plays", ("reason",), "Plays that were rejected, duplicate batches aside, by reason (docs/api.md).")
PLAYS_DUPLICATE: Final = _counter(_GATEWAY, "topk_plays_duplicate_total", "plays", (), "Plays of the duplicate batches.")
PLAYS_COMBINED: Final = _counter(_GATEWAY, "topk_plays_combined_total", "plays", (), "Plays that travelled to their shard as part of an equal one.")
ACK_SECONDS: Final = _histogram(_GATEWAY, "topk_ack_seconds", "s", (), _CALL_SECONDS, "From a batch in hand to its acknowledgement, the wait for its rate aside.")
BATCHES_DELAYED: Final = _counter(_GATEWAY, "topk_batches_delayed_total", "batches", ("limit",), "Batches on streams that waited for their rate, by whose it is: producer, token.")
PLAYS_DELAYED: Final = _counter(_GATEWAY, "topk_plays_delayed_total", "plays", ("limit",), "Plays of these batches.")
DELAY_SECONDS: Final = _counter(_GATEWAY, "topk_rate_delay_seconds_total", "s", ("limit",), "How long these batches waited.")
# Of gateways: queries.
QUERY_SECONDS: Final = _histogram(_GATEWAY, "topk_query_seconds", "s", ("window",), _CALL_SECONDS, "From a query to its answer, GetTopK, GetSongs and evaluations for watchers alike, by the kind of the window: global, tumbling, sliding, session, range.")
QUERIES_PARTIAL: Final = _counter(_GATEWAY, "topk_queries_partial_total", "queries", (), "Queries that were answered without some shards, as their callers allowed.")
WATCHERS: Final = _reading(_GATEWAY, "topk_watchers", "streams", (), "Streams that watch.")
WATCHED_QUERIES: Final = _reading(_GATEWAY, "topk_watched_queries", "queries", (), "Different queries that they watch.")
SHARD_QUERY_MESSAGES: Final = _counter(_GATEWAY, "topk_shard_query_messages_total", "messages", ("method",), "Messages between a gateway and its shards for queries, in both directions, by the shards' method.")
SHARD_QUERY_BYTES: Final = _counter(_GATEWAY, "topk_shard_query_bytes_total", "bytes", ("method",), "Bytes of these messages, as protobuf.")
# Of gateways: their shards, and who calls.
SHARDS: Final = _reading(_GATEWAY, "topk_shards", "shards", (), "Shards of the topology that have ever started.")
SHARD_UNANSWERED: Final = _counter(_GATEWAY, "topk_shard_unanswered_total", "calls", ("shard",), "Queries that a shard did not answer, and streams of plays to it that broke.")
SHARD_PENDING_BYTES: Final = _reading(_GATEWAY, "topk_shard_pending_bytes", "bytes", ("shard",), "Plays that wait here for a shard.")
SHARD_PENDING_BYTES_MAX: Final = _reading(_GATEWAY, "topk_shard_pending_bytes_max", "bytes", (), "How much may wait for one shard (--pending-bytes-max); then clients' streams do.")
TOKENS: Final = _gauge(_GATEWAY, "topk_tokens", "tokens", (), "Tokens in the tokens file as it was read last, expired ones included.")
TOKENS_FILE_FAILED: Final = _gauge(_GATEWAY, "topk_tokens_file_failed", "0 or 1", (), "1 while the tokens file cannot be used and the tokens before stay in force.")
# Of shards: plays.
GROUP_REQUESTS: Final = _histogram(_SHARD, "topk_group_requests", "requests", (), _REQUESTS, "Requests that shared one fdatasync.")
GROUP_BYTES: Final = _histogram(_SHARD, "topk_group_bytes", "bytes", (), _BYTES, "Bytes of these requests.")
FDATASYNC_SECONDS: Final = _histogram(_SHARD, "topk_fdatasync_seconds", "s", (), _DISK_SECONDS, "How long an fdatasync of the log took.")
APPLY_SECONDS: Final = _histogram(_SHARD, "topk_apply_seconds", "s", (), _DISK_SECONDS, "How long a group took to be counted, short queries that were answered meanwhile included.")
QUEUE_REQUESTS: Final = _reading(_SHARD, "topk_queue_requests", "requests", (), "Requests that wait for a group.")
QUEUE_REQUESTS_MAX: Final = _reading(_SHARD, "topk_queue_requests_max", "requests", (), "How many may (--queue-requests-max); then gateways wait.")
LATE_PLAYS: Final = _reading(_SHARD, "topk_late_plays_total", "plays", (), "Plays, each with its count, of more than 5 min before the newest one on the shard: windows that were answered as final change by them.")
# Of shards: state.
ENTRIES: Final = _reading(_SHARD, "topk_entries", "entries", (), "(chart, song) pairs that are known, the global chart included.")
SONGS: Final = _reading(_SHARD, "topk_songs", "songs", (), "Songs that are known.")
CHARTS: Final = _reading(_SHARD, "topk_charts", "charts", (), "Charts that are known, besides the global one.")
MEMORY_BYTES: Final = _reading(_SHARD, "topk_memory_bytes", "bytes", ("part",), "The state in memory, by part: names (of songs and charts), pairs (which entries charts have), rows (counts and places), heaps, sessions, cells (those that are in no block yet), producers (with their marks), images (of slots that come).")
MEMORY_BYTES_MAX: Final = _reading(_SHARD, "topk_memory_bytes_max", "bytes", (), "Its budget (--memory-bytes-max); 0: none.")
STANDING_WINDOWS: Final = _reading(_SHARD, "topk_standing_windows", "windows", (), "Windows that stand.")
SLIDES: Final = _reading(_SHARD, "topk_slides_total", "moves", (), "Moves of standing windows to other bounds.")
HEAP_REBUILDS: Final = _reading(_SHARD, "topk_heap_rebuilds_total", "heaps", (), "Heaps that were filled anew for a query, since counts had fallen too far.")
SCANS: Final = _reading(_SHARD, "topk_scans", "queries", (), "Scanning queries that wait or run.")
SCANS_MAX: Final = _reading(_SHARD, "topk_scans_max", "queries", (), "How many may (--scan-queue-max); one more is refused.")
SLOTS_OWNED: Final = _reading(_SHARD, "topk_slots_owned", "slots", (), "Slots that the shard takes plays of.")
# Of shards: disk.
LOG_BYTES: Final = _reading(_SHARD, "topk_log_bytes", "bytes", (), "The log that is kept.")
SNAPSHOT_LOG_BYTES: Final = _reading(_SHARD, "topk_snapshot_log_bytes", "bytes", (), "The log since the last snapshot: what a start would replay.")
SNAPSHOT_LOG_BYTES_MAX: Final = _reading(_SHARD, "topk_snapshot_log_bytes_max", "bytes", (), "How much of it brings about a snapshot (--snapshot-log-bytes).")
SNAPSHOT_AGE_SECONDS: Final = _reading(_SHARD, "topk_snapshot_age_seconds", "s", (), "Time since the last snapshot was taken, or since the start while there was none.")
SNAPSHOT_AGE_SECONDS_MAX: Final = _reading(_SHARD, "topk_snapshot_age_seconds_max", "s", (), "The age that brings about a snapshot where the log has grown (--snapshot-seconds).")
SNAPSHOT_SECONDS: Final = _histogram(_SHARD, "topk_snapshot_seconds", "s", (), _SNAPSHOT_SECONDS, "How long a snapshot took.")
SNAPSHOTS_FAILED: Final = _counter(_SHARD, "topk_snapshots_failed_total", "snapshots", (), "Snapshots that could not be taken; those before stand.")
DISK_FREE_BYTES: Final = _reading(_SHARD, "topk_disk_free_bytes", "bytes", (), "Room on the file system of the data directory.")
DISK_BYTES: Final = _reading(_SHARD, "topk_disk_bytes", "bytes", (), "The size of that file system.")
RECOVERING: Final = _gauge(_SHARD, "topk_recovering", "0 or 1", (), "1 while the shard reads snapshot and log at its start.")
RECOVERY_RATIO: Final = _reading(_SHARD, "topk_recovery_ratio", "0 to 1", (), "How much of the log has been replayed, its last segment taken for full; 1 when that has ended.")
RECOVERY_SECONDS: Final = _gauge(_SHARD, "topk_recovery_seconds", "s", (), "How long recovery took at this start.")
# Of controllers.
CONTROLLER_ACTIVE: Final = _gauge(_CONTROLLER, "topk_controller_active", "0 or 1", (), "1 at the controller that plans and moves now; 0 at those that stand by.")
MIGRATIONS: Final = _counter(_CONTROLLER, "topk_migrations_total", "migrations", ("outcome",), "Migrations that this controller has seen decided, by outcome: committed, aborted.")
SLOTS_MOVED: Final = _counter(_CONTROLLER, "topk_slots_moved_total", "slots", (), "Slots that this controller has moved.")
SLOTS_LEFT: Final = _gauge(_CONTROLLER, "topk_slots_left", "slots", (), "Slots that have yet to move until the plan is reached, as the active controller saw it last.")
LONGEST_STALL_SECONDS: Final = _gauge(_CONTROLLER, "topk_longest_stall_seconds", "s", (), "The longest that plays of a slot had to wait for one move of this controller's, aborted ones included.")
# fmt: on


def serve(host: str, port: int, role: str) -> None:
    """Serves /metrics from a thread of its own, until the process ends.

    Args:
        host: to listen on.
        port: above 0.
        role: of the server: metrics of others are left out.

    Raises:
        AddressInUseError: another process listens there.
        SettingError: it cannot be listened on.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]  # when each series was made: as many series again, and nobody asks
    own = CollectorRegistry()
    for row in TABLE:
        if role in row.servers:
            own.register(_COLLECTORS[row.name])
    try:
        start_http_server(port, host, own)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError(
                f"port {port} of {host} is in use by another process: stop that one, or choose another --metrics-port"
            ) from error
        raise SettingError(f"--metrics-port is {port}, which cannot be listened on: {error.strerror}") from error
    ProcessCollector(registry=own)
