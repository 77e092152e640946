"""Writes docs/partitioning.svg: what moves when a shard joins, and how full the fullest shard is, by number of shards.

python -m benchmarks.partitioning_picture > docs/partitioning.svg
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Final

from topk_grpc.cli.placement import GROWTH_SLOTS, grow, moved_share
from topk_grpc.ring.bounded_load import load_max

MOVES_SHARDS_MAX: Final = 256
LOAD_SHARDS_MAX: Final = 64
_WIDTH, _HEIGHT = 860, 372
_LEFT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT, _GAP = 60, 46, 330, 250, 90
_STYLE: Final = """
text { font: 12px sans-serif; fill: #333 }
.title { font-weight: bold; font-size: 13px }
.grid { stroke: #ddd; stroke-width: 1 }
.axis { stroke: #333; stroke-width: 1; fill: none }
.modulo { stroke: #c0392b; fill: none; stroke-width: 1.6 }
.ring { stroke: #1f618d; fill: none; stroke-width: 2 }
.bound { stroke: #777; fill: none; stroke-width: 1.2; stroke-dasharray: 5 4 }
"""

Points = Sequence[tuple[float, float]]


class _Panel:
    """A plot with the number of shards to the right, doubling from tick to tick."""

    def __init__(self, left: int, title: str, shards_max: int, values: tuple[float, float]) -> None:
        self._left, self._shards_max = left, shards_max
        self._low, self._high = values
        self.lines = [f'<text class="title" x="{left}" y="{_TOP - 22}">{title}</text>']
        bottom, right = _TOP + _PLOT_HEIGHT, left + _PLOT_WIDTH
        for exponent in range(shards_max.bit_length()):
            x = self._x(2**exponent)
            self.lines.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>')
            self.lines.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{2**exponent}</text>')
        self.lines.append(f'<polyline class="axis" points="{left},{_TOP} {left},{bottom} {right},{bottom}"/>')

    def _x(self, shards: float) -> float:
        return self._left + _PLOT_WIDTH * math.log2(shards) / math.log2(self._shards_max)

    def _y(self, value: float) -> float:
        return _TOP + _PLOT_HEIGHT * (self._high - value) / (self._high - self._low)

    def grid(self, value: float, label: str) -> None:
        y = self._y(value)
        right = self._left + _PLOT_WIDTH
        self.lines.append(f'<line class="grid" x1="{self._left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        self.lines.append(f'<text x="{self._left - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')

    def draw(self, kind: str, points: Points) -> None:
        text = " ".join(f"{self._x(shards):.1f},{self._y(value):.1f}" for shards, value in points)
        self.lines.append(f'<polyline class="{kind}" points="{text}"/>')

    def legend(self, *entries: tuple[str, str]) -> None:
        x, y = self._left, _TOP + _PLOT_HEIGHT + 44
        for kind, text in entries:
            self.lines.append(f'<line class="{kind}" x1="{x}" y1="{y - 4}" x2="{x + 22}" y2="{y - 4}"/>')
            self.lines.append(f'<text x="{x + 27}" y="{y}">{text}</text>')
            x += 44 + 7 * len(text)


def _moves() -> list[str]:
    panel = _Panel(_LEFT, "Slots that move when a shard joins n", MOVES_SHARDS_MAX, (0, 1))
    for percent in range(0, 101, 25):
        panel.grid(percent / 100, f"{percent} %")
    for name in ("modulo", "ring"):
        history = grow(name, MOVES_SHARDS_MAX)
        panel.draw(name, [(n, moved_share(history[n - 1], history[n])) for n in range(1, MOVES_SHARDS_MAX)])
    panel.draw("bound", [(n, 1.1 / (n + 1)) for n in range(1, MOVES_SHARDS_MAX)])
    panel.legend(("modulo", "modulo"), ("ring", "ring, round_robin"), ("bound", "1.1 / (n + 1)"))
    return panel.lines


def _loads() -> list[str]:
    title = "Slots of the fullest of n shards, over the mean"
    panel = _Panel(_LEFT + _PLOT_WIDTH + _GAP, title, LOAD_SHARDS_MAX, (1, 1.08))
    for percent in range(0, 9, 2):
        panel.grid(1 + percent / 100, f"{1 + percent / 100:.2f}")
    for name in ("modulo", "ring"):
        loads = [max(Counter(owners).values()) for owners in grow(name, LOAD_SHARDS_MAX)]
        panel.draw(name, [(n, load * n / GROWTH_SLOTS) for n, load in enumerate(loads, 1)])
    panel.draw("bound", [(n, load_max(GROWTH_SLOTS, n) * n / GROWTH_SLOTS) for n in range(1, LOAD_SHARDS_MAX + 1)])
    panel.legend(("modulo", "modulo"), ("ring", "ring, round_robin"), ("bound", "bound"))
    return panel.lines


def svg() -> str:
    """The picture."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}">'
    note = f"{GROWTH_SLOTS:,} slots; n shards that have joined one after another"
    lines = [
        head,
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        *_moves(),
        *_loads(),
        f'<text x="{_LEFT}" y="{_HEIGHT - 10}">{note}</text>',
        "</svg>\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(svg())
