"""`topk demo`: the whole story in a minute, with nothing to prepare and nothing left behind.

An embedded cluster on free ports takes a generated stream while this process counts along. On the way a shard joins and
gets its share of what is counted already; then it is killed with SIGKILL. The stream goes on, the shard comes back from
its log, and at the end every count is compared.
How much is streamed follows from the time given: a machine, or a build without compiled kernels, that is a hundred
times slower streams a hundred times less.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop
from rich.console import Console

from topk_grpc import kernels
from topk_grpc.cli.admin import call_async
from topk_grpc.cli.cluster import watch_joining
from topk_grpc.cli.embedded import EmbeddedCluster
from topk_grpc.cli.progress import Bar, Progress
from topk_grpc.cli.queries import certificate_line, top_table
from topk_grpc.cli.reach import Reach
from topk_grpc.cli.serve import SLOW_KERNELS
from topk_grpc.cli.tally import Stream, Verdict, compare
from topk_grpc.client import TopKClient
from topk_grpc.errors import TopKError, UnavailableError
from topk_grpc.pb.topk.v1.admin_service_pb2 import AddShardsRequest

_SONGS_COMPILED: Final = 1_000_000
_SONGS_PURE: Final = 30_000
_ROUND_PLAYS: Final = 3  # plays in one round of the stream, times songs
_BATCH_COMPILED: Final = 8192
_BATCH_PURE: Final = 512
_JOIN_AT: Final = 0.2  # of the time
_KILL_AT: Final = 0.6
_LONGER: Final = 4  # times the time given, at most, where the machine is slow
_PATIENCE_SECONDS: Final = 120.0
_LINES_KEPT: Final = 20
_POLL_SECONDS: Final = 0.05
_QUICK: Final = {"TOPK_MOVE_SHARE": "1"}
"""Who watches would rather see slots move than rest."""
_OPEN: Final = dict.fromkeys(
    ("TOPK_TLS_CERT", "TOPK_TLS_KEY", "TOPK_TLS_CA", "TOPK_TLS_CLIENT_CA", "TOPK_TOKENS_FILE"), ""
)
"""Settings of other clusters that this shell may have: the demo's own asks nobody for anything."""


def run(*, seconds: float, shards: int, songs: int | None, seed: int) -> int:
    """Runs the demo.

    Returns:
        The exit status: 0 when every count was right.

    Raises:
        TopKError: the cluster does not come up.
    """
    compiled = kernels.compiled()
    chosen = songs or (_SONGS_COMPILED if compiled else _SONGS_PURE)
    demo = _Demo(seconds, shards, chosen, _BATCH_COMPILED if compiled else _BATCH_PURE, seed)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(demo.run())


@dataclass(slots=True)
class _Kill:
    """What happened to the shard."""

    shard_id: str
    pid: int
    down_seconds: float | None = None


class _Demo:
    def __init__(self, seconds: float, shards: int, songs: int, batch_plays: int, seed: int) -> None:
        self._seconds = seconds
        self._shards = shards
        self._songs = songs
        self._batch_plays = batch_plays
        self._seed = seed
        self._console = Console()
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)

    async def run(self) -> int:
        """The story from beginning to end."""
        self._say("[bold]topk-grpc: exact top-K over a stream of plays[/]")
        if not kernels.compiled():
            self._say(SLOW_KERNELS)
        folder = Path(tempfile.mkdtemp(prefix="topk-demo-"))
        cluster = EmbeddedCluster(
            folder / "data", shards=self._shards, environment=_OPEN | _QUICK, on_line=self._keep_line
        )
        exact = False
        try:
            await cluster.start()
            await cluster.wait_ready()
            self._say(
                f"1. A cluster: {self._shards} shards and a gateway at {cluster.address}, each a process; "
                f"data in {folder}"
            )
            exact = await self._story(cluster)
        except TopKError:
            for line in self._lines:
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            raise
        finally:
            await cluster.stop()
            if exact:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                self._say(f"The data is left in {folder}")
        return 0 if exact else 1

    async def _story(self, cluster: EmbeddedCluster) -> bool:
        stream = await asyncio.to_thread(
            Stream, self._songs, _ROUND_PLAYS * self._songs, self._batch_plays, int(time.time() * 1000), self._seed
        )
        async with TopKClient(
            cluster.address, batch_plays=self._batch_plays, deadline_seconds=_PATIENCE_SECONDS
        ) as client:
            with Progress(self._console) as progress:
                kill = await self._stream(cluster, client, stream, progress)
            await self._show(client)
            began = time.monotonic()
            with Progress(self._console) as progress:
                bar = progress.bar("5. Comparing every count", stream.charts)
                verdict = await compare(client, stream, self._seed, lambda done, _: bar.update(done, done * 10_000))
        self._print_verdict(verdict, kill, client, time.monotonic() - began)
        return not verdict.mistake_count

    async def _stream(self, cluster: EmbeddedCluster, client: TopKClient, stream: Stream, progress: Progress) -> _Kill:
        """Streams for the time given, or for as long as it takes a shard to join, to be killed and to come back."""
        self._say(
            f"2. A stream: {stream.songs:,} songs by Zipf's law in {stream.charts:,} chart(s); a play counts when the "
            "shard has it on disk (fdatasync)"
        )
        bar = progress.bar("   streaming", self._seconds)
        began = time.monotonic()
        happening = asyncio.create_task(self._happen(cluster, client, progress))
        try:
            await self._send(client, stream, bar, began, happening)
            bar.update(self._seconds, client.stats.plays_accepted, state="waiting for the last acknowledgements")
            await client.flush()
            seconds = time.monotonic() - began
            kill = await happening
        finally:
            happening.cancel()
        bar.close()
        plays = client.stats.plays_accepted
        self._say(f"   {plays:,} plays in {seconds:.1f} s: {plays / seconds:,.0f} plays/s, move and outage included")
        return kill

    async def _send(
        self, client: TopKClient, stream: Stream, bar: Bar, began: float, happening: asyncio.Task[_Kill]
    ) -> None:
        longest = _LONGER * self._seconds
        while (elapsed := time.monotonic() - began) < (self._seconds if happening.done() else longest):
            batch = stream.next_batch()
            await client.record_columns(
                batch.song_data,
                batch.song_offsets,
                batch.played_at_ms,
                None,
                batch.chart_data,
                batch.chart_offsets,
            )
            bar.update(min(elapsed, self._seconds), client.stats.plays_accepted)

    async def _happen(self, cluster: EmbeddedCluster, client: TopKClient, progress: Progress) -> _Kill:
        """What the stream meets on its way."""
        began = time.monotonic()
        await asyncio.sleep(self._seconds * _JOIN_AT)
        shard_id = await self._join(cluster, client, progress)
        await asyncio.sleep(max(0.0, began + self._seconds * _KILL_AT - time.monotonic()))
        return await self._kill(cluster, shard_id, client, progress)

    async def _join(self, cluster: EmbeddedCluster, client: TopKClient, progress: Progress) -> str:
        """Adds a shard, as `topk cluster add` does; returns when it has its share of the slots."""
        gateway = Reach(cluster.address)
        before = (await client.describe()).slots_moved
        shard_id: str
        (shard_id,) = (await call_async(gateway, "AddShards", AddShardsRequest(count=1))).shard_ids
        progress.note(f"3. topk cluster add: {shard_id} joins, and gets its share of what is counted already")
        moved = await watch_joining(gateway, [shard_id], before, progress)
        described = await client.describe()
        plays = next(shard.total_plays for shard in described.shards if shard.shard_id == shard_id)
        progress.note(
            f"   {moved.slots:,} of {described.slots:,} slots are {shard_id}'s after {moved.seconds:.1f} s, with"
            f" {plays:,} plays; the plays of no slot had to wait for longer than {moved.longest_stall_ms:,} ms"
        )
        return shard_id

    async def _kill(self, cluster: EmbeddedCluster, shard_id: str, client: TopKClient, progress: Progress) -> _Kill:
        child = cluster.shards[shard_id]
        kill = _Kill(shard_id, child.pid or 0)
        began = time.monotonic()
        starts = child.starts
        child.kill()
        progress.note(f"4. kill -9 {kill.pid}: {shard_id} is gone; the stream goes on, and waits where it has to")
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while child.starts == starts or not await self._reachable(client, shard_id):  # noqa: ASYNC110
                await asyncio.sleep(_POLL_SECONDS)
        kill.down_seconds = time.monotonic() - began
        progress.note(
            f"   {shard_id} is back as process {child.pid} after {kill.down_seconds:.1f} s, "
            "with everything it had acknowledged"
        )
        return kill

    async def _reachable(self, client: TopKClient, shard_id: str) -> bool:
        with contextlib.suppress(UnavailableError):
            cluster = await client.describe()
            return any(shard.shard_id == shard_id and shard.reachable for shard in cluster.shards)
        return False

    async def _show(self, client: TopKClient) -> None:
        began = time.perf_counter()
        answer = await client.top_k("global", 10)
        took_ms = (time.perf_counter() - began) * 1000
        self._say(f"   The top ten of all time, asked for and answered in {took_ms:.1f} ms:")
        self._console.print(top_table(answer))
        self._console.print(certificate_line(answer.certificate), soft_wrap=True, highlight=False)

    def _print_verdict(self, verdict: Verdict, kill: _Kill, client: TopKClient, seconds: float) -> None:
        self._say(f"5. Compared with the generator's own tally in {seconds:.1f} s:")
        for line in verdict.compared:
            self._say(f"   - {line}")
        stats = client.stats
        if stats.batches_resent:
            self._say(
                f"   {stats.batches_resent:,} batches were sent again after {stats.reconnects:,} reconnects, "
                f"{stats.batches_duplicate:,} of them had been counted before"
            )
        if verdict.mistake_count:
            for mistake in verdict.mistakes:
                self._console.print(f"   {mistake}", markup=False, style="red", soft_wrap=True)
            self._say(f"[bold red]FAIL[/]: {verdict.mistake_count:,} differences")
            return
        down = f", back after {kill.down_seconds:.1f} s" if kill.down_seconds is not None else ""
        self._say(
            f"[bold green]PASS[/]: every one of {verdict.counts:,} counts is exact: {stats.plays_accepted:,} plays, "
            f"none lost and none counted twice, though {kill.shard_id} joined on the way and was killed{down}"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _keep_line(self, name: str, line: str) -> None:
        self._lines.append(f"{name}: {line}")
