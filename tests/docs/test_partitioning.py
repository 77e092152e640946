"""The figures of docs/partitioning.md against what they are now, and its picture against the script that draws it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from benchmarks.partitioning_picture import svg
from topk_grpc.cli.bench_partitioners import Options, placement_row
from topk_grpc.cli.load import song_columns, song_name
from topk_grpc.cli.placement import GROWTH_SLOTS, grow, moved_share, names_of, place
from topk_grpc.gateway.threshold import Question, Search, Told, told_best
from topk_grpc.kernels.hash import hash_strings
from topk_grpc.ring import PARTITIONERS, partitioner_of, plan_owners
from topk_grpc.ring.bounded_load import load_max

DOCS = Path(__file__).parents[2] / "docs"


def table(name: str) -> list[list[str]]:
    """The cells of a table, without its head."""
    page = (DOCS / "partitioning.md").read_text()
    text = page.partition(f"<!-- {name}: begin -->")[2].partition(f"<!-- {name}: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    assert len(rows) > 3, f"the page has no table {name!r}"
    return rows[2:]


def test_the_placement_is_what_the_command_computes() -> None:
    options = Options()
    traffic = options.traffic
    expected = [placement_row(name, place(name, traffic, options.shards, options.slots)) for name in PARTITIONERS]
    assert [[row[0].strip("`"), *row[1:]] for row in table("placement")] == expected


def test_growth_is_what_the_plans_are() -> None:
    rows = table("growth")
    ring, modulo = (grow(name, 256) for name in ("ring", "modulo"))
    for row in rows:
        n = int(row[0].split()[0])
        shares = (1 / (n + 1), moved_share(ring[n - 1], ring[n]), moved_share(modulo[n - 1], modulo[n]))
        loads = (*(max(Counter(history[n]).values()) for history in (ring, modulo)), load_max(GROWTH_SLOTS, n + 1))
        assert row == [f"{n} → {n + 1}", *(f"{share:.2%}" for share in shares), *map(str, loads)]
    assert [int(row[0].split()[0]) for row in rows] == [1, 2, 3, 4, 8, 16, 64, 255]


def test_queries_cost_and_are_wrong_as_often_as_the_page_says() -> None:
    """Bytes depend on where logs end; messages and places do not."""
    ring, spread = table("query")
    options = Options()
    assert ring[1] == f"{2 * options.shards}"
    shards = shards_under_round_robin(options)
    truth = options.traffic.ranked[: options.k]
    plain: Counter[str] = Counter()
    for shard in shards:
        plain.update(dict(best_of(shard, options.k)))
    wrong = sum(one != other for one, other in zip(best_of(plain, options.k), truth, strict=True))
    rounds, places = 0, None
    search = Search(options.k)
    while places is None:
        rounds += 1
        places = search.take([tell(shard, search.question, options.k) for shard in shards])
    assert list(places) == truth
    assert [spread[1], spread[3], spread[4]] == [f"{2 * options.shards * rounds}", "0", f"{wrong}"]


def best_of(counts: Counter[str], k: int) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda place: (-place[1], place[0]))[:k]


def tell(shard: Counter[str], question: Question | None, k: int) -> Told:
    if question is None:
        best = best_of(shard, k)
        return told_best([song for song, _ in best], [count for _, count in best], k, alone=False)
    told = {song: shard[song] for song in question.named}
    told |= {song: count for song, count in shard.items() if count >= question.count_min}
    return Told(told, question.count_min - 1)


def shards_under_round_robin(options: Options) -> list[Counter[str]]:
    """What each shard counts."""
    shards = [Counter[str]() for _ in range(options.shards)]
    owners = plan_owners("round_robin", names_of(options.shards), options.slots)
    keys_of = partitioner_of("round_robin").slot_keys
    for batch in options.traffic.batches():
        data, offsets = song_columns(batch.songs[:1])
        hashes = hash_strings(data, offsets[:1].copy(), np.diff(offsets).astype(np.int32))
        slot = int(keys_of(hashes, batch.producer_id, batch.sequence, options.slots)[0]) % options.slots
        shards[owners[slot]].update(map(song_name, batch.songs.tolist()))
    return shards


def test_the_picture_is_what_the_script_draws() -> None:
    drawn = (DOCS / "partitioning.svg").read_text()
    assert drawn == svg(), "python -m benchmarks.partitioning_picture > docs/partitioning.svg"
