"""The short form: each target's corpus, its seeds, and some seconds of random changes to them, the same each time.

It runs the kernels as installed, without coverage and sanitizers. `make fuzz` is the long form (docs/development.md).
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import harness
from tests.fuzz.harness import Target
from tests.fuzz.targets import MODULES, NAMES, load
from topk_grpc.kernels import compiled

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 1.5
INPUTS_MAX = 3000


@pytest.fixture(autouse=True)
def _seeing_what_is_unraisable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "_RAISED_UNSEEN", [])
    monkeypatch.setattr("sys.unraisablehook", lambda seen: harness._RAISED_UNSEEN.append(seen.exc_value))


def committed(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]


def changed(inputs: list[bytes], target: Target) -> Iterator[bytes]:
    """Random changes to inputs, and mixtures of two."""
    chance = random.Random(target.name)
    while True:
        data = bytearray(chance.choice(inputs))
        if chance.random() < 0.2:
            other = chance.choice(inputs)
            data[chance.randrange(len(data) + 1) :] = other[chance.randrange(len(other) + 1) :]
        for _ in range(chance.randrange(1, 5)):
            at = chance.randrange(len(data) + 1)
            match chance.randrange(4):
                case 0:
                    data[at : at + 1] = bytes([chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))])
                case 1:
                    del data[at : at + chance.randrange(1, 5)]
                case 2:
                    data[at:at] = chance.randbytes(chance.randrange(1, 9))
                case _:
                    data[at : at + 1] = bytes([data[at] ^ 1 << chance.randrange(8)]) if at < len(data) else b""
        yield bytes(data[: target.bytes_max])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_found(name: str) -> None:
    target = load(name)
    inputs = [*committed(name), *target.seeds()]
    assert inputs
    for data in inputs:
        check(target, data)
    until = time.monotonic() + SECONDS
    for _, data in zip(range(INPUTS_MAX), changed(inputs, target), strict=False):
        check(target, data)
        if time.monotonic() > until:
            break


def check(target: Target, data: bytes) -> None:
    try:
        target(data)
    except Exception as error:
        raise AssertionError(f"target {target.name}, input {data!r}") from error


def test_every_target_is_listed_and_shares_the_long_run() -> None:
    targets = [load(name) for name in NAMES]
    assert [target.name for target in targets] == list(NAMES)
    assert all(target.share > 0 and target.bytes_max > 0 for target in targets)
    assert {path.stem for path in CORPUS.parent.glob("*.py")} >= set(MODULES)


def test_the_corpus_is_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} <= set(NAMES)
    assert sum(path.stat().st_size for path in files) < 1_000_000


@pytest.mark.skipif(not compiled(), reason="the kernels are not compiled")
def test_what_a_c_function_cannot_raise_is_a_finding() -> None:
    """Where array accesses are checked, an index out of bounds reaches nobody but this hook."""
    target = Target("any", lambda _data: None, lambda: [b""], 1)
    target(b"")
    harness._RAISED_UNSEEN.append(IndexError("Out of bounds on buffer access (axis 0)"))
    with pytest.raises(IndexError, match="Out of bounds"):
        target(b"")
    target(b"")
