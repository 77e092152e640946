"""The command `topk`: what can be said on the command line. Each command's work stands in a module of its own.

Those modules are imported when their command runs, so that `topk top` does not wait for what only `topk ingest` needs.
Exit status: 0 it worked, 1 it failed, 2 the command line is wrong; of a server also 3: starting it again cannot help. A
user's mistake is one line on stderr, `error: …`; TOPK_DEBUG=1 adds the traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from topk_grpc._version import VERSION
from topk_grpc.cli import settings
from topk_grpc.cli.failures import fail
from topk_grpc.cli.reach import Reach, with_reach
from topk_grpc.config import ControllerSettings, GatewaySettings, LeaveSettings, ShardSettings
from topk_grpc.errors import TopKError

app: Final = typer.Typer(
    name="topk",
    help="Exact, windowed top-K over a stream of plays, served by a gRPC cluster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cluster_app: Final = typer.Typer(help="The cluster itself.", no_args_is_help=True)
app.add_typer(cluster_app, name="cluster")
token_app: Final = typer.Typer(help="Tokens, which clients show to gateways.", no_args_is_help=True)
app.add_typer(token_app, name="token")


class Partitioner(StrEnum):
    """The names of ring/partitioners.py, which is not imported for them: it takes its time."""

    RING = "ring"
    MODULO = "modulo"
    ROUND_ROBIN = "round_robin"


SLOTS_MAX: Final = 16_384
UNREACHED: Final = Reach()  # stands in the signatures; `with_reach` gives the real one
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs instead of a table.")]
Window = Annotated[
    str,
    typer.Option(
        "--window",
        "-w",
        # What stands in brackets would be taken for markup.
        help=r"global, tumbling:SIZE\[@OFFSET] (tumbling:1d, tumbling:7d@4d), sliding:SIZE\[/SLIDE] (sliding:10m/1m, "
        "sliding:10m), session:GAP (session:15m) or range:START..END.",
    ),
]
Chart = Annotated[str, typer.Option(help="The chart to rank in; the global one if not given.")]
AsOf = Annotated[
    str,
    typer.Option(
        "--as-of",
        metavar="T",
        help="The instant the window is taken at: ISO 8601 (no offset: UTC), epoch milliseconds, or latest (the newest "
        "play). Default: now.",
    ),
]
AllowPartial = Annotated[bool, typer.Option(help="Answer without the shards that are down, instead of failing.")]


def _print_version(asked: bool) -> None:
    if asked:
        from topk_grpc import kernels

        print(f"topk-grpc {VERSION}, {'compiled' if kernels.compiled() else 'pure Python'} kernels")  # noqa: T201
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Exact, windowed top-K over a stream of plays, served by a gRPC cluster."""


# --- Servers ----------------------------------------------------------------------------------------------------------


@app.command("up")
@settings.with_tunables
def up(  # noqa: PLR0917  # typer makes options of them
    data_dir: Annotated[
        Path, typer.Option(envvar="TOPK_DATA_DIR", help="Where the plays are kept; made if it does not exist.")
    ],
    shards: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Shard processes. Default: as the data directory has, or 2 in a new one."),
    ] = None,
    partitioner: Annotated[
        Partitioner | None,
        typer.Option(
            envvar="TOPK_PARTITIONER",
            help="How a new cluster places plays; fixed from then on. ring is for production, the others are what it "
            "is compared with. Default: as the data directory has, or ring in a new one.",
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            envvar="TOPK_SLOTS",
            min=1,
            max=SLOTS_MAX,
            help="How many slots a new cluster has, which bounds its shards; fixed from then on. Default: as the data "
            "directory has, or 1024 in a new one.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The gateway's port; 0 takes a free one.")] = 50050,
    host: Annotated[
        str, typer.Option(help="The address the gateway listens on. Others than this machine's own need TLS.")
    ] = "127.0.0.1",
    metrics_port: Annotated[
        int,
        typer.Option(
            envvar="TOPK_METRICS_PORT",
            min=0,
            max=65_000,
            help="Serve the gateway's metrics here, the controller's on the next port, and the shards' on those after "
            "it, in their order; 0: nowhere.",
        ),
    ] = 0,
    environment: Any = None,
) -> None:
    """Run a whole cluster on this machine: processes of shards, a gateway and a controller, restarted if they die.

    Prints `ready: HOST:PORT` when every shard answers. Ctrl-C stops it; the plays are kept. `topk cluster add` makes it
    grow while it runs, and so does a larger --shards at the next start.
    """
    from topk_grpc.cli.up import run

    run(
        data_dir,
        shards=shards,
        partitioner=partitioner.value if partitioner else None,
        slots=slots,
        host=host,
        port=port,
        metrics_port=metrics_port,
        environment=environment,
    )


def _run_shard(role: ShardSettings) -> None:
    """Run one shard: the part of the songs that it owns, on disk and in memory."""
    from topk_grpc.cli.serve import run_shard

    run_shard(role)


def _run_gateway(role: GatewaySettings) -> None:
    """Run one gateway: takes plays and queries for all shards. Stateless; run as many as you like."""
    from topk_grpc.cli.serve import run_gateway

    run_gateway(role)


def _run_controller(role: ControllerSettings) -> None:
    """Run a controller: has slots moved when shards join or drain. Of several one works, the others stand by."""
    from topk_grpc.cli.serve import run_controller

    run_controller(role)


def _run_leave(role: LeaveSettings) -> None:
    """Drain a shard and take it out, if Kubernetes stops its pod for good; for a shard's preStop hook."""
    from topk_grpc.cli.leave import run_leave

    run_leave(role)


app.command("shard")(settings.command_from(ShardSettings, _run_shard))
app.command("gateway")(settings.command_from(GatewaySettings, _run_gateway))
app.command("controller")(settings.command_from(ControllerSettings, _run_controller))
app.command("leave")(settings.command_from(LeaveSettings, _run_leave))


# --- Plays in ---------------------------------------------------------------------------------------------------------


@app.command()
@with_reach
def ingest(  # noqa: PLR0917  # typer makes options of them
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE…", help="CSV, NDJSON or Parquet, also .gz or .zst; - is standard input."),
    ],
    song: Annotated[list[str], typer.Option(metavar="COLUMN", help="The song; several are joined with ' - '.")],
    time: Annotated[
        str, typer.Option(metavar="COLUMN", help="When it was played: ISO 8601 (no offset: UTC), or a number.")
    ],
    chart: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="A chart to count the play in besides the global one.")
    ] = None,
    count: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="How many plays a row stands for; below 0 it takes plays back."),
    ] = None,
    time_unit: Annotated[
        str,
        typer.Option(metavar="auto|s|ms|us|ns", help="The unit of times that are numbers; auto goes by their size."),
    ] = "auto",
    file_format: Annotated[
        str, typer.Option("--format", metavar="auto|csv|ndjson|parquet", help="auto goes by name and content.")
    ] = "auto",
    delimiter: Annotated[str, typer.Option(help="Between the cells of a CSV; default: a comma, a tab in .tsv.")] = "",
    producer_id: Annotated[
        str | None,
        typer.Option(
            help="For standard input: a name of this stream. The same one with the same rows from the start resumes it."
        ),
    ] = None,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Leave out rows that cannot be read, instead of stopping before anything is sent."
        ),
    ] = False,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Load plays from files. The same file again counts once, so after any failure just run it again.

    A file is looked through before its first row is sent: if a cell cannot be read, nothing of it was counted.
    """
    from topk_grpc.cli.ingest import Request, run
    from topk_grpc.cli.mapping import Mapping

    mapping = Mapping(tuple(song), time, chart, count, time_unit)
    run(Request(tuple(files), mapping, file_format, delimiter, producer_id, skip_bad, gateway, json))


# --- Answers out ------------------------------------------------------------------------------------------------------


@app.command()
@with_reach
def top(  # noqa: PLR0917  # typer makes options of them
    window: Window = "global",
    k: Annotated[int, typer.Option("-k", "--k", help="How many songs, 1 to 10,000.")] = 10,
    chart: Chart = "",
    as_of: AsOf = "",
    history: Annotated[
        bool,
        typer.Option(
            "--history",
            help="For a tumbling window: each song's rank in the pane before, its peak, and on "
            "how many panes' charts it was.",
        ),
    ] = False,
    history_panes: Annotated[
        int | None,
        typer.Option(help="How many panes --history looks at, 2 to 520.", show_default="52"),
    ] = None,
    allow_partial: AllowPartial = False,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Show the k songs with the most plays in a window, exactly."""
    from topk_grpc.cli.queries import Query, run_top

    if history_panes is None:
        history_panes = 52 if history else 0
    run_top(Query(window, chart, as_of, allow_partial, gateway, json), k, history_panes)


@app.command()
@with_reach
def rank(  # noqa: PLR0917  # typer makes options of them
    songs: Annotated[list[str], typer.Argument(metavar="SONG…", help="1 to 100 songs.")],
    window: Window = "global",
    neighbours: Annotated[
        int, typer.Option("--neighbours", "-n", help="Songs to show above and below each, 0 to 100.")
    ] = 0,
    chart: Chart = "",
    as_of: AsOf = "",
    allow_partial: AllowPartial = False,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Show count and rank of given songs."""
    from topk_grpc.cli.queries import Query, run_rank

    run_rank(Query(window, chart, as_of, allow_partial, gateway, json), songs, neighbours)


@app.command()
@with_reach
def watch(  # noqa: PLR0917  # typer makes options of them
    window: Window = "global",
    k: Annotated[int, typer.Option("-k", "--k", help="How many songs, 1 to 1,000.")] = 10,
    chart: Chart = "",
    latest: Annotated[
        bool, typer.Option("--latest", help="Take the window at the newest play instead of the gateway's clock.")
    ] = False,
    updates: Annotated[int, typer.Option(min=0, help="End after so many updates, for scripts; 0: never.")] = 0,
    allow_partial: AllowPartial = False,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Watch the k songs with the most plays in a window. Ctrl-C ends it.

    On a terminal a table with movement; elsewhere a line for each change. It outlives gateways that come and go.
    """
    from topk_grpc.cli.watch import Request, run

    run(Request(window, k, chart, latest, allow_partial, gateway, json, updates))


@app.command()
@with_reach
def charts(gateway: Reach = UNREACHED, json: Json = False) -> None:
    """List the charts with their totals."""
    from topk_grpc.cli.queries import run_charts

    run_charts(gateway, json)


# --- The cluster ------------------------------------------------------------------------------------------------------

Wait = Annotated[
    bool, typer.Option("--wait/--no-wait", help="Watch until the slots have moved. Ctrl-C ends that, not the moves.")
]


@cluster_app.command()
@with_reach
def status(gateway: Reach = UNREACHED, json: Json = False) -> None:
    """Show the shards: where they are, what they own and hold, and what moves between them."""
    from topk_grpc.cli.status import run_status

    run_status(gateway, json)


@cluster_app.command("add")
@with_reach
def add_shards(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SHARD…]", help="Names of the new shards.", show_default=False)
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="How many to add instead, named shard-N.", show_default="1 without names"),
    ] = None,
    wait: Wait = True,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Add shards to the running cluster: they get their share of the slots as soon as they have started.

    `topk up` starts their processes by itself; elsewhere start `topk shard` under these names. A shard that drains is
    kept after all.
    """
    from topk_grpc.cli.cluster import run_add

    if names and shards is not None:
        raise typer.BadParameter("names are given and --shards too: give one of them")
    run_add(names or [], 0 if names else shards or 1, gateway, wait=wait, as_json=json)


@cluster_app.command("drain")
@with_reach
def drain_shards(
    names: Annotated[list[str], typer.Argument(metavar="SHARD…", help="The shards to empty.")],
    wait: Wait = True,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Move everything that shards hold to the others, while all of them serve. They can then be removed."""
    from topk_grpc.cli.cluster import run_drain

    run_drain(names, gateway, wait=wait, as_json=json)


@cluster_app.command("remove")
@with_reach
def remove_shard(
    name: Annotated[str, typer.Argument(metavar="SHARD", help="The shard, drained.")],
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Take a drained shard out of the cluster."""
    from topk_grpc.cli.cluster import run_remove

    run_remove(name, gateway, as_json=json)


@cluster_app.command()
@with_reach
def rebalance(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would move, and how much of that has to.")
    ] = False,
    wait: Wait = True,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Plan anew who owns what, and move it: evens out what earlier changes have left."""
    from topk_grpc.cli.cluster import run_rebalance

    run_rebalance(gateway, dry_run=dry_run, wait=wait, as_json=json)


@cluster_app.command()
@with_reach
def pause(gateway: Reach = UNREACHED, json: Json = False) -> None:
    """Let no further slot move, until `topk cluster resume`. What is on its way arrives."""
    from topk_grpc.cli.cluster import run_pause

    run_pause(gateway, pause=True, as_json=json)


@cluster_app.command()
@with_reach
def resume(gateway: Reach = UNREACHED, json: Json = False) -> None:
    """Let slots move again."""
    from topk_grpc.cli.cluster import run_pause

    run_pause(gateway, pause=False, as_json=json)


@cluster_app.command("delete-song")
@with_reach
def delete_song(
    song: Annotated[str, typer.Argument(metavar="SONG", help="The song, as it was recorded.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask. Needed where no terminal is there to.")] = False,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Delete a song: its plays are gone from all charts and windows, for good. Plays of it that come later count."""
    from topk_grpc.cli.admin import delete_song as run

    run(song, gateway, yes=yes, as_json=json)


# --- Trust ------------------------------------------------------------------------------------------------------------

DataDir = Annotated[Path, typer.Option(envvar="TOPK_DATA_DIR", help="Of a cluster of `topk up`, or of one shard.")]
ShardIds = Annotated[
    list[str] | None, typer.Option("--shard-id", metavar="SHARD", help="Only this shard; may be said more than once.")
]
TopologyUrl = Annotated[
    str,
    typer.Option(
        envvar="TOPK_TOPOLOGY",
        help="Where the topology is, file:PATH or etcd://…, for a shard that was not started by `topk up`.",
    ),
]


@app.command("audit")
@settings.with_store
def audit(  # noqa: PLR0917  # typer makes options of them
    data_dir: DataDir,
    shard_id: ShardIds = None,
    repair_tail: Annotated[
        bool,
        typer.Option(
            "--repair-tail",
            help="Instead: cut the log where its last segment is damaged, keep what is cut off, and say what is lost. "
            "Never while a process has the directory.",
        ),
    ] = False,
    topology: TopologyUrl = "",
    tls_ca: Annotated[
        str,
        typer.Option(envvar="TOPK_TLS_CA", metavar="FILE", help="The CA of the cluster's certificates, if it has any."),
    ] = "",
    tls_cert: Annotated[
        str,
        typer.Option(envvar="TOPK_TLS_CERT", metavar="FILE", help="The certificate to show to shards, as a gateway's."),
    ] = "",
    tls_key: Annotated[str, typer.Option(envvar="TOPK_TLS_KEY", metavar="FILE", help="Its private key.")] = "",
    plaintext: Annotated[
        bool,
        typer.Option("--plaintext", envvar="TOPK_PLAINTEXT", help="Also ask shards of other machines without TLS."),
    ] = False,
    json: Json = False,
    *,
    store: Mapping[str, Any],
) -> None:
    """Count everything anew from snapshots and log, and compare it with what the shards serve, while they serve.

    For a shard that is stopped: with what it would serve. Exit status 1 if anything differs.
    """
    from topk_grpc.cli.audit import Request, run, run_repair

    reach = GatewaySettings(
        topology=topology, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key, plaintext=plaintext, **store
    )
    request = Request(data_dir, shard_id or [], reach, json)
    (run_repair if repair_tail else run)(request)


@token_app.command("new")
def token_new(
    name: Annotated[str, typer.Option(help="Whose it is, for the log: letters, digits and any of . _ @ -")],
    role: Annotated[
        list[str], typer.Option(metavar="ingest|query|admin", help="What it may do; several may be given.")
    ],
    expires: Annotated[
        str | None, typer.Option(metavar="TIME", help="Until when: ISO 8601, no offset: UTC. Default: for good.")
    ] = None,
    plays_per_second: Annotated[
        float | None, typer.Option(min=0, help="What it may send through one gateway. Default: as much as it likes.")
    ] = None,
    append_to: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Put its entry into this tokens file, made if it does not exist."),
    ] = None,
) -> None:
    """Make a token: printed once, kept nowhere. The entry for --tokens-file, which holds its hash, goes to stderr."""
    from topk_grpc.cli.token import new

    new(name, role, expires, plays_per_second, append_to)


@app.command()
def backup(
    data_dir: DataDir,
    to: Annotated[
        Path, typer.Option("--to", metavar="TARGET", help="Where backups are kept: a directory, on another disk.")
    ],
    shard_id: ShardIds = None,
    keep: Annotated[
        int, typer.Option(min=0, help="Afterwards remove all but so many of the last backups. 0: remove none.")
    ] = 0,
    json: Json = False,
) -> None:
    """Back up a cluster of this machine, or one shard, while it runs or not. Only what is new is copied."""
    from topk_grpc.cli.backup import run_backup

    run_backup(data_dir, to, shard_id or [], keep, as_json=json)


@app.command()
def restore(  # noqa: PLR0917  # typer makes options of them
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Where the backups are.")],
    data_dir: Annotated[
        Path | None, typer.Option(help="Where to: a new directory, or an empty one.", show_default=False)
    ] = None,
    backup: Annotated[int | None, typer.Option(min=1, help="Which backup.", show_default="the last")] = None,
    shard_id: ShardIds = None,
    snapshot: Annotated[
        int | None,
        typer.Option(
            help="Begin with this older snapshot of the one shard, and the log that all backups have behind it.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the backups instead.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Read every byte of the backup instead.")] = False,
    json: Json = False,
) -> None:
    """Restore a backup. Everything is checked first; with one --shard-id the directory becomes that shard's."""
    from topk_grpc.cli.backup import RestoreRequest, run_check, run_list, run_restore

    request = RestoreRequest(target, data_dir, backup, shard_id or [], snapshot, json)
    (run_list if show else run_check if check else run_restore)(request)


# --- Show and measure -------------------------------------------------------------------------------------------------


bench_app: Final = typer.Typer(invoke_without_command=True)
app.add_typer(bench_app, name="bench")


@bench_app.callback()
@with_reach
def bench(  # noqa: PLR0917  # typer makes options of them
    context: typer.Context,
    seconds: Annotated[float, typer.Option(min=0.1, max=86_400, help="How long to send.")] = 10,
    songs: Annotated[int, typer.Option(min=1, max=50_000_000, help="Different songs.")] = 1_000_000,
    zipf: Annotated[float, typer.Option(min=0, max=5, help="Exponent of the songs' popularity; 0: all alike.")] = 1.0,
    batch_plays: Annotated[int, typer.Option(min=1, max=65_536, help="Plays a batch.")] = 8192,
    producers: Annotated[int, typer.Option(min=1, max=64, help="Streams at once.")] = 2,
    in_flight: Annotated[int, typer.Option(min=1, max=63, help="Unacknowledged batches a stream.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the songs drawn.")] = 1,
    gateway: Reach = UNREACHED,
    json: Json = False,
) -> None:
    """Load a running cluster with generated plays and measure it. The plays stay in the cluster."""
    if context.invoked_subcommand is None:
        from topk_grpc.cli.bench import Load, run

        run(Load(seconds, songs, zipf, batch_plays, producers, in_flight, seed), gateway, json)


@bench_app.command("partitioners")
def bench_partitioners(  # noqa: PLR0917  # typer makes options of them
    shards: Annotated[int, typer.Option(min=2, max=16, help="Shards of each cluster.")] = 4,
    slots: Annotated[int, typer.Option(min=32, max=SLOTS_MAX, help="Slots of each cluster.")] = 1024,
    plays: Annotated[int, typer.Option(min=1, max=100_000_000, help="Plays sent to each cluster.")] = 1_000_000,
    songs: Annotated[int, typer.Option(min=1, max=50_000_000, help="Different songs.")] = 100_000,
    zipf: Annotated[float, typer.Option(min=0, max=5, help="Exponent of the songs' popularity; 0: all alike.")] = 1.0,
    batch_plays: Annotated[int, typer.Option(min=1, max=65_536, help="Plays a batch.")] = 1000,
    producers: Annotated[int, typer.Option(min=1, max=64, help="Producers that send the batches in turn.")] = 4,
    k: Annotated[int, typer.Option("-k", "--k", min=1, max=10_000, help="Of the query.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the songs drawn.")] = 1,
    json: Json = False,
) -> None:
    """Compare the partitioners: how even they are, what moves with a shard, what a query costs, and if it is right.

    Starts a cluster of each on this machine, in a temporary directory. Exit status 1 if a cluster answered wrongly.
    """
    from topk_grpc.cli.bench_partitioners import Options, run

    raise typer.Exit(run(Options(shards, slots, plays, songs, zipf, batch_plays, producers, k, seed), json))


@app.command()
def demo(
    seconds: Annotated[float, typer.Option(min=2, max=3600, help="About how long to stream.")] = 20,
    shards: Annotated[int, typer.Option(min=1, max=16, help="Shard processes.")] = 2,
    songs: Annotated[
        int | None,
        typer.Option(
            min=100, max=10_000_000, help="Different songs. Default: a million, fewer where kernels are not compiled."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the generated stream.")] = 1,
) -> None:
    """Show the whole story in a minute: a cluster, a stream, a shard that joins and is killed, every count checked."""
    from topk_grpc.cli.demo import run

    raise typer.Exit(run(seconds=seconds, shards=shards, songs=songs, seed=seed))


def main() -> None:
    """The console entry point. Never returns."""
    run_commands(app)


def run_commands(commands: typer.Typer) -> None:
    """Runs the command that the command line names. Never returns."""
    # Processes are started by exec: gRPC's preparations for fork would only write warnings.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        commands(prog_name="topk")
    except TopKError as error:
        fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        sys.exit(130)
