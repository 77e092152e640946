"""What a fuzz target is, and how bytes become the choices of a structured one.

A target is a function of bytes that does no I/O. It returns when all is well: what it tried gave the answer that a
naive form of the same thing gives, or a documented error of errors.py. Whatever else comes out of it is a finding: any
other exception, an array access out of bounds, a sanitizer's report, a hang, memory without a bound.

Where plain bytes would get stuck at the first checksum, a target takes its input as choices (`Choices`): which of a
valid thing's parts to change, and how. It then puts checksums and sizes right itself. So any mutation of the bytes is a
meaningful change, for libFuzzer and for the short form in the test suite alike, and no mutator of our own is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

_RAISED_UNSEEN: list[BaseException] = []
INTERESTING: Final = (
    *(0, 1, -1, 2, 7, 63, 64, 65, 127, 128, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, -(1 << 31)),
    *((1 << 32) - 1, 1 << 32, 1 << 55, (1 << 55) + 1, 1 << 60, (1 << 63) - 1, -(1 << 63), (1 << 64) - 1),
)


@dataclass(frozen=True)
class Target:
    """One thing to fuzz.

    Attributes:
        name: also of its corpus.
        run: takes an input; see the module.
        seeds: valid inputs, from the project's own encoders, to begin with.
        share: of ten thousand inputs of a long run.
        bytes_max: of an input.
    """

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    share: int
    bytes_max: int = 400

    def __call__(self, data: bytes) -> None:
        """Runs it, and raises what a compiled kernel could only report: see `watch_unraisable`."""
        self.run(data)
        if _RAISED_UNSEEN:
            raise _RAISED_UNSEEN.pop()


def watch_unraisable() -> None:
    """An index out of bounds in a C function that returns no exception is handed to this hook and nowhere else."""

    def remember(unraisable: Any) -> None:
        _RAISED_UNSEEN.append(unraisable.exc_value)

    sys.unraisablehook = remember


@contextmanager
def refusing(*errors: type[Exception]) -> Iterator[None]:
    """Takes these errors as an answer, if they say something."""
    try:
        yield
    except errors as error:
        assert len(str(error)) > 10, error


class Choices:
    """Bytes read as decisions; behind their end every decision is 0."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def __bool__(self) -> bool:
        """Whether anything is left."""
        return self._at < len(self._data)

    def take(self, size: int) -> bytes:
        part = self._data[self._at : self._at + size]
        self._at += size
        return part

    def below(self, bound: int) -> int:
        """0 <= n < bound, for a bound of at most 2^16."""
        part = self.take(1 if bound <= 256 else 2)
        return int.from_bytes(part, "little") % bound

    def pick(self, *options: Any) -> Any:
        return options[self.below(len(options))]

    def number(self) -> int:
        """Mostly small, often on an edge, sometimes anything within 64 bits."""
        kind = self.below(8)
        if kind < 4:
            return self.below(256)
        if kind < 6:
            return INTERESTING[self.below(len(INTERESTING))] + self.below(3) - 1
        return int.from_bytes(self.take(8), "little", signed=kind == 6)

    def int64(self) -> int:
        return (self.number() + (1 << 63)) % (1 << 64) - (1 << 63)

    def text(self) -> str:
        return self.take(self.below(12)).decode("utf-8", "replace")

    def rest(self) -> bytes:
        return self.take(len(self._data))


def change(choices: Choices, data: bytes) -> bytes:
    """Some bytes of it changed, taken out, put in or cut off."""
    changed = bytearray(data)
    for _ in range(choices.below(3)):
        at = choices.below(1 << 16) % (len(changed) + 1)
        match choices.below(5):
            case 0:
                changed[at : at + 1] = bytes([choices.below(256)])
            case 1:
                del changed[at : at + 1 + choices.below(8)]
            case 2:
                changed[at:at] = choices.take(1 + choices.below(8))
            case 3:
                changed[at : at + 8] = (choices.number() % (1 << 64)).to_bytes(8, "little")
            case _:
                del changed[at:]
    return bytes(changed)


def change_json(choices: Choices, content: Any) -> Any:
    """A copy of what JSON holds, in which some members, at any depth, are missing, others or of another kind."""
    for _ in range(choices.below(3)):
        content = _change_json(choices, content)
    return content


def _change_json(choices: Choices, content: Any) -> Any:
    if isinstance(content, dict) and content and choices.below(8):
        name = list(content)[choices.below(len(content))]
        if not choices.below(6):
            return {other: value for other, value in content.items() if other != name}
        return content | {name: _change_json(choices, content[name])}
    if isinstance(content, list) and content and choices.below(4):
        at = choices.below(len(content))
        match choices.below(6):
            case 0:
                return [*content[:at], *content[at + 1 :]]
            case 1:
                return [*content, content[at]]
            case _:
                return [*content[:at], _change_json(choices, content[at]), *content[at + 1 :]]
    if isinstance(content, int) and choices.below(3):
        return content + choices.pick(1, -1, 2, 64, -64, 1000) if choices.below(2) else choices.number()
    return choices.pick(None, True, "", [], {}, 1.5, -1, choices.number(), choices.text(), [[]], {"": 0}, float("inf"))
