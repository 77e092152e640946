"""Everybody who sends and asks: seven producers and six askers, who hold every answer against one ledger.

They can be told to stop sending and bring home what is under way, and to begin again; who asks goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import traceback
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tests.faults.ledger import Ledger
from tests.faults.questions import Asked, Asker
from tests.faults.traffic import (
    ClientProducer,
    ColumnsProducer,
    Producer,
    SingleProducer,
    StreamProducer,
    UnaryProducer,
)
from tests.faults.verdict import Owners
from tests.faults.weather import Weather
from topk_grpc.model import Answer
from topk_grpc.rpc.channels import open_channel

_WATCHES: Final = (("global", "", 50), ("global", "US", 10), ("sliding:5m", "", 20))
_END_SECONDS: Final = 20.0


@dataclass(frozen=True)
class Scene:
    """What the crowd meets.

    Attributes:
        gateways: HOST:PORT of each, by name.
        shards: the names of all that there may be.
        owners: which shard has which songs; None: that changes.
        weather: what is broken.
        ledger: notes what is sent.
    """

    gateways: Mapping[str, str]
    shards: Sequence[str]
    owners: Owners | None
    weather: Weather
    ledger: Ledger


class Crowd:
    """The producers, the askers, and what they make of it. Belongs to one event loop.

    Args:
        scene: where they are.
        seed: of what they do.
        plays_per_second: of the producer that sends most.
        find: is told of everything that ought not to be.
        wrong: is told of each answer that is wrong.

    Attributes:
        channels: to each gateway; gRPC's own retries would hide what is answered.
        producers: those that send; more may be added before they do.
        asked: what came of the queries.
        watched: the newest list of each watch, by window.
    """

    def __init__(
        self,
        scene: Scene,
        seed: int,
        plays_per_second: float,
        find: Callable[[str], None],
        wrong: Callable[[str], None],
    ) -> None:
        self._scene, self._seed = scene, seed
        self._find, self._wrong = find, wrong
        self._stop_sending, self._stop_asking = asyncio.Event(), asyncio.Event()
        self._sending: list[asyncio.Task[None]] = []
        self._asking: list[asyncio.Task[None]] = []
        targets = scene.gateways.values()
        self.channels = [open_channel(address, options=[("grpc.enable_retries", 0)]) for address in targets]
        self.producers = list(self._make_producers(plays_per_second))
        self.asked = Asked()
        self.watched: dict[str, Answer] = {}

    def _make_producers(self, plays_per_second: float) -> Iterator[Producer]:
        target = list(self._scene.gateways.values())
        numbers = (self._seed * 1000 + number for number in itertools.count())

        def common(name: str) -> tuple[str, Ledger, Callable[[str], None], int]:
            return name, self._scene.ledger, self._find, next(numbers)

        yield ColumnsProducer(*common("columns"), target, plays_per_second=plays_per_second)
        for number in (0, 1):
            yield SingleProducer(*common(f"single-{number}"), target[:: 1 - 2 * number])
        for number in (0, 1):
            yield UnaryProducer(*common(f"unary-{number}"), self.channels)
        for number in (0, 1):
            yield StreamProducer(*common(f"stream-{number}"), self.channels)

    # --- Sending ------------------------------------------------------------------------------------------------------

    def send(self) -> None:
        """All producers send, until `bring_home`."""
        self._stop_sending = asyncio.Event()
        self._sending = [self._guarded(each.run(self._stop_sending), each.name) for each in self.producers]

    async def bring_home(self, seconds: float) -> bool:
        """Has all producers stop; returns when everything is acknowledged, and whether it is.

        Args:
            seconds: for how long that may take.
        """
        self._stop_sending.set()
        _, late = await asyncio.wait(self._sending, timeout=seconds)
        for task in late:
            task.cancel()
        if late:
            self._find(f"after {seconds:g} s these are still sending: {[task.get_name() for task in late]}")
        elif not self._scene.ledger.all_acknowledged:
            self._find("all producers are done, and not everything is acknowledged")
        return self._scene.ledger.all_acknowledged

    def _guarded(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        async def run() -> None:
            try:
                await work
            except Exception as error:
                self._find(f"{name} failed: {error!r}\n{traceback.format_exc()}")

        return asyncio.create_task(run(), name=name)

    # --- Asking -------------------------------------------------------------------------------------------------------

    def ask(self) -> None:
        """All askers ask, until `stop_asking`."""
        self._asking = [self._guarded(each, "an asker") for each in self._questions()]

    def stop_asking(self) -> None:
        """Each asker ends after its present question."""
        self._stop_asking.set()

    def _asker(self, gateways: tuple[str, ...], seed: int) -> Asker:
        scene = self._scene
        target = [scene.gateways[name] for name in gateways]
        everybody = (*scene.shards, *scene.gateways)
        return Asker(
            gateways, everybody, target, scene.ledger, scene.owners, scene.weather, self.asked, self._wrong, seed
        )

    def _questions(self) -> Iterator[Coroutine[Any, Any, None]]:
        names = tuple(self._scene.gateways)
        for number, gateways in enumerate([*((name,) for name in names), names]):
            yield self._asker(gateways, self._seed + number).run(self._stop_asking)
        for number, (window, chart, k) in enumerate(_WATCHES):
            asker = self._asker(names, self._seed + 100 + number)
            yield asker.watch(self._stop_asking, window, chart, k, self.watched if not chart else {})

    # --- How it goes --------------------------------------------------------------------------------------------------

    def silent_since(self, began: float) -> list[str]:
        """The gateways that have answered nothing wholly, and the producers that were acknowledged nothing, since."""
        names = [name for name in self._scene.gateways if self.asked.answered_at.get(name, 0) < began]
        return names + [each.name for each in self.producers if each.progress_at < began]

    async def get_on(self, seconds: float) -> list[str]:
        """Waits until each gateway has answered and each producer was acknowledged something; returns who did not."""
        began = time.monotonic()
        while (silent := self.silent_since(began)) and time.monotonic() < began + seconds:
            await asyncio.sleep(0.05)
        return silent

    @property
    def statuses(self) -> Counter[str]:
        """What producers were answered besides acknowledgements."""
        return sum((each.answers for each in self.producers), Counter())

    @property
    def gave_up(self) -> int:
        """How often a program that uses the library was told that it waited in vain."""
        return sum(each.answers.total() for each in self.producers if isinstance(each, ClientProducer))

    async def close(self) -> None:
        """Ends everybody."""
        self._stop_sending.set()
        self._stop_asking.set()
        if tasks := [*self._sending, *self._asking]:
            await asyncio.wait(tasks, timeout=_END_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self.channels:
            await channel.close()
