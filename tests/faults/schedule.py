"""What breaks, and when: drawn from a seed, so that a run can be had again.

Faults come on lanes, which run at the same time. Each lane deals all kinds in a random order, then again in another, so
that none is left out for long; with each it draws what it strikes, how hard, and how long the pause before it is.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tests.faults.cluster import CONTROLLER

KINDS: Final = (
    "kill_shard",
    "kill_gateway",
    "pause_shard",
    "pause_gateway",
    "stop_shard",
    "stop_gateway",
    "cut",
    "cut_one_way",
    "forget_connections",
    "reset",
    "half_close",
    "delay",
    "throttle",
    "disk_full",
    "failed_sync",
    "short_write",
    "snapshot_error",
    "snapshot_disk_full",
    "read_error",
    "slow_sync",
    "power_loss",
    "move_slots",
    "kill_controller",
)
"""A `pause` is SIGSTOP, then SIGCONT; a `stop` is SIGTERM; `forget_connections` is a router that lost its table."""

KILLS: Final = ("kill_shard", "kill_gateway")

_GATEWAY_KINDS: Final = frozenset({"kill_gateway", "pause_gateway", "stop_gateway"})
_NETWORK_KINDS: Final = frozenset(
    {"cut", "cut_one_way", "forget_connections", "reset", "half_close", "delay", "throttle"}
)


@dataclass(frozen=True)
class Fault:
    """One thing that is to happen.

    Attributes:
        kind: of `KINDS`.
        target: the process, or the process whose proxy it strikes.
        pause_seconds: before it.
        seconds: how long it lasts, where it lasts.
        strength: 0 to 1; what it means is the kind's.
        seed: for whatever else is left to chance.
    """

    kind: str
    target: str
    pause_seconds: float
    seconds: float
    strength: float
    seed: int


def lane(seed: str, kinds: Sequence[str], shards: Sequence[str], gateways: Sequence[str]) -> Iterator[Fault]:
    """The faults of one lane, without end."""
    chance = random.Random(seed)
    while True:
        deck = list(kinds)
        chance.shuffle(deck)
        for kind in deck:
            if kind in _GATEWAY_KINDS:
                target = chance.choice(gateways)
            elif kind == "kill_controller":
                target = CONTROLLER
            elif kind in _NETWORK_KINDS:
                target = chance.choice([*shards, *gateways])
            else:
                target = chance.choice(shards)
            # Mostly short; now and then longer than all deadlines.
            seconds = chance.uniform(7, 11) if chance.random() < 0.15 else chance.uniform(0.3, 3)
            yield Fault(kind, target, chance.uniform(0.1, 1.2), seconds, chance.random(), chance.randrange(1 << 32))
