"""`topk ingest`: plays out of files, each counted once however often it is run.
 Theory of operation. A file is one producer: its name is the hash of the file's content and of the mapping, and its
rows make batches of 8,192, numbered from 1. So every run of the same file sends the same batches under the same
names, and the cluster counts those that it has not. Nothing has to be remembered on this side.

    check every file: hash, columns, each cell   → a bad cell: nothing is sent, exit 1
    send every file                              → plays that the cluster rejects are listed, the rest counts, exit 1

Checking comes first since a file that is corrected after a half-sent ingest is another file, whose plays would all
count again. `--skip-bad` leaves bad rows out, their numbers stay taken. Standard input cannot be read twice: its name
is given by `--producer-id`, and it stops at the first bad row with what came before counted; the same rows again,
corrected from there on, go on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import typer

from topk_grpc.cli.mapping import Mapping, PlayColumns, to_plays
from topk_grpc.cli.progress import Bar, Progress
from topk_grpc.cli.reach import Reach, unreachable
from topk_grpc.cli.sources import STDIN, Source, open_source
from topk_grpc.cli.tabular import BATCH_ROWS, Problem, RowBatch, read
from topk_grpc.cli.timestamps import utc_now_ms
from topk_grpc.client import TopKClient
from topk_grpc.errors import InputError, UnavailableError
from topk_grpc.model import Rejected

_SHOWN: Final = 20
_BATCHES_IN_FLIGHT: Final = 32
_MARKS_SPAN: Final = 64
_PATIENCE_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for on the command line."""

    files: tuple[str, ...]
    mapping: Mapping
    file_format: str
    delimiter: str
    producer_id: str | None
    skip_bad: bool
    gateway: Reach
    json: bool


@dataclass(slots=True)
class Result:
    """What became of one file.

    Attributes:
        rows: rows read, bad ones included.
        plays: the sum of the counts of the rows that count.
        accepted: rows that count now, by this run or an earlier one.
        batches: sent.
        batches_before: those among them that an earlier run had sent.
        skipped: bad rows left out.
        rejected: rows that the cluster refused.
    """

    file: str
    producer_id: str
    rows: int = 0
    plays: int = 0
    accepted: int = 0
    batches: int = 0
    batches_before: int = 0
    skipped: int = 0
    rejected: int = 0
    seconds: float = 0.0
    shown: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        names = (
            "file",
            "producer_id",
            "rows",
            "plays",
            "accepted",
            "batches",
            "batches_before",
            "skipped",
            "rejected",
            "seconds",
        )
        return {name: getattr(self, name) for name in names} | {"problems": self.shown}


def run(request: Request) -> None:
    """Ingests all files.

    Raises:
        TopKError: a file cannot be read as mapped, or the cluster does not take it. What was sent stays counted once.
        typer.Exit: with 1, when the cluster rejected rows.
    """
    _check_request(request)
    results: list[Result] = []
    with Progress() as progress:
        checked = [_check(name, request, progress) for name in request.files]
        for name, (producer_id, rows) in zip(request.files, checked, strict=True):
            results.append(asyncio.run(_Sending(name, producer_id, rows, request, progress).run()))
    if request.json:
        print(json.dumps({"files": [result.as_json() for result in results]}, ensure_ascii=False))  # noqa: T201
    else:
        for result in results:
            _print(result, request.skip_bad)
    if any(result.rejected for result in results):
        raise typer.Exit(1)


def _check_request(request: Request) -> None:
    if len(set(request.files)) < len(request.files):
        raise InputError("a file is named twice: name each once")
    if STDIN in request.files:
        if len(request.files) > 1:
            raise InputError("- (standard input) cannot be ingested together with files: run it alone")
        if not request.producer_id:
            raise InputError(
                "- (standard input) needs --producer-id NAME: the name of this stream; the same one again resumes it"
            )
        if sys.stdin.isatty():
            raise InputError(
                "- (standard input) is the terminal: pipe the rows in, as in `zcat plays.csv.gz | topk ingest - …`"
            )
    elif request.producer_id:
        raise InputError(
            "--producer-id is for standard input: a file's is the hash of its content, so that it counts once"
        )


def _check(name: str, request: Request, progress: Progress) -> tuple[str, int | None]:
    """Reads a file to its end; before anything is sent, and so before there is an event loop.

    Returns:
        Its producer id; and its number of rows, unless nobody counted them.

    Raises:
        InputError: it cannot be read as mapped; says where.
    """
    if request.producer_id:
        return request.producer_id, None
    with open_source(name, request.file_format, hashed=True) as source:
        rows = None
        if not request.skip_bad:
            # Parquet was gone through once already, for its hash.
            size = None if source.format == "parquet" else source.size
            bar = progress.bar(f"checking {os.path.basename(name)}", size)  # noqa: PTH119
            rows = 0
            for batch in read(source, request.mapping.names, request.delimiter):
                _, problems = to_plays(batch, request.mapping, utc_now_ms())
                if problems:
                    raise _bad_row(source, problems[0], "Nothing of this file was counted. ")
                rows += batch.rows
                bar.update(source.bytes_read, rows)
            bar.close()
        return request.mapping.producer_id(source.digest()), rows


def _bad_row(source: Source, problem: Problem, counted: str) -> InputError:
    return InputError(f"{source.name}, {problem}. {counted}Correct it, or leave bad rows out with --skip-bad")


class _Sending:
    """One file on its way into the cluster."""

    def __init__(self, name: str, producer_id: str, rows: int | None, request: Request, progress: Progress) -> None:
        self._rows = rows
        self._name = name
        self._request = request
        self._progress = progress
        self._result = Result(name, producer_id)
        self._left_out: dict[int, tuple[RowBatch, PlayColumns]] = {}

    async def run(self) -> Result:
        await self._greet()
        result, began = self._result, time.monotonic()
        with open_source(self._name, self._request.file_format) as source:
            total = source.size if self._rows is None else self._rows
            bar = self._progress.bar(f"sending {os.path.basename(self._name)}", total)  # noqa: PTH119
            try:
                await self._send(source, bar)
            except UnavailableError as error:
                again = "The same command again goes on from there, and nothing counts twice"
                raise UnavailableError(f"{self._name}: {error}. {again}") from error
            source.check_unchanged()
            bar.close()
        result.seconds = round(time.monotonic() - began, 3)
        return result

    async def _greet(self) -> None:
        """Asks whether there is a cluster: plays would be kept for it patiently, for a minute."""
        async with self._request.gateway.client(deadline_seconds=_PATIENCE_SECONDS) as client:
            try:
                await client.describe()
            except UnavailableError as error:
                raise unreachable(self._request.gateway, error) from error

    async def _send(self, source: Source, bar: Bar) -> None:
        result = self._result
        rows = read(
            source, self._request.mapping.names, self._request.delimiter, self._skip if self._request.skip_bad else None
        )
        plays = self._plays(source, rows)
        client: TopKClient | None = None
        following = 0  # the sequence that the client would give next
        try:
            while True:
                try:
                    step = await asyncio.to_thread(next, plays, None)
                except InputError:
                    if client is not None:  # what came before is good
                        await client.flush()
                    raise
                if step is None:
                    break
                batch, columns = step
                result.rows += batch.rows
                if len(columns):
                    sequence = batch.index + 1
                    if client is None or following != sequence:
                        # A batch without a good row is not sent, and its number stays free: only a new client can leave
                        # one out.
                        await self._finish(client)
                        client = self._client(sequence)
                        following = sequence
                    self._remember(sequence, batch, columns)
                    await _record(client, columns)
                    following += 1
                    result.plays += columns.plays
                    result.batches += 1
                bar.update(source.bytes_read if self._rows is None else result.rows, result.rows)
            await self._finish(client)
        except BaseException:
            if client is not None:
                await _abandon(client)
            raise

    def _plays(self, source: Source, rows: Iterator[RowBatch]) -> Iterator[tuple[RowBatch, PlayColumns]]:
        """Reads on and makes plays; runs on a thread."""
        for batch in rows:
            columns, problems = to_plays(batch, self._request.mapping, utc_now_ms())
            if problems and not self._request.skip_bad:
                first = batch.index * BATCH_ROWS
                raise _bad_row(source, problems[0], f"The {first:,} rows before this one's batch are counted. ")
            for problem in problems:
                self._skip(problem)
            yield batch, columns

    def _client(self, first_sequence: int) -> TopKClient:
        return self._request.gateway.client(
            producer_id=self._result.producer_id,
            first_sequence=first_sequence,
            first_sent_ms=0,  # the file may be ingested again in years: its marks must not expire
            batch_plays=BATCH_ROWS,
            batches_in_flight=_BATCHES_IN_FLIGHT,
            expect_duplicates=True,
            on_rejected=self._on_rejected,
            deadline_seconds=_PATIENCE_SECONDS,
        )

    async def _finish(self, client: TopKClient | None) -> None:
        if client is not None:
            await client.flush()
            self._result.accepted += client.stats.plays_accepted
            self._result.batches_before += client.stats.batches_duplicate
            await client.close()

    def _remember(self, sequence: int, batch: RowBatch, columns: PlayColumns) -> None:
        # For the row numbers of rejected plays; nothing older can still be unacknowledged.
        self._left_out[sequence] = (batch, columns)
        self._left_out.pop(sequence - _MARKS_SPAN, None)

    def _skip(self, problem: Problem) -> None:
        self._result.skipped += 1
        self._show(f"skipped: {self._name}, {problem}")

    def _on_rejected(self, rejected: Rejected) -> None:
        self._result.rejected += 1
        batch, columns = self._left_out[rejected.sequence]
        row = batch.row_number(columns.place(rejected.index))
        self._result.plays -= 1 if columns.counts is None else int(columns.counts[rejected.index])
        song = f" ({rejected.play.song_id!r})" if rejected.play else ""
        self._show(f"rejected: {self._name}, row {row:,}{song}: {rejected.reason}: {rejected.message}")

    def _show(self, line: str) -> None:
        if len(self._result.shown) < _SHOWN:
            self._result.shown.append(line)
            self._progress.note(line)


async def _record(client: TopKClient, columns: PlayColumns) -> None:
    await client.record_columns(
        columns.song_data,
        columns.song_offsets,
        columns.played_at_ms,
        columns.counts,
        columns.chart_data,
        columns.chart_offsets,
    )


async def _abandon(client: TopKClient) -> None:
    """Disconnects after a failure, which is the one to tell of."""
    # As when cancelled: without waiting once more for acknowledgements that do not come.
    await client.__aexit__(asyncio.CancelledError, asyncio.CancelledError(), None)


def _print(result: Result, skip_bad: bool) -> None:
    before = "all of them had been counted before" if result.batches and result.batches_before == result.batches else ""
    if not before and result.batches_before:
        before = f"{result.batches_before:,} of {result.batches:,} batches had been counted before"
    rate = f"{result.rows / result.seconds:,.0f} rows/s" if result.seconds > 0 else ""
    parts = [
        f"{result.plays:,} plays in {result.rows:,} rows",
        *([before] if before else []),
        *([f"{result.skipped:,} bad rows skipped"] if skip_bad else []),
        *([f"{result.rejected:,} rows rejected by the cluster"] if result.rejected else []),
        f"{result.seconds:.1f} s, {rate}",
    ]
    print(f"{'standard input' if result.file == STDIN else result.file}: {'; '.join(parts)}")  # noqa: T201
