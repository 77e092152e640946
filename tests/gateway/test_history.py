"""Chart history against the list of all plays, pane by pane."""

from __future__ import annotations

import random
from typing import Any

import grpc
import pytest

from tests.engine.engine_shard import NOW
from tests.gateway.cluster import Cluster, Gateway, batch, record
from tests.gateway.test_queries import request
from tests.oracle import Tally, tumbling
from topk_grpc.errors import InvalidArgumentError, OutOfRangeError, TopKError, UnavailableError
from topk_grpc.gateway.history import check_history
from topk_grpc.model import (
    Answer,
    Bounds,
    ChartHistory,
    GlobalWindow,
    Play,
    RangeWindow,
    SessionWindow,
    SlidingWindow,
    TumblingWindow,
)
from topk_grpc.rpc import convert
from topk_grpc.rpc.status import from_rpc_error

MINUTE = 60_000
WINDOW = TumblingWindow(MINUTE, 7000)
PANES = 12


def some_plays(seed: int) -> list[Play]:
    """Over twice as many panes as are looked at; some panes are empty."""
    chance = random.Random(seed)
    return [
        Play(
            f"song-{chance.randrange(12)}",
            NOW - chance.choice([0, 1, 2, 3, 5, 7, 11, 12, 23]) * MINUTE - chance.randrange(MINUTE),
            chance.randrange(1, 4),
            ("US",)[: chance.randrange(2)],
        )
        for _ in range(200)
    ]


def history_of(tally: Tally, chart: str, at: int, k: int, panes: int) -> dict[str, ChartHistory]:
    """In words: the song's ranks on the charts of this pane and of those before it."""
    charts = []
    for back in range(panes):
        ranked = tally.ranked(chart, tumbling(WINDOW.size_ms, WINDOW.offset_ms, at - back * WINDOW.size_ms))[:k]
        charts.append({song: rank for rank, (song, _) in enumerate(ranked, 1)})
    found = {}
    for song in charts[0]:
        ranks = [chart[song] for chart in charts if song in chart]
        found[song] = ChartHistory(charts[1].get(song), min(ranks), len(ranks))
    return found


async def answer_of(gateway: Gateway, *arguments: Any, **more: Any) -> Answer:
    return convert.answer_from_pb(await gateway.stub.GetTopK(request(*arguments, **more)))


async def error_of(gateway: Gateway, *arguments: Any, **more: Any) -> TopKError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await answer_of(gateway, *arguments, **more)
    return from_rpc_error(caught.value)


@pytest.mark.parametrize("shards", [1, 3])
async def test_history_is_exact(cluster: Cluster, shards: int) -> None:
    await cluster.begin(shards)
    gateway = await cluster.gateway()
    tally = Tally(some_plays(shards))
    await record(gateway, batch(1, tally.plays))
    for chart in ("", "US"):
        for as_of in (None, NOW - MINUTE, NOW - 5 * MINUTE):
            for k, panes in ((1, 2), (3, PANES), (10, PANES), (100, 30)):
                answer = await answer_of(gateway, WINDOW, k, chart, as_of, history_panes=panes)
                plain = await answer_of(gateway, WINDOW, k, chart, as_of)
                expected = history_of(tally, chart, as_of or NOW, k, panes)
                assert {entry.song_id: entry.history for entry in answer.entries} == expected
                assert [entry.song_id for entry in answer.entries] == [entry.song_id for entry in plain.entries]
                assert answer.certificate == plain.certificate
                assert all(entry.history is None for entry in plain.entries)
    empty = await answer_of(gateway, WINDOW, 5, "never heard of", history_panes=3)
    assert empty.entries == ()


@pytest.mark.parametrize("panes", [1, 521])
async def test_a_number_of_panes_out_of_range_is_refused(cluster: Cluster, panes: int) -> None:
    await cluster.begin(1)
    error = await error_of(await cluster.gateway(), WINDOW, history_panes=panes)
    assert isinstance(error, InvalidArgumentError)
    assert "2 to 520" in str(error)


@pytest.mark.parametrize(
    "window", [GlobalWindow(), SlidingWindow(MINUTE), SessionWindow(MINUTE), RangeWindow(0, MINUTE)]
)
def test_only_tumbling_windows_have_a_history(window: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="tumbling windows only"):
        check_history(window, 52)
    check_history(window, 0)


async def test_a_pane_that_cannot_be_cut_any_more_says_how_many_can(cluster: Cluster) -> None:
    await cluster.begin(1)
    gateway = await cluster.gateway()
    await record(gateway, batch(1, some_plays(1)))
    pane = tumbling(WINDOW.size_ms, WINDOW.offset_ms, NOW)
    original = gateway.queries.top_k_between
    kept = 4

    async def refuse_old(bounds: Bounds, *arguments: Any, **more: Any) -> Answer:
        if bounds.start_ms < pane.start_ms - kept * MINUTE:
            raise OutOfRangeError("only whole hours are kept", 1, 2)
        return await original(bounds, *arguments, **more)

    gateway.queries.top_k_between = refuse_old  # type: ignore[method-assign]
    error = await error_of(gateway, WINDOW, history_panes=52)
    assert isinstance(error, OutOfRangeError)
    assert (error.start_ms, error.end_ms) == (1, 2)
    assert "set history_panes to 5" in str(error)
    assert (await answer_of(gateway, WINDOW, history_panes=5)).entries
    kept = 0
    assert "there is no history" in str(await error_of(gateway, WINDOW, history_panes=2))


async def test_a_shard_that_is_away_makes_the_history_fail_or_partial(cluster: Cluster) -> None:
    await cluster.begin(2)
    gateway = await cluster.gateway(query_seconds=0.5)
    await record(gateway, batch(1, some_plays(1)))
    await cluster.shards[0].kill()
    assert isinstance(await error_of(gateway, WINDOW, history_panes=3), UnavailableError)
    answer = await answer_of(gateway, WINDOW, history_panes=3, allow_partial=True)
    assert (answer.certificate.complete, answer.certificate.missing_shards) == (False, ("shard-0",))
    original = gateway.queries.top_k
    await cluster.shards[0].start()

    async def top_k_then_away(*arguments: Any, **more: Any) -> Answer:
        whole = await original(*arguments, **more)
        await cluster.shards[0].kill()
        return whole

    gateway.queries.top_k = top_k_then_away  # type: ignore[method-assign]
    answer = await answer_of(gateway, WINDOW, history_panes=3, allow_partial=True)
    assert (answer.certificate.complete, answer.certificate.missing_shards) == (False, ("shard-0",))
