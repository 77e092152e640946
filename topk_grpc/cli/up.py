"""`topk up`: an embedded cluster in the foreground."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import typer

from topk_grpc.cli.embedded import EmbeddedCluster
from topk_grpc.cli.serve import warn_if_slow
from topk_grpc.config import check_exposure
from topk_grpc.errors import SettingError


def run(
    data_dir: Path,
    *,
    shards: int | None,
    partitioner: str | None,
    slots: int | None,
    host: str,
    port: int,
    metrics_port: int,
    environment: Mapping[str, str],
) -> None:
    """Runs the cluster until SIGINT or SIGTERM.

    Raises:
        typer.BadParameter: others could reach the gateway, in plaintext.
        TopKError: it cannot start.
    """
    warn_if_slow()
    try:
        check_exposure(
            f"{host}:{port}",
            tls=bool(environment.get("TOPK_TLS_CERT")),
            plaintext=environment.get("TOPK_PLAINTEXT") == "true",
            flag="--host",
        )
    except SettingError as error:
        raise typer.BadParameter(str(error)) from error
    cluster = EmbeddedCluster(
        data_dir,
        shards=shards,
        partitioner=partitioner,
        slots=slots,
        host=host,
        port=port,
        metrics_port=metrics_port,
        environment=environment,
        on_line=_print_line,
    )
    asyncio.run(_run(cluster))


async def _run(cluster: EmbeddedCluster) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask() -> None:
        if stop.is_set():
            cluster.kill()  # asked twice: now
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    await cluster.start()
    stopping = asyncio.create_task(stop.wait())
    running = asyncio.create_task(_stay_up(cluster))
    try:
        await asyncio.wait({stopping, running}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            running.result()
    finally:
        running.cancel()
        stopping.cancel()
        await cluster.stop()


async def _stay_up(cluster: EmbeddedCluster) -> None:
    await cluster.wait_ready()
    print(f"ready: {cluster.address}", flush=True)  # noqa: T201
    await cluster.wait_failed()


def _print_line(name: str, line: str) -> None:
    """Passes a child's line on: whole for programs, prefixed and readable for people."""
    if not sys.stderr.isatty():
        text = line if line.startswith("{") else f"{name}: {line}"
    else:
        text = f"{name}: {_readable(line)}"
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def _readable(line: str) -> str:
    """A JSON log line as words; any other as it is."""
    try:
        fields = json.loads(line)
    except ValueError:
        return line
    if not isinstance(fields, dict) or "event" not in fields:
        return line
    hidden = {"time", "level", "event", "role", "traceback"}
    words = " ".join(f"{name}={value}" for name, value in fields.items() if name not in hidden)
    traceback = f"\n{fields['traceback']}" if "traceback" in fields else ""
    level = "" if fields.get("level") == "info" else f"{fields.get('level')}: "
    return f"{level}{fields['event']} {words}{traceback}".rstrip()
