"""`topk top`, `rank` and `charts`: ask once, print a table or JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from topk_grpc.cli.reach import Reach, unreachable
from topk_grpc.client import TopKClient
from topk_grpc.errors import UnavailableError
from topk_grpc.model import Answer, Bounds, Certificate, ChartHistory, Entry, SongsAnswer, SongStanding, format_time

Result = TypeVar("Result")

_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Query:
    """What `top` and `rank` have in common."""

    window: str
    chart: str
    as_of: str
    allow_partial: bool
    gateway: Reach
    json: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """For the client's methods."""
        return {"chart": self.chart or None, "as_of": self.as_of or None, "allow_partial": self.allow_partial}


def ask(gateway: Reach, question: Callable[[TopKClient], Awaitable[Result]]) -> Result:
    """Asks a cluster one question.

    Raises:
        TopKError: it does not answer, or refuses.
    """

    async def run() -> Result:
        async with gateway.client(deadline_seconds=_SECONDS) as client:
            try:
                return await question(client)
            except UnavailableError as error:
                raise unreachable(gateway, error) from error

    return asyncio.run(run())


def run_top(query: Query, k: int, history_panes: int = 0) -> None:
    """Prints the k best, with how they fared in so many panes where there are any."""
    answer = ask(
        query.gateway,
        lambda client: client.top_k(query.window, k, history_panes=history_panes, **query.arguments),
    )
    if query.json:
        print_json(answer_as_json(answer))
        return
    console = Console()
    console.print(_title(query, answer.bounds), highlight=False, soft_wrap=True)
    console.print(top_table(answer))
    console.print(certificate_line(answer.certificate), soft_wrap=True)


def run_rank(query: Query, song_ids: Sequence[str], neighbours: int) -> None:
    """Prints where songs stand."""
    answer = ask(
        query.gateway, lambda client: client.songs(song_ids, query.window, neighbours=neighbours, **query.arguments)
    )
    if query.json:
        print_json(songs_as_json(answer))
        return
    console = Console()
    console.print(_title(query, answer.bounds), highlight=False, soft_wrap=True)
    table = _songs_table()
    for song in answer.songs:
        for entry in song.above:
            table.add_row(f"{entry.rank:,}", escape(entry.song_id), f"{entry.count:,}", style="dim")
        table.add_row(
            "–" if song.rank is None else f"{song.rank:,}", escape(song.song_id), f"{song.count:,}", style="bold"
        )
        for entry in song.below:
            table.add_row(f"{entry.rank:,}", escape(entry.song_id), f"{entry.count:,}", style="dim")
        table.add_section()
    console.print(table)
    console.print(certificate_line(answer.certificate), soft_wrap=True)


def run_charts(gateway: Reach, as_json: bool) -> None:
    """Prints the charts."""
    charts = ask(gateway, lambda client: client.charts())
    if as_json:
        print_json({"charts": [asdict(chart) for chart in charts]})
        return
    table = Table()
    table.add_column("chart")
    table.add_column("plays", justify="right")
    table.add_column("songs", justify="right")
    for chart in charts:
        songs = "unknown" if chart.distinct_songs is None else f"{chart.distinct_songs:,}"
        table.add_row(escape(chart.chart), f"{chart.total_plays:,}", songs)
    Console().print(table)


# --- Tables -----------------------------------------------------------------------------------------------------------


def _songs_table() -> Table:
    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("song", overflow="fold")
    table.add_column("plays", justify="right")
    return table


def top_table(answer: Answer) -> Table:
    """The entries of an answer; with their history or their session where they have one."""
    table = _songs_table()
    if any(entry.session for entry in answer.entries):
        table.add_column("session", overflow="fold")
    if any(entry.history for entry in answer.entries):
        for name in ("last", "peak", "on chart"):
            table.add_column(name, justify="right")
    for entry in answer.entries:
        session = (span_text(entry.session),) if entry.session else ()
        history = _history(entry.history)
        table.add_row(f"{entry.rank:,}", escape(entry.song_id), f"{entry.count:,}", *session, *history)
    return table


def _history(history: ChartHistory | None) -> tuple[str, ...]:
    if history is None:
        return ()
    last = "–" if history.previous_rank is None else f"{history.previous_rank:,}"
    return last, f"{history.peak_rank:,}", f"{history.panes_on_chart:,}"


def _title(query: Query, bounds: Bounds | None) -> str:
    return escape(f"{query.window}: {span_text(bounds)}" + (f", chart {query.chart}" if query.chart else ""))


def span_text(bounds: Bounds | None) -> str:
    """A window's bounds for people."""
    return "all time" if bounds is None else f"{format_time(bounds.start_ms)} to {format_time(bounds.end_ms)}"


def certificate_line(certificate: Certificate) -> str:
    """How far an answer can be trusted, in a line."""
    missing = ", ".join(certificate.missing_shards)
    complete = "exact, all shards answered" if certificate.complete else f"PARTIAL, without {missing}"
    watermark = format_time(certificate.watermark_ms) if certificate.watermark_ms else "none yet"
    songs = "" if certificate.distinct_songs is None else f" of {certificate.distinct_songs:,} songs"
    return escape(
        f"{certificate.total_plays:,} plays{songs}; {complete}; "
        f"{certificate.finality.value.lower()}; newest play {watermark}; epoch {certificate.epoch}"
    )


# --- JSON -------------------------------------------------------------------------------------------------------------


def print_json(value: dict[str, Any]) -> None:
    """Prints what `--json` asks for."""
    print(json.dumps(value, ensure_ascii=False))  # noqa: T201


def answer_as_json(answer: Answer) -> dict[str, Any]:
    """As documented in docs/cli.md: integers are numbers, the bounds of the global window null."""
    return {
        "window": _window(answer.bounds),
        "certificate": _certificate(answer.certificate),
        "entries": [entry_as_json(entry) for entry in answer.entries],
    }


def songs_as_json(answer: SongsAnswer) -> dict[str, Any]:
    """As `answer_as_json`; the rank of a song without plays is null."""
    return {
        "window": _window(answer.bounds),
        "certificate": _certificate(answer.certificate),
        "songs": [_standing(song) for song in answer.songs],
    }


def _window(bounds: Bounds | None) -> dict[str, int | None]:
    if bounds is None:
        return {"start_ms": None, "end_ms": None}
    return {"start_ms": bounds.start_ms, "end_ms": bounds.end_ms}


def _certificate(certificate: Certificate) -> dict[str, Any]:
    return asdict(certificate) | {
        "missing_shards": list(certificate.missing_shards),
        "finality": certificate.finality.value,
    }


def entry_as_json(entry: Entry) -> dict[str, Any]:
    """A ranked song; sessions and history only where it has them."""
    value = {"rank": entry.rank, "song_id": entry.song_id, "count": entry.count, "share": entry.share}
    if entry.history is not None:
        value |= asdict(entry.history)
    return value | _session(entry.session)


def _session(session: Bounds | None) -> dict[str, int]:
    return {} if session is None else {"session_start_ms": session.start_ms, "session_end_ms": session.end_ms}


def _standing(song: SongStanding) -> dict[str, Any]:
    value = {"song_id": song.song_id, "count": song.count, "rank": song.rank, "share": song.share}
    around = {
        "above": [entry_as_json(entry) for entry in song.above],
        "below": [entry_as_json(entry) for entry in song.below],
    }
    return value | _session(song.session) | around
