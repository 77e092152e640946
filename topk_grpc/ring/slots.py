"""The slot of a song."""

from __future__ import annotations

from topk_grpc.kernels.hash import xxh64


def slot_of(song_id: str, slots: int) -> int:
    """The slot that a song belongs to: XXH64 of its UTF-8 bytes, seed 0, modulo the number of slots.

    Args:
        song_id: any text.
        slots: the cluster's number of slots, above 0.
    """
    return int(xxh64(song_id.encode())) % slots
