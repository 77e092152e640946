"""The three-phase threshold merge against adding everything up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.oracle import Ranked, by_count
from topk_grpc.gateway import threshold
from topk_grpc.gateway.threshold import Question, Search, Told, merge, told_best

Shard = dict[str, int]


def summed(shards: Sequence[Mapping[str, int]]) -> Ranked:
    """All songs of all shards, the plain way."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(shard)
    return by_count({song_id: count for song_id, count in total.items() if count})


def plain(shards: Sequence[Mapping[str, int]], k: int) -> Ranked:
    """What is right only where each song lives on one shard: the k best of the shards' k best."""
    return summed([dict(by_count(shard)[:k]) for shard in shards])[:k]


def tell(shard: Mapping[str, int], question: Question | None, k: int, shards: int) -> Told:
    """What a shard answers."""
    if question is None:
        best = by_count({song_id: count for song_id, count in shard.items() if count})[:k]
        return told_best([song_id for song_id, _ in best], [count for _, count in best], k, alone=shards == 1)
    told = {song_id: shard.get(song_id, 0) for song_id in question.named}
    told |= {song_id: count for song_id, count in shard.items() if count >= question.count_min}
    return Told(told, question.count_min - 1)


def best(
    shards: Sequence[Shard], k: int, meanwhile: Callable[[], None] = lambda: None
) -> tuple[Ranked, list[Question | None], list[list[Shard]]]:
    """The answer, what was asked for it, and the states that were told of in each round.

    Args:
        shards: their songs.
        k: of the query.
        meanwhile: may change them, and is called before each shard is asked.
    """
    search = Search(k)
    asked: list[Question | None] = []
    states: list[list[Shard]] = []
    while len(asked) < 20:
        asked.append(search.question)
        states.append([])
        told = []
        for shard in shards:
            meanwhile()
            told.append(tell(shard, search.question, k, len(shards)))
            states[-1].append(dict(shard))
        places = search.take(told)
        if places is not None:
            return list(places), asked, states
    raise AssertionError(f"no end after {asked}")


songs = st.sampled_from(["", "a", "b", "c", "d", "e", "f", "é", "\U0001f3b5", "z" * 20])
counts = st.one_of(st.integers(0, 4), st.integers(0, 40), st.sampled_from([1 << 54, (1 << 54) + 1]))
clusters = st.lists(st.dictionaries(songs, counts, max_size=10), min_size=1, max_size=8)


@settings(max_examples=1500, deadline=None)
@given(clusters, st.integers(1, 12))
@example([{"a": 3, "b": 3, "c": 2}, {"c": 2, "d": 3, "e": 3}], 2)  # c is best, and among the two best of no shard
@example([{}, {}], 3)
@example([{"a": 1, "b": 1}, {"b": 1, "a": 1}, {"c": 2}], 2)  # all tied, the k-th place goes by name
@example([{"b": 1}, {"a": 1}], 1)  # a tie between a song that was told and one that was not
def test_the_k_best_are_those_of_all_plays_added_up(shards: list[Shard], k: int) -> None:
    places, asked, _ = best(shards, k)
    assert places == summed(shards)[:k]
    assert len(asked) <= 3, "three phases are enough where nothing changes"


@pytest.mark.parametrize("shards", range(2, 9))
def test_a_song_that_is_second_everywhere_is_first(shards: int) -> None:
    """The plain merge of the shards' best does not even see it."""
    spread = [{f"only-{shard}-{place}": 10 for place in range(5)} | {"everywhere": 9} for shard in range(shards)]
    assert best(spread, 5)[0] == summed(spread)[:5]
    assert best(spread, 5)[0][0] == ("everywhere", 9 * shards)
    assert "everywhere" not in dict(plain(spread, 5))


def test_the_plain_merge_lists_a_song_with_too_small_a_count() -> None:
    spread = [{"a": 5, "b": 4, "c": 3}, {"b": 4, "c": 5, "a": 3}]
    assert plain(spread, 2) == [("b", 8), ("a", 5)]
    assert best(spread, 2)[0] == [("a", 8), ("b", 8)]


def test_a_song_that_reaches_the_threshold_by_one_play_is_asked_for() -> None:
    """The threshold is inclusive: with m shards a song of tau plays may have no more than ceil(tau / m) on any."""
    shards = [{"a": 6, "x": 3}, {"b": 6, "x": 3}]
    places, asked, _ = best(shards, 1)
    assert asked[1] == Question(3, ("a",))
    assert places == [("a", 6)]  # x has six, too, and stands behind by its name
    shards = [{"b": 6, "a": 3}, {"c": 6, "a": 3}]
    assert best(shards, 1)[0] == [("a", 6)]


def test_one_phase_is_enough_where_the_shards_tell_all_they_have() -> None:
    assert len(best([{"a": 3, "b": 2}, {"b": 4}], 3)[1]) == 1
    assert len(best([{"a": 3, "b": 2, "c": 1}], 2)[1]) == 1


# --- While plays arrive -----------------------------------------------------------------------------------------------


@settings(max_examples=800, deadline=None)
@given(clusters, st.integers(1, 6), st.lists(st.tuples(st.integers(0, 7), songs, st.integers(-3, 12)), max_size=60))
def test_an_answer_is_exact_for_one_state_of_each_shard_whatever_is_counted_meanwhile(
    shards: list[Shard], k: int, changes: list[tuple[int, str, int]]
) -> None:
    """Also where plays are taken back, which a cluster of this kind refuses: nothing rests on counts that only grow."""
    left = list(changes)

    def meanwhile() -> None:
        if left:
            number, song_id, count = left.pop()
            shard = shards[number % len(shards)]
            shard[song_id] = max(0, shard.get(song_id, 0) + count)

    places, asked, states = best(shards, k, meanwhile)
    assert places == summed(states[-1])[:k]
    assert len(asked) <= threshold.ROUNDS_MAX + 2


def test_a_song_that_was_out_and_comes_up_meanwhile_is_asked_for() -> None:
    shards = [{"a": 10, "b": 9, "late": 1}, {"c": 10, "b": 4, "late": 1}]
    rounds = 0

    def meanwhile() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 5:  # before the third phase
            shards[0]["late"] += 9

    places, asked, states = best(shards, 1, meanwhile)
    assert asked[1:3] == [Question(5, ("a",)), Question(5, ("a", "b", "c"))]
    assert asked[3] is not None
    assert "late" in asked[3].named
    assert places == summed(states[-1])[:1]


def test_a_best_that_changes_faster_than_it_is_asked_for_is_found_by_asking_for_everything() -> None:
    shards: list[Shard] = [{f"song-{number:03d}": 100 for number in range(30)} for _ in range(2)]
    turn = 0

    def meanwhile() -> None:
        nonlocal turn
        turn += 1
        shards[0][f"new-{turn:03d}"] = 1000 + turn  # a new best song, on one shard, each time

    places, asked, states = best(shards, 3, meanwhile)
    assert asked[-1] == Question(1)
    assert len(asked) == threshold.ROUNDS_MAX + 2
    assert places == summed(states[-1])[:3]


def test_too_many_names_for_a_message_are_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threshold, "NAMED_BYTES_MAX", 3)
    places, asked, _ = best([{"aa": 4, "bb": 3}, {"cc": 4, "bb": 1}], 1)
    assert asked[1:] == [Question(2, ("aa",)), Question(1)]  # and not aa and cc by their names
    assert places == [("aa", 4)]


# --- One decision -----------------------------------------------------------------------------------------------------


@settings(max_examples=800, deadline=None)
@given(st.data(), clusters, st.integers(1, 6))
def test_what_is_certain_holds_for_every_state_that_was_told_of(
    data: st.DataObject, shards: list[Shard], k: int
) -> None:
    """Any subset of songs may be told, with any bound that holds for the others."""
    told = []
    for shard in shards:
        named = data.draw(st.sets(songs))
        rest = max((count for song_id, count in shard.items() if song_id not in named), default=0)
        told.append(Told({song_id: shard.get(song_id, 0) for song_id in named}, rest + data.draw(st.integers(0, 2))))
    merged = merge(told, k)
    if merged.certain:
        assert list(merged.places) == summed(shards)[:k]
