"""The order is total: ties at the K-th place fall the same way from any gateway, before and after any restart.

Count descending, then song_id ascending by UTF-8 bytes. Those bytes order texts as code points do, and otherwise than
UTF-16 does, than any language does, and than anything that folds case or normalises.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

import pytest

from tests.cluster.processes import GLOBAL, Cluster, entries_of, ranked, top_k
from topk_grpc.pb.topk.v1 import query_pb2
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch

pytestmark = pytest.mark.cluster

DAY_MS: Final = 86_400_000
PLAYED_MS: Final = 1_700_000_000_000
DAY: Final = query_pb2.Window(tumbling=query_pb2.TumblingWindow(size_ms=DAY_MS))
PLACES: Final = (1, 7, 99, 100, 101, 555, 1000, 1001, 1300, 10_000)
"""Above and below what shards keep in order all the time (1,000 entries)."""

# Pairs that other orders would turn round, or take for one: case, accents composed and not, digits, spaces, a private
# use character before the first beyond 16 bits, prefixes, and characters that nobody sees.
STRANGE: Final = (
    *("a", "A", "aa", "Z", "z", "ä", "a\u0308", "ae", "æ", "ß", "ss", "ẞ", "é", "e\u0301", "ı", "i", "I", "İ"),
    *("10", "9", " 9", "9 ", "9\t", "\u00a09", "-", "_", "~", "\x7f", "\x01", "\u0080", "\u200b", "\u200ba", "\ufeffa"),
    *(
        "\uffff",
        "\U00010000",
        "\U0001f3b5",
        "\ue000",
        "\ud7ff",
        "\U0010ffff",
        "ﬁ",
        "fi",
        "Ω",
        "Ω",
        "猫",
        "ねこ",
        "ネコ",
    ),
    *("Мумий Тролль", "мумий тролль", "שלום", "مرحبا", "नमस्ते", "x" * 128, "x" * 127, "é" * 64),
)


def songs() -> dict[str, int]:
    """1,400 songs with only six different counts; most of them tie at any K."""
    chance = random.Random(7)
    names = {*STRANGE}
    while len(names) < 1400:
        names.add("".join(chance.choices("aAäézZ09 -~☃猫\u0301\uffff\U0001f3b5", k=chance.randrange(1, 12))))
    return {name: chance.choice((1, 1, 1, 2, 2, 3, 5, 8)) for name in sorted(names)}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("order"))
    try:
        yield cluster.start()
    finally:
        cluster.close()


def record(cluster: Cluster, counts: dict[str, int]) -> None:
    """In an order of chance, each play by itself."""
    plays = [name for name, count in counts.items() for _ in range(count)]
    random.Random(11).shuffle(plays)
    for sequence, first in enumerate(range(0, len(plays), 500), 1):
        batch = PlayBatch(producer_id="order", sequence=sequence)
        for name in plays[first : first + 500]:
            batch.plays.add(song_id=name, played_at_ms=PLAYED_MS + sequence, charts=["ties"])
        response = cluster.stub.RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=20)
        assert response.accepted == len(batch.plays)


def check(addresses: list[str], counts: dict[str, int]) -> None:
    """Every K, from every gateway, against the plain way; the entries equal to the byte."""
    expected = ranked(counts)
    for k, chart in ((k, chart) for k in PLACES for chart in ("", "ties")):
        answers = [top_k(address, k, chart) for address in addresses]
        assert [entries_of(answer) for answer in answers] == [expected[:k]] * len(addresses)
        assert len({pb.GetTopKResponse(entries=answer.entries).SerializeToString() for answer in answers}) == 1


def check_window_and_ranks(cluster: Cluster, counts: dict[str, int]) -> None:
    expected = ranked(counts)
    for k in (100, 1200):
        request = pb.GetTopKRequest(window=DAY, k=k, chart="ties", as_of=query_pb2.AsOf(time_ms=PLAYED_MS))
        assert entries_of(cluster.stub.GetTopK(request, timeout=20)) == expected[:k]
    asked = [expected[place - 1] for place in PLACES if place <= len(expected)]
    request_songs = pb.GetSongsRequest(window=GLOBAL, song_ids=[name for _, name, _ in asked], neighbours=3)
    standings = cluster.stub.GetSongs(request_songs, timeout=20).songs
    for (rank, name, count), song in zip(asked, standings, strict=True):
        assert (song.rank, song.song_id, song.count) == (rank, name, count)
        assert [(each.rank, each.song_id, each.count) for each in song.above] == expected[max(0, rank - 4) : rank - 1]
        assert [(each.rank, each.song_id, each.count) for each in song.below] == expected[rank : rank + 3]


def test_ties_fall_the_same_way_from_any_gateway_and_after_restarts(own: Cluster) -> None:
    counts = songs()
    record(own, counts)
    addresses = [own.address, own.add_gateway()]
    check(addresses, counts)
    check_window_and_ranks(own, counts)

    own.kill("everything")  # brought back from the log
    own.start()
    check(addresses, counts)
    check_window_and_ranks(own, counts)

    own.stop()  # brought back from snapshots
    own.start()
    check(addresses, counts)
    check_window_and_ranks(own, counts)

    later = {name: count + 4 for name, count in list(counts.items())[::3]}
    batch = PlayBatch(producer_id="later", sequence=1)
    for name in later:
        batch.plays.add(song_id=name, played_at_ms=PLAYED_MS, count=4, charts=["ties"])
    own.stub.RecordPlays(pb.RecordPlaysRequest(batch=batch), timeout=20)
    check(addresses, counts | later)
    check_window_and_ranks(own, counts | later)
