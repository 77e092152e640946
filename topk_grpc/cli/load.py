"""Generated plays: songs drawn by Zipf's law, and batches encoded beforehand, so that sending costs little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from topk_grpc.kernels import encode

_ID_BYTES: Final = 16
_BATCH_FIELD: Final = b"\x0a"  # `batch = 1`, length-delimited

Int64s = npt.NDArray[np.int64]


class Zipf:
    """Draws songs: the one of popularity rank r is drawn with a weight of 1 / r^exponent.

    Which song has which rank is shuffled, so that names say nothing about popularity.
    """

    def __init__(self, songs: int, exponent: float, seed: int) -> None:
        """Prepares drawing among `songs` songs; the same seed draws the same."""
        self._random = np.random.default_rng(seed)
        weights = np.arange(1, songs + 1, dtype=np.float64) ** -exponent
        self._cumulative = np.cumsum(weights)
        self._cumulative /= self._cumulative[-1]
        self._song_of_rank = self._random.permutation(songs)

    def draw(self, count: int) -> Int64s:
        """Numbers of songs, from 0."""
        ranks = np.searchsorted(self._cumulative, self._random.random(count), side="right")
        drawn: Int64s = self._song_of_rank[np.minimum(ranks, len(self._song_of_rank) - 1)].astype(np.int64)
        return drawn


def song_name(song: int) -> str:
    """The song_id of a number: 16 characters."""
    return f"song-{song:011d}"


def song_columns(songs: Int64s) -> tuple[npt.NDArray[np.uint8], Int64s]:
    """The song_ids of numbers, as data and offsets."""
    digits = np.empty((len(songs), _ID_BYTES), np.uint8)
    digits[:, :5] = np.frombuffer(b"song-", np.uint8)
    rest = songs.copy()
    for place in range(_ID_BYTES - 1, 4, -1):
        rest, digit = np.divmod(rest, 10)
        digits[:, place] = digit + ord("0")
    return digits.reshape(-1), np.arange(len(songs) + 1, dtype=np.int64) * _ID_BYTES


@dataclass(frozen=True, slots=True)
class EncodedPlays:
    """The plays of a batch in wire form: what is the same whoever sends them."""

    body: bytes
    plays: int

    @classmethod
    def of(cls, songs: Int64s, played_at_ms: Int64s) -> EncodedPlays:
        """Encodes plays of songs given by number."""
        message = encode.encode_batch_columns(b"x", 1, 1, *song_columns(songs), played_at_ms, None, None, None)
        head = encode.batch_header(b"x", 1, 1)
        start = message.index(head) + len(head)
        return cls(bytes(memoryview(message)[start:]), len(songs))

    def request(self, producer_id: bytes, sequence: int, first_sent_ms: int) -> bytes:
        """The StreamPlaysRequest that sends them under a number."""
        head = encode.batch_header(producer_id, sequence, first_sent_ms)
        return b"".join((_BATCH_FIELD, encode.varint(len(head) + len(self.body)), head, self.body))
