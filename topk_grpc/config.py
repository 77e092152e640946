"""Settings of each role: every one with its unit, default and consequence.

A setting's flag is its name with dashes (`--listen`), its environment variable is `TOPK_` and its name in capitals
(`TOPK_LISTEN`). The command line is made from these tables, and docs/settings.md is checked against them.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from topk_grpc.errors import SettingError

_KEY = "topk_setting"


@dataclass(frozen=True, slots=True)
class SettingInfo:
    """What is known of one setting.

    Attributes:
        name: the field's name; flag and environment variable follow from it.
        kind: str, int, float or bool.
        default: what holds if nobody says anything; None if it must be given.
        unit: of the value, empty where it has none.
        help: what it does, and what happens when it is set too low or too high.
        low: the least value allowed.
        high: the largest value allowed.
    """

    name: str
    kind: type
    default: Any
    unit: str
    help: str
    low: float | None = None
    high: float | None = None

    @property
    def flag(self) -> str:
        """The command-line flag."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "TOPK_" + self.name.upper()


def setting(default: Any, unit: str, text: str, low: float | None = None, high: float | None = None) -> Any:
    """Declares a field of a settings class. `default` ... means that it must be given."""
    info = {"unit": unit, "help": text, "low": low, "high": high}
    if default is ...:
        return dataclasses.field(metadata={_KEY: info})
    return dataclasses.field(default=default, metadata={_KEY: info})


def describe(settings_class: type) -> Iterator[SettingInfo]:
    """All settings of a role, in the order of declaration."""
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    for field in dataclasses.fields(settings_class):
        default = None if field.default is dataclasses.MISSING else field.default
        yield SettingInfo(field.name, kinds[str(field.type)], default, **field.metadata[_KEY])


class _Checked:
    """Checks the ranges that the fields declare."""

    def __post_init__(self) -> None:
        for info in describe(type(self)):
            value = getattr(self, info.name)
            below = info.low is not None and value < info.low
            above = info.high is not None and value > info.high
            if below or above:
                unit = f" {info.unit}" if info.unit else ""
                low = "-∞" if info.low is None else f"{info.low:g}"
                high = "∞" if info.high is None else f"{info.high:g}"
                raise SettingError(
                    f"{info.flag} is {value}{unit}: it has to lie in {low} to {high} (environment: {info.variable})"
                )


def is_loopback(host: str) -> bool:
    """Whether a host, as it is written, is this machine alone. No name but `localhost` is taken for it."""
    bare = host.removeprefix("[").removesuffix("]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def check_exposure(listen: str, *, tls: bool, plaintext: bool, flag: str = "--listen") -> None:
    """Refuses to serve other machines in plaintext, unless that was said.

    Raises:
        SettingError: it was not.
    """
    host = listen.rpartition(":")[0]
    if not (tls or plaintext or is_loopback(host)):
        raise SettingError(
            f"{flag} is {listen}, which other machines can reach, in plaintext: give --tls-cert and --tls-key, or say"
            " --plaintext (environment: TOPK_PLAINTEXT) where the network or a proxy in front keeps others out"
        )


# fmt: off
# One line a setting: they are tables.


@dataclass(frozen=True, kw_only=True)
class StoreSettings(_Checked):
    """The way to a cluster's topology."""

    topology: str = setting(..., "", "Where the cluster's topology is kept: file:PATH on one machine, etcd://HOST:PORT[,HOST:PORT…]/PREFIX for several. All roles of a cluster name the same.")
    etcd_ca: str = setting("", "path", "A PEM file with the CA of etcd's certificates. With it, or with --etcd-cert, etcd is spoken to in TLS. Read anew when it changes, as the next two are.")
    etcd_cert: str = setting("", "path", "A PEM file with the certificate that is shown to etcd, where it asks for one.")
    etcd_key: str = setting("", "path", "A PEM file with the private key of --etcd-cert, without a passphrase.")
    etcd_user: str = setting("", "", "The user to log in to etcd with; needs --etcd-password-file. Empty: none.")
    etcd_password_file: str = setting("", "path", "A file whose first line is the password of --etcd-user. Read anew at each login; readable by nobody else.")
    plaintext: bool = setting(False, "", "Allow an address that other machines can reach without TLS, and shards and an etcd on other machines: only where the network or a proxy in front keeps others out. Plays, answers, tokens and the cluster's secret can be read on the way.")

    def __post_init__(self) -> None:
        """Checks that what belongs together is given together.

        Raises:
            SettingError: settings contradict each other.
        """
        super().__post_init__()
        if bool(self.etcd_cert) != bool(self.etcd_key):
            raise SettingError("--etcd-cert and --etcd-key belong together: give both, or neither")
        if bool(self.etcd_user) != bool(self.etcd_password_file):
            raise SettingError("--etcd-user and --etcd-password-file belong together: give both, or neither")


@dataclass(frozen=True, kw_only=True)
class LeaveSettings(StoreSettings):
    """What a shard's container is asked with before it is stopped."""

    shard_id: str = setting(..., "", "The shard that is about to be stopped, named as a pod of a StatefulSet: NAME-N.")
    statefulset: str = setting(..., "", "The StatefulSet that it is of. A shard whose number its replicas do not reach any more is going for good: it is drained, and taken out of the cluster. Any other one is back soon: nothing is done.")
    kubernetes_credentials: str = setting("/var/run/secrets/kubernetes.io/serviceaccount", "path", "The directory of the service account that the Kubernetes API is asked with: the files token, ca.crt and namespace. It has to be allowed to get the StatefulSet.")
    kubernetes_wait_seconds: float = setting(30.0, "s", "How long to go on asking a Kubernetes API that does not answer; then nothing is done, and the shard's plays wait on its volume.", 0.1, 3600)


@dataclass(frozen=True, kw_only=True)
class ServerSettings(StoreSettings):
    """What every server has."""

    topology_wait_seconds: float = setting(600.0, "s", "How long a start waits for a topology store that does not answer, and a gateway for a topology that is not there yet, not ready meanwhile; then it fails. A server that runs goes on without the store for as long as it is away.", 0, 86_400 * 7)
    listen: str = setting("127.0.0.1:0", "HOST:PORT", "Where to serve gRPC; port 0 takes a free one. A port in use is an error at once.")
    health_port: int = setting(0, "port", "Also answer grpc.health.v1 alone, in plaintext, on this port of the listen address; 0: only on the main port.", 0, 65535)
    message_bytes_max: int = setting(8 << 20, "bytes", "The largest gRPC message taken; a larger one is refused with RESOURCE_EXHAUSTED. Must fit batch_plays_max plays.", 1 << 16, 1 << 30)
    metrics_port: int = setting(0, "port", "Serve metrics for Prometheus, in plaintext, at /metrics on this port of the listen address; 0: none. `topk up` gives it to the gateway, the next port to the controller, and those after it to the shards.", 0, 65535)
    tracing: bool = setting(False, "", "Send OpenTelemetry's traces of unary calls, by gRPC as OTLP, to where OTEL_EXPORTER_OTLP_ENDPOINT says (http://localhost:4317); all OTEL_… variables of its SDK hold. Needs the extra `tracing`.")
    tls_cert: str = setting("", "path", "A PEM file with this server's certificate and what lies between it and its CA. With it the server speaks TLS. Read anew when it changes.")
    tls_key: str = setting("", "path", "A PEM file with the private key of --tls-cert, without a passphrase.")
    tls_ca: str = setting("", "path", "A PEM file with the CA of the cluster's own certificates. A shard with --tls-cert takes calls only from holders of a certificate signed by it; a gateway then speaks TLS with its shards, and trusts no other CA for them.")
    handshake_seconds: float = setting(10.0, "s", "A connection that has not introduced itself (TLS, HTTP/2) after so long is closed.", 0.1, 3600)
    connection_idle_seconds: float = setting(900.0, "s", "A connection without a call for so long is closed; clients open it again when they need it.", 1, 86_400 * 7)
    drain_seconds: float = setting(10.0, "s", "On SIGTERM: how long streams may take to send the acknowledgements they owe; then they are cut, and clients resend.", 0.1, 600)
    stop_seconds: float = setting(25.0, "s", "On SIGTERM: after this time at the latest the process has ended, with status 0. A shard's last snapshot that takes longer is given up, and its next start replays more of the log. Keep it above drain_seconds, and below the patience of whoever stops the process (30 s in Kubernetes).", 0.1, 3600)
    exit_with_stdin: bool = setting(False, "", "Stop when standard input ends, and print `ready: HOST:PORT` on standard output: `topk up` starts its children so, and none outlives it.")
    log_level: str = setting("info", "", "debug, info, warning or error: the least level of the structured log lines on stderr.")

    def __post_init__(self) -> None:
        """Checks ranges, and what has to fit together.

        Raises:
            SettingError: it does not.
        """
        super().__post_init__()
        if bool(self.tls_cert) != bool(self.tls_key):
            raise SettingError("--tls-cert and --tls-key belong together: give both, or neither")
        check_exposure(self.listen, tls=bool(self.tls_cert), plaintext=self.plaintext)


@dataclass(frozen=True, kw_only=True)
class ShardSettings(ServerSettings):
    """A shard's settings."""

    shard_id: str = setting(..., "", "This shard's stable name in the topology.")
    join: bool = setting(False, "", "Take a place in the cluster if the topology has none for this shard: it begins with nothing, and gets slots by the next plan. Wait for a topology that is not there yet. Without it both are errors: a wrong name, or a wrong --topology, must not make a shard.")
    data_dir: str = setting(..., "path", "The directory that holds this shard's plays. One process at a time; losing it loses the plays.")
    advertise: str = setting("", "HOST:PORT", "The address that gateways are told; empty: the one listened on.")
    heap_size: int = setting(1000, "entries", "The best entries of each chart that are kept in order as plays arrive. A query up to this k costs O(k), a larger one scans all entries.", 1, 10_000)
    group_bytes_max: int = setting(4 << 20, "bytes", "The most bytes of requests that share one fdatasync. More raises throughput on slow disks, and the wait of each.", 1 << 16, 1 << 30)
    queue_requests_max: int = setting(256, "requests", "Requests waiting for a group; then gateways' streams are read no further.", 1, 1 << 16)
    segment_bytes: int = setting(64 << 20, "bytes", "A log segment is closed when it grows beyond this. Smaller ones free disk sooner after a snapshot.", 1 << 16, 1 << 34)
    snapshot_log_bytes: int = setting(512 << 20, "bytes", "Take a snapshot when the log has grown by this much: bounds the time of recovery. Lower costs more disk writes.", 1 << 16, 1 << 40)
    snapshot_seconds: float = setting(3600.0, "s", "Take a snapshot at least this often while plays arrive.", 1, 86_400 * 7)
    memory_bytes_max: int = setting(0, "bytes", "Budget of the state in memory: beyond it new songs are rejected (MEMORY_LIMIT), known ones still count. 0: no limit.", 0)
    charts_max: int = setting(10_000, "charts", "Charts on this shard; a play that names one more is rejected (CHART_LIMIT).", 1, 65_535)
    future_seconds_max: float = setting(300.0, "s", "Plays further ahead of this shard's clock are rejected (IN_FUTURE): one wrong clock must not close everybody's windows.", 0, 86_400 * 366)
    producer_ttl_seconds: float = setting(30 * 86_400.0, "s", "Producers idle for longer are forgotten; a resend of one of their batches is then refused (PRODUCER_EXPIRED).", 60)
    tiers: str = setting("1s:1h,1m:1d,1h:90d,1d:*", "WIDTH:AGE,…", "How fine plays are kept by their age, measured against the newest play: time buckets of each width for its age, then rolled up into the next; * is for good. A window that needs finer buckets than are kept for its time is refused with OUT_OF_RANGE. Longer ages take more disk.")
    standing_windows: str = setting("", "WINDOW,…", "Windows kept up to date from the start, as in tumbling:1h,sliding:10m/1m: a query on one costs O(k), and the buckets it needs are kept for as long as it reaches. Each costs every play a little, and 16 bytes an entry.")
    standing_windows_max: int = setting(8, "windows", "Windows kept up to date at once, those that queries have brought about included; queries on further ones sum time buckets. 0: queries bring about none.", 0, 64)
    standing_idle_seconds: float = setting(3600.0, "s", "A window that a query brought about is let go when nobody has asked for it for so long.", 1, 86_400 * 366)
    frozen_seconds_max: float = setting(5.0, "s", "A shard that has frozen slots to give them away, and has not heard for so long that they have gone, aborts the migration and goes on with them. Must leave time to copy a slot.", 0.1, 3600)
    scan_queue_max: int = setting(64, "queries", "Queries that scan all entries and wait for their turn; one more is refused with RESOURCE_EXHAUSTED.", 1, 10_000)

    def __post_init__(self) -> None:
        """As every server's.

        Raises:
            SettingError: settings contradict each other.
        """
        super().__post_init__()
        if self.tls_cert and not self.tls_ca:
            raise SettingError(
                "--tls-cert is given without --tls-ca: name the CA of the cluster's own certificates, since a shard"
                " takes calls only from its cluster"
            )


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ServerSettings):
    """A gateway's settings."""

    listen: str = setting("127.0.0.1:50050", "HOST:PORT", "Where to serve gRPC; port 0 takes a free one. A port in use is an error at once.")
    tls_client_ca: str = setting("", "path", "A PEM file with the CAs of clients: with it, only clients that show a certificate signed by one of them can connect. Needs --tls-cert.")
    shard_cert: str = setting("", "path", "The certificate shown to shards, where it is another than --tls-cert: one of the cluster's own CA, beside one that the public knows. Empty: --tls-cert.")
    shard_key: str = setting("", "path", "The private key of --shard-cert.")
    tokens_file: str = setting("", "path", "A TOML file with the tokens that clients may use, and their roles (docs/security.md). Read anew when it changes. Empty: no client needs a token.")
    producer_plays_per_second: float = setting(0.0, "plays/s", "The plays that one producer may send a second; beyond it a stream is read no further until there is room, and RecordPlays is refused (RATE_LIMITED). 0: no limit.", 0, 1e12)
    rate_burst_seconds: float = setting(10.0, "s", "What a producer or a token that has been quiet may send at once, in seconds of its rate.", 0.1, 3600)
    song_id_bytes_max: int = setting(128, "bytes", "The longest song_id; longer ones are rejected (SONG_ID_TOO_LONG).", 1, 128)
    charts_per_play_max: int = setting(8, "charts", "The most charts a play may name (TOO_MANY_CHARTS).", 0, 8)
    chart_bytes_max: int = setting(64, "bytes", "The longest chart name (CHART_TOO_LONG).", 1, 64)
    batch_plays_max: int = setting(65_536, "plays", "The most plays of a batch; a larger one is refused with INVALID_ARGUMENT.", 1, 65_536)
    k_max: int = setting(10_000, "entries", "The largest k of a query; a larger one is refused with INVALID_ARGUMENT.", 1, 10_000)
    stream_batches_max: int = setting(32, "batches", "Batches of one stream under way; then it is read no further. At most 63: a producer's marks reach back 64.", 1, 63)
    pending_bytes_max: int = setting(64 << 20, "bytes", "What one gateway holds for one shard that is down or slow; then all streams with plays for it wait.", 1 << 16, 1 << 34)
    part_bytes_max: int = setting(1 << 20, "bytes", "Parts of batches for one shard travel together up to this size: few and large messages.", 1 << 10, 1 << 28)
    record_seconds: float = setting(15.0, "s", "How long a batch may wait for its shards; then its stream ends with DEADLINE_EXCEEDED and the client resends.", 0.1, 3600)
    threshold_entries_max: int = setting(500_000, "entries", "With the partitioner round_robin, where a song's plays are spread over shards: the most songs of one shard that a query looks at, about 150 bytes each; one that would need more is refused with RESOURCE_EXHAUSTED.", 1, 1 << 30)
    query_seconds: float = setting(10.0, "s", "How long a query waits for a shard; then it fails with UNAVAILABLE, or is partial where that was asked for.", 0.1, 3600)
    allowed_lateness_seconds: float = setting(300.0, "s", "An answer is FINAL when the watermark has passed its end by this much.", 0, 86_400 * 366)
    stream_age_seconds: float = setting(1800.0, "s", "Streams end with OK after this time, up to a tenth earlier by chance, so that clients spread over new gateways.", 1, 86_400 * 7)
    stream_idle_seconds: float = setting(300.0, "s", "A StreamPlays on which no batch has come in for so long, or one that does not come to its end, ends with OK; the client opens it again when it has plays.", 0.1, 86_400 * 7)
    drain_delay_seconds: float = setting(0.0, "s", "On SIGTERM: how long the gateway still serves, not ready any more, before it drains. As long as those who send it calls take to hear of that: some 5 s behind a Kubernetes Service, where the grace period of the pod has to hold it and stop_seconds.", 0, 600)
    connection_age_seconds: float = setting(3600.0, "s", "A connection takes no new calls after this time, up to a tenth earlier or later by chance, and is cut when stream_age_seconds more have passed: it bounds calls whose request never comes to its end.", 1, 86_400 * 366)
    watch_interval_seconds: float = setting(0.5, "s", "The pause between two evaluations of a watched query: how old a watcher's list may be. Less costs the shards more queries.", 0.01, 3600)
    watch_k_max: int = setting(1000, "entries", "The largest k of a watch; a larger one is refused with INVALID_ARGUMENT.", 1, 10_000)
    watches_max: int = setting(10_000, "streams", "Streams that watch at this gateway; one more is refused with RESOURCE_EXHAUSTED.", 1, 1_000_000)
    watch_queries_max: int = setting(100, "queries", "Different queries that are watched at this gateway, each evaluated once for all its watchers; one more is refused with RESOURCE_EXHAUSTED.", 1, 10_000)
    watch_linger_seconds: float = setting(30.0, "s", "How long the versions of a query are kept after its last watcher has left; one that comes back later gets the whole list again.", 0, 3600)
    watch_history_entries_max: int = setting(500_000, "entries", "Entries of all versions kept for watchers that come back or read slowly, about 250 bytes each, shared evenly by the queries watched; without their version they get the whole list.", 1, 1 << 30)

    def __post_init__(self) -> None:
        """As every server's.

        Raises:
            SettingError: settings contradict each other.
        """
        super().__post_init__()
        if bool(self.shard_cert) != bool(self.shard_key):
            raise SettingError("--shard-cert and --shard-key belong together: give both, or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise SettingError("--tls-client-ca is given without --tls-cert: clients show certificates only in TLS")
        if self.tls_ca and not (self.shard_cert or self.tls_cert):
            raise SettingError(
                "--tls-ca is given without a certificate to show to shards: give --tls-cert, or --shard-cert"
            )


@dataclass(frozen=True, kw_only=True)
class ControllerSettings(ServerSettings):
    """A controller's settings."""

    message_bytes_max: int = setting(1 << 16, "bytes", "The largest gRPC message taken; a controller answers nothing but health.", 1 << 10, 1 << 30)
    auto_rebalance: bool = setting(True, "", "Plan anew when a shard has joined, or drains. Off: only plans that `topk cluster drain`, `add` and `rebalance` make are carried out.")
    move_share: float = setting(0.3, "", "The part of the time that moving slots may take. More moves sooner; less leaves more of the shards to plays and queries.", 0.01, 1)
    move_slots_max: int = setting(64, "slots", "The most slots that move together. They wait together, too: fewer are taken where that gets long.", 1, 4096)
    move_seconds_max: float = setting(5.0, "s", "A move that has not come so far after this time that its target has everything is aborted: plays of its slots wait meanwhile. Too low for the largest slot, and that one never moves.", 0.1, 600)
    create_shards: int = setting(0, "shards", "Where there is no topology, make one with so many shards, and wait for them to start. 0: wait until somebody else makes one.", 0, 256)
    shard_prefix: str = setting("shard-", "", "The shards of a new topology are named by this and a number from 0, as a Kubernetes StatefulSet names its pods.")
    partitioner: str = setting("ring", "", "How a new cluster places plays: ring; modulo or round_robin for comparison (docs/partitioning.md). Fixed for good when the cluster is made.")
    slots: int = setting(1024, "slots", "How many slots a new cluster has: what moves as one, and so how evenly and in how small steps. Some for each shard it may ever have. Fixed for good when the cluster is made.", 1, 16_384)

    def __post_init__(self) -> None:
        """As every server's.

        Raises:
            SettingError: settings contradict each other.
        """
        super().__post_init__()
        if self.tls_ca and not self.tls_cert:
            raise SettingError(
                "--tls-ca is given without a certificate to show to shards: give --tls-cert and --tls-key"
            )
