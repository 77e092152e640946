"""Holds answers of a cluster, as the client gives them, against the naive truth."""

from __future__ import annotations

from collections.abc import Sequence

from tests.oracle import Ranked, Truth
from topk_grpc.model import Answer, Certificate, Entry, Finality, SongsAnswer


def _entries(truth: Truth, ranked: Ranked, first: int = 1) -> tuple[Entry, ...]:
    return tuple(
        Entry(rank, song_id, count, count / truth.total, truth.sessions.get(song_id))
        for rank, (song_id, count) in enumerate(ranked, first)
    )


def check_certificate(certificate: Certificate, truth: Truth, listed: int, watermark_ms: int, lateness_ms: int) -> None:
    """All of it but the epoch."""
    final = truth.bounds is not None and truth.bounds.end_ms + lateness_ms <= watermark_ms
    assert certificate == Certificate(
        complete=True,
        missing_shards=(),
        epoch=certificate.epoch,
        watermark_ms=watermark_ms,
        finality=Finality.FINAL if final else Finality.PRELIMINARY,
        total_plays=truth.total,
        distinct_songs=len(truth.ranked),
        other_plays=truth.total - listed,
    )


def check_top_k(answer: Answer, truth: Truth, k: int, watermark_ms: int, lateness_ms: int = 300_000) -> None:
    """Bounds, entries with their shares and sessions, and the certificate."""
    assert answer.bounds == truth.bounds
    assert answer.entries == _entries(truth, truth.ranked[:k])
    listed = sum(entry.count for entry in answer.entries)
    check_certificate(answer.certificate, truth, listed, watermark_ms, lateness_ms)


def check_songs(
    answer: SongsAnswer,
    asked: Sequence[str],
    truth: Truth,
    neighbours: int,
    watermark_ms: int,
    lateness_ms: int = 300_000,
) -> None:
    """Count, rank, share, session and neighbours of each song, and the certificate."""
    assert answer.bounds == truth.bounds
    places = {song_id: (at, count) for at, (song_id, count) in enumerate(truth.ranked)}
    assert [song.song_id for song in answer.songs] == list(asked)
    for song in answer.songs:
        at, count = places.get(song.song_id, (None, 0))
        assert (song.rank, song.count) == (None if at is None else at + 1, count)
        assert song.session == truth.sessions.get(song.song_id)
        assert song.share == (count / truth.total if count else 0)
        near = range(0) if at is None else range(max(0, at - neighbours), at)
        assert song.above == _entries(truth, [truth.ranked[place] for place in near], near.start + 1)
        below = [] if at is None else truth.ranked[at + 1 : at + 1 + neighbours]
        assert song.below == _entries(truth, below, 0 if at is None else at + 2)
    listed = sum(places[song_id][1] for song_id in set(asked) if song_id in places)
    check_certificate(answer.certificate, truth, listed, watermark_ms, lateness_ms)
