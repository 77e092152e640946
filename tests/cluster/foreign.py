"""What a client that is none of ours must have seen, whatever language it is written in."""

from __future__ import annotations

from typing import Any, Final

FIRST_MS: Final = 1_700_000_000_000
DAY_MS: Final = 86_400_000
SONGS: Final = ("Boston - More Than a Feeling", "Мумий Тролль - Утекай", "🎵")

_REJECTED: Final = [[7, "EMPTY_SONG_ID"]]


def _acknowledged(sequence: int, *, duplicate: bool = False) -> dict[str, Any]:
    return {"sequence": sequence, "accepted": 7, "duplicate": duplicate, "rejected": _REJECTED}


def check(seen: dict[str, Any]) -> None:
    """Four batches count, each with 1, 2 and 3 plays of the songs on one day, and 10 of the first on the next."""
    assert seen["stream"] == [_acknowledged(1), _acknowledged(2), _acknowledged(3)]
    assert seen["again"] == _acknowledged(1, duplicate=True)
    assert seen["unary"] == _acknowledged(4)
    assert seen["global"] == {
        "entries": [[1, SONGS[0], 44], [2, SONGS[2], 12]],
        "bounds": False,
        "complete": True,
        "total_plays": 64,
        "distinct_songs": 3,
        "final": False,
    }
    start_ms = FIRST_MS // DAY_MS * DAY_MS
    assert seen["day"] == {
        "entries": [[1, SONGS[2], 12], [2, SONGS[1], 8], [3, SONGS[0], 4]],
        "bounds": [start_ms, start_ms + DAY_MS],
    }
    assert seen["songs"] == [
        {"song_id": SONGS[2], "count": 12, "rank": 2, "above": [SONGS[0]], "below": [SONGS[1]]},
        {"song_id": "never played", "count": 0, "rank": None, "above": [], "below": []},
    ]
    assert seen["cluster"] == {
        "shards": ["shard-0", "shard-1"],
        "reachable": True,
        "slots": [1024, 1024],
        "partitioner": "ring",
    }
    assert seen["error"] == {"code": "INVALID_ARGUMENT", "details": "k is 0: ask for 1 to 10000 entries"}
    assert seen["health"] == {"": 1, "liveness": 1, "readiness": 1}  # SERVING
    assert seen["services"] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "topk.v1.ClusterAdminService",
        "topk.v1.TopKService",
    ]
