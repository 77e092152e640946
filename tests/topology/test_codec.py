"""A topology as JSON and back: what is kept, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.topology.topologies import FIRST
from topk_grpc.errors import CorruptError, VersionError
from topk_grpc.model import ClusterSettings, ShardInfo, Topology
from topk_grpc.topology import codec

MOVE = {"migration_id": 7, "source": "a", "target": "b", "slots": [0, 3], "state": "moving"}

shards = st.lists(
    st.builds(ShardInfo, st.text(min_size=1, max_size=5), st.text(max_size=5), st.text(max_size=5), st.booleans()),
    min_size=1,
    max_size=5,
    unique_by=lambda shard: shard.shard_id,
).map(lambda them: tuple(sorted(them, key=lambda shard: shard.shard_id)))


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    them = draw(shards)
    owners = draw(st.lists(st.integers(0, len(them) - 1), min_size=1, max_size=20).map(tuple))
    chosen = ClusterSettings(len(owners), draw(st.sampled_from(["ring", "modulo"])), draw(st.integers(1, 60_000)))
    return Topology(draw(st.text(min_size=1)), draw(st.integers(0, 1 << 60)), chosen, them, owners)


@given(topologies())
def test_json_and_back(topology: Topology) -> None:
    assert codec.decode(codec.encode(topology), "here") == topology


@given(st.data())
def test_every_truncation_is_damage(data: st.DataObject) -> None:
    raw = codec.encode(FIRST)
    cut = data.draw(st.integers(0, len(raw) - 3))
    with pytest.raises(CorruptError, match="here"):
        codec.decode(raw[:cut], "here")


@pytest.mark.parametrize(
    "change",
    [
        {"owners": [0, 1, 1]},
        {"owners": [0, 1, 1, 2]},
        {"owners": [0, 1, 1, -1]},
        {"owners": [0, 1, 1, "0"]},
        {"owners": None},
        {"shards": []},
        {"shards": [{"shard_id": "b"}, {"shard_id": "a"}]},
        {"shards": [{"shard_id": "a"}, {"shard_id": "a"}]},
        {"shards": [{}, {}]},
        {"shards": ["a", "b"]},
        {"epoch": "1"},
        {"epoch": True},
        {"epoch": -1},
        {"cluster_id": ""},
        {"settings": {"slots": 0}},
        {"settings": []},
        {"paused": 1},
        {"shards": [{"shard_id": "a", "draining": "no"}, {"shard_id": "b"}]},
        {"next_migration_id": 0},
        {"wanted": [0, 1, 1]},
        {"wanted": [0, 1, 1, 2]},
        {"wanted": [0, 1, 1, -1]},
        {"moved_slots": -1},
        {"longest_stall_ms": -1},
        {"longest_stall_ms": "long"},
        {"migrations": [MOVE], "next_migration_id": 7},
        {"migrations": [MOVE | {"migration_id": 0}]},
        {"migrations": [MOVE | {"target": "a"}]},
        {"migrations": [MOVE | {"target": "c"}]},
        {"migrations": [MOVE | {"slots": []}]},
        {"migrations": [MOVE | {"slots": [3, 0]}]},
        {"migrations": [MOVE | {"slots": [0, 0]}]},
        {"migrations": [MOVE | {"slots": [0, 4]}]},
        {"migrations": [MOVE | {"slots": [1]}]},
        {"migrations": [MOVE | {"state": "committed"}]},
        {"migrations": [MOVE | {"state": "moved"}]},
        {"migrations": [MOVE, MOVE | {"migration_id": 8}]},
        {"migrations": [MOVE, MOVE]},
        {"migrations": [{}]},
        {"format": None},
        {"format": "1"},
    ],
)
def test_contradictions_are_damage(change: dict[str, object]) -> None:
    members = json.loads(codec.encode(FIRST)) | {"next_migration_id": 9} | change
    with pytest.raises(CorruptError, match="here"):
        codec.decode(json.dumps(members).encode(), "here")


@pytest.mark.parametrize("raw", [b"", b"null", b"[]", b"\xff\xfe", b"1", b'"x"'])
def test_what_is_no_topology_is_damage(raw: bytes) -> None:
    with pytest.raises(CorruptError):
        codec.decode(raw, "here")


def test_newer_formats_are_named() -> None:
    raw = json.dumps({"format": 4, "whatever": "it holds"}).encode()
    with pytest.raises(VersionError, match=r"format 4 .*newer.* 3"):
        codec.decode(raw, "here")


def test_a_topology_without_a_secret_is_read() -> None:
    members = json.loads(codec.encode(FIRST)) | {"format": 1}
    for name in ("secret", "wanted", "paused", "migrations", "next_migration_id"):
        del members[name]
    assert codec.decode(json.dumps(members).encode(), "here") == replace(FIRST, secret="")


def test_the_secret_is_kept_and_not_shown() -> None:
    known = replace(FIRST, secret="not to be shown")
    assert codec.decode(codec.encode(known), "here") == known
    assert known.secret not in repr(known)


def test_unknown_members_are_left_aside() -> None:
    members = json.loads(codec.encode(FIRST)) | {"migration": None}
    assert codec.decode(json.dumps(members).encode(), "here") == FIRST
