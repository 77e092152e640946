"""The plays that benchmarks send: 33 bytes each on the wire, songs by Zipf's law, encoded before the clock starts.

A pool holds some hundred different batches. For a round they are encoded anew with times as live traffic has them:
those sent in the round's second s carry times of the `SPREAD_SECONDS` before it. While the clock runs only the
header (producer and sequence) is put before a batch's bytes.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from topk_grpc.cli.load import Zipf
from topk_grpc.kernels.encode import batch_header, encode_batch_columns, varint

ID_BYTES: Final = 22
PLAY_BYTES: Final = 33
"""A play on the wire: tag and length, tag and length and 22 bytes of song_id, tag and 6 bytes of played_at_ms."""

SPREAD_SECONDS: Final = 3
POOL_PLAYS: Final = 1 << 20
_BATCHES_MIN: Final = 8
_BATCH_FIELD: Final = b"\x0a"
_PREFIX: Final = b"track-"


def song_ids(songs: int) -> NDArray[np.uint8]:
    """The ids of all songs, uint8[songs, ID_BYTES]."""
    ids = np.empty((songs, ID_BYTES), np.uint8)
    ids[:, : len(_PREFIX)] = np.frombuffer(_PREFIX, np.uint8)
    rest = np.arange(songs)
    for place in range(ID_BYTES - 1, len(_PREFIX) - 1, -1):
        rest, digit = np.divmod(rest, 10)
        ids[:, place] = digit + ord("0")
    return ids


def encode(ids: NDArray[np.uint8], played_at_ms: NDArray[np.int64]) -> bytes:
    """The plays as field 4 of a batch, without its header."""
    offsets = np.arange(len(ids) + 1, dtype=np.int64) * ID_BYTES
    message = encode_batch_columns(b"x", 1, 1, np.ascontiguousarray(ids).reshape(-1), offsets, played_at_ms)
    head = batch_header(b"x", 1, 1)
    return message[message.index(head) + len(head) :]


def request(body: bytes, producer_id: bytes, sequence: int, first_sent_ms: int) -> bytes:
    """The StreamPlaysRequest that sends encoded plays under a number."""
    head = batch_header(producer_id, sequence, first_sent_ms)
    return b"".join((_BATCH_FIELD, varint(len(head) + len(body)), head, body))


class PlayPool:
    """Batches to be sent round and round.

    Args:
        songs: how many there are.
        zipf: the exponent.
        batch_plays: plays in each batch.
        pool_plays: plays in all different batches.
        seed: the same seed draws the same songs.
    """

    def __init__(self, songs: int, zipf: float, batch_plays: int, pool_plays: int = POOL_PLAYS, seed: int = 1) -> None:
        self.batch_plays = batch_plays
        self._ids = song_ids(songs)
        batches = max(_BATCHES_MIN, pool_plays // batch_plays)
        drawn = Zipf(songs, zipf, seed).draw(batches * batch_plays)
        self._drawn = [self._ids[part] for part in drawn.reshape(batches, batch_plays)]
        self._random = np.random.default_rng(seed)
        self._seconds: list[list[bytes]] = []
        self._began_ms = 0

    def stamp(self, seconds: float) -> None:
        """Encodes the batches with times for a round that begins now."""
        self._began_ms = time.time_ns() // 1_000_000
        spread_ms = SPREAD_SECONDS * 1000
        self._seconds = []
        for second in range(int(seconds) + 1):
            last_ms = self._began_ms + 1000 * second
            self._seconds.append(
                [
                    encode(ids, last_ms - self._random.integers(0, spread_ms, len(ids), dtype=np.int64))
                    for ids in self._drawn
                ]
            )

    def batch(self, turn: int, elapsed_seconds: float) -> bytes:
        """The encoded plays to send now."""
        batches = self._seconds[min(int(elapsed_seconds), len(self._seconds) - 1)]
        return batches[turn % len(batches)]

    def every_song(self) -> list[bytes]:
        """Batches that play each song once, now."""
        now_ms = time.time_ns() // 1_000_000
        return [
            encode(part, np.full(len(part), now_ms, np.int64))
            for part in np.array_split(self._ids, -(-len(self._ids) // self.batch_plays))
        ]
