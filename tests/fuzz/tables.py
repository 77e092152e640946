"""Targets: the tables that names and sequence numbers reach, each against a dictionary."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from tests.fuzz.harness import Choices, Target
from topk_grpc.kernels.marks import APPLY, DUPLICATE, NOT_OWNER, UNTOUCHED, MarkTable
from topk_grpc.kernels.pairs import PairTable
from topk_grpc.kernels.strings import StringTable

SLOTS = 4
MASK64 = (1 << 64) - 1


def marks(data: bytes) -> None:
    """Batches of three producers in any order: the rule of the marks, word by word."""
    choices = Choices(data)
    table = MarkTable()
    seen: dict[tuple[int, int], set[int]] = {}
    last = 0
    while choices:
        action = choices.below(16)
        producer = 1 + choices.below(3)
        if action == 0:
            table.forget(np.array([producer], np.uint64))
            seen = {key: value for key, value in seen.items() if key[0] != producer}
        elif action == 1:
            table = MarkTable.from_arrays(table.to_arrays())
        else:
            last = (last + choices.below(200) - 70 if action < 12 else choices.number()) & MASK64
            _decide(table, seen, producer, last, choices.below(16), choices.below(16))
        assert len(table) == len(seen)


def _decide(table: MarkTable, seen: Any, producer: int, sequence: int, touched: int, foreign: int) -> None:
    verdicts, owned = np.zeros(SLOTS, np.uint8), np.ones(SLOTS, np.uint8)
    expected = [UNTOUCHED] * SLOTS
    for slot in range(SLOTS):
        if not touched >> slot & 1:
            continue
        verdicts[slot] = APPLY
        if foreign >> slot & 1 and touched & 2:
            owned[slot] = 0
            expected[slot] = NOT_OWNER
            continue
        known = seen.setdefault((producer, slot), set())
        if known and (sequence in known or sequence < max(known) - 64):
            expected[slot] = DUPLICATE
        else:
            known.add(sequence)
            expected[slot] = APPLY
    table.decide(verdicts, owned, producer, sequence)
    assert verdicts.tolist() == expected


def strings(data: bytes) -> None:
    """Any byte strings, under hashes that may be all the same."""
    choices = Choices(data)
    table = StringTable()
    known: dict[bytes, int] = {}
    same = choices.below(3)
    while choices:
        texts = [choices.take(choices.below(9) if choices.below(32) else 300) for _ in range(choices.below(6))]
        sizes = np.array([len(text) for text in texts], np.int32)
        begins = np.cumsum(sizes, dtype=np.int64) - sizes
        hashes = np.array(
            [0 if same == 1 else zlib.crc32(text) << 16 & (MASK64 if same else 3 << 16) for text in texts], np.uint64
        )
        columns = b"".join(texts), begins, sizes, hashes
        assert table.find(*columns).tolist() == [known.get(text, -1) for text in texts]
        expected = [known.setdefault(text, len(known)) for text in texts]
        assert table.add(*columns).tolist() == expected
    assert len(table) == len(known)
    starts = table.starts[: len(known)].tolist()
    kept = [table.arena[at : at + len(text)].tobytes() for text, at in zip(known, starts, strict=True)]
    assert kept == list(known)


def pairs(data: bytes) -> None:
    """Any pairs of numbers."""
    choices = Choices(data)
    table = PairTable()
    known: dict[tuple[int, int], int] = {}
    while choices:
        rows = choices.below(9)
        asked = [(_int32(choices), _int32(choices)) for _ in range(rows)]
        charts, songs = (np.array([pair[side] for pair in asked], np.int32) for side in (0, 1))
        assert table.find(charts, songs).tolist() == [known.get(pair, -1) for pair in asked]
        assert table.add(charts, songs).tolist() == [known.setdefault(pair, len(known)) for pair in asked]
        if not choices.below(8):
            table = PairTable.from_arrays(table.to_arrays())
    assert list(zip(table.charts.tolist(), table.songs.tolist(), strict=True)) == list(known)


def _int32(choices: Choices) -> int:
    return choices.number() % (1 << 31)


def _seeds() -> list[bytes]:
    return [bytes(range(0, 250, 3)), bytes([2, 1, 71, 15, 0] * 30), bytes(100), bytes([255, 7, 3] * 40)]


TARGETS = (
    Target("marks", marks, _seeds, 20, 100),
    Target("strings", strings, _seeds, 20, 120),
    Target("pairs", pairs, _seeds, 15, 120),
)
