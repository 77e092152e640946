"""A storm: traffic, faults, and every answer checked; then calm, and every count checked.

    cluster.py    the processes, their disks, and the proxies between them
    schedule.py   what breaks and when, from a seed
    breakage.py   how it is broken, and what that has to lead to
    crowd.py      everybody who sends and asks
    traffic.py    how they send; ledger.py: what was sent and acknowledged
    questions.py  how they ask; verdict.py: whether an answer is true
    weather.py    what is broken right now
    comparison.py everything exactly, in the end

Every so often the faults pause, until everything works again without anybody's help; how long that takes is told. In
the end everything is healed, all producers have to bring everything home, and then each count, each total and each
window has to be what the oracle makes of what was acknowledged: from both gateways, and once more after all processes
were killed at one moment.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.faults.breakage import Breakage
from tests.faults.cluster import CONTROLLER, GATEWAYS, SHARDS, Cluster, Ending
from tests.faults.comparison import Comparison
from tests.faults.crowd import Crowd, Scene
from tests.faults.ledger import Ledger
from tests.faults.schedule import KILLS, KINDS, Fault, lane
from tests.faults.traffic import now_ms
from tests.faults.verdict import Owners
from tests.faults.weather import Weather
from topk_grpc import TopKClient
from topk_grpc.errors import UnavailableError

CALM_SECONDS: Final = 75.0
"""How long it may take until everything works again: a dead connection is noticed within 25 s."""

FINDINGS_MAX: Final = 30
"""More are counted, not told."""

GATEWAY_MEMORY_BYTES_MAX: Final = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What kind of storm.

    Attributes:
        seed: of the faults and the traffic.
        seconds: how long faults strike; without `kills`.
        kills: until so many kill -9, and nothing else; 0: all kinds of faults, for `seconds`.
        lanes: how many faults at once.
        calm_every_seconds: how long faults strike between two calms.
        plays_per_second: of the producer that sends most.
    """

    seed: int
    seconds: float
    kills: int = 0
    lanes: int = 2
    calm_every_seconds: float = 60.0
    plays_per_second: float = 40_000.0


@dataclass
class Report:
    """What came of it; `line` is for people, `as_dict` for programs."""

    seed: int
    seconds: float = 0.0
    cycles: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    not_struck: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    plays_acknowledged: int = 0
    lost: int = 0
    double: int = 0
    wrong_answers: int = 0
    other_findings: int = 0
    answers: dict[str, int] = field(default_factory=dict)
    partial_answers: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    windows_compared: int = 0
    calms: int = 0
    calm_seconds_max: float = 0.0
    gateway_memory_bytes_max: int = 0
    process_starts: dict[str, int] = field(default_factory=dict)
    snapshots: int = 0
    migrations: int = 0
    findings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not (self.lost or self.double or self.wrong_answers or self.other_findings)

    def line(self) -> str:
        faults = ", ".join(f"{kind} {count:,}" for kind, count in sorted(self.faults.items()))
        other = f", other findings {self.other_findings:,}" if self.other_findings else ""
        return (
            f"storm: {self.seconds:.0f} s, {self.cycles:,} cycles, faults: {faults or 'none'}; plays acknowledged"
            f" {self.plays_acknowledged:,}; migrations {self.migrations:,}; answers checked"
            f" {sum(self.answers.values()) + self.windows_compared:,};"
            f" lost {self.lost:,}, double {self.double:,}, wrong answers {self.wrong_answers:,}{other}"
        )

    def as_dict(self) -> dict[str, Any]:
        return self.__dict__ | {"passed": self.passed}


class Storm:
    """One run.

    Args:
        plan: what is to happen.
        root: a directory for everything; logs stay there.
        tell: is told how it goes, a line each.
    """

    def __init__(self, plan: Plan, root: Path, tell: Callable[[str], None]) -> None:
        self.plan = plan
        self.report = Report(plan.seed)
        self._tell = tell
        self._began = time.monotonic()
        self._weather = Weather()
        self._cluster = Cluster(root, self._on_ending)
        self._breakage: Breakage | None = None
        # A storm of kills may take long: it ends when they are done.
        self._ledger = Ledger(now_ms(), plan.seconds if not plan.kills else 15 * plan.kills)
        self._crowd: Crowd | None = None
        self._lanes_left = plan.lanes
        self._until = 0.0
        self._next_calm = 0.0
        self._calm = asyncio.Barrier(plan.lanes)

    # --- Findings -----------------------------------------------------------------------------------------------------

    def _find(self, what: str, *, wrong_answer: bool = False) -> None:
        if wrong_answer:
            self.report.wrong_answers += 1
        else:
            self.report.other_findings += 1
        if len(self.report.findings) < FINDINGS_MAX:
            self.report.findings.append(f"{time.monotonic() - self._began:9.3f} {what}")
            self._tell(f"FOUND at {time.monotonic() - self._began:.3f} s: {what}")

    def _wrong(self, what: str) -> None:
        self._find(what, wrong_answer=True)

    def _on_ending(self, ending: Ending) -> None:
        if self._breakage is not None:
            self._breakage.judge(ending)

    @property
    def fault_log(self) -> list[str]:
        return [] if self._breakage is None else self._breakage.log

    # --- The run ------------------------------------------------------------------------------------------------------

    async def run(self) -> Report:
        try:
            await self._cluster.start()
            await self._wait_whole()
            self._breakage = Breakage(self._cluster, self._weather, self._find, self._began)
            await self._blow(self._breakage)
        finally:
            await self._cluster.close()
            self._fill_report()
        return self.report

    async def _wait_whole(self) -> None:
        """Returns when each gateway has heard where the shards are."""
        async with asyncio.timeout(CALM_SECONDS):
            for address in self._cluster.addresses.values():
                async with TopKClient([address], deadline_seconds=10) as client:
                    while not await self._answers(client):
                        await asyncio.sleep(0.1)

    @staticmethod
    async def _answers(client: TopKClient) -> bool:
        with suppress(UnavailableError):
            return (await client.top_k("global", 1)).certificate.complete
        return False

    def _fill_report(self) -> None:
        report, breakage = self.report, self._breakage
        report.seconds = time.monotonic() - self._began
        report.plays_acknowledged = self._ledger.plays_acknowledged
        if self._crowd is not None:
            asked = self._crowd.asked
            report.answers, report.refusals = dict(asked.answers), dict(asked.refusals)
            report.partial_answers, report.statuses = asked.partial, dict(self._crowd.statuses)
        report.process_starts = {name: process.starts for name, process in self._cluster.processes.items()}
        report.snapshots = sum(each.events.get("snapshot_taken", 0) for each in self._cluster.processes.values())
        report.migrations = self._cluster.processes[CONTROLLER].events.get("slots_moved", 0)
        if breakage is not None:
            report.faults, report.not_struck = dict(breakage.done), dict(breakage.not_struck)
            report.cycles, report.skipped = sum(breakage.done.values()), dict(breakage.refused)

    async def _blow(self, breakage: Breakage) -> None:
        owners = Owners(self._cluster.owners, SHARDS) if self.plan.kills else None  # else slots move
        scene = Scene(self._cluster.addresses, SHARDS, owners, self._weather, self._ledger)
        crowd = self._crowd = Crowd(scene, self.plan.seed, self.plan.plays_per_second, self._find, self._wrong)
        crowd.send()
        crowd.ask()
        watching = asyncio.create_task(self._watch_memory())
        began = time.monotonic()
        self._until = began + self.plan.seconds
        self._next_calm = began + self.plan.calm_every_seconds
        try:
            await asyncio.gather(*(self._run_lane(number, breakage, crowd) for number in range(self.plan.lanes)))
            self._tell(f"{sum(breakage.done.values())} faults are over; everybody brings home what is under way")
            await breakage.heal()
            await self._compare(breakage, crowd)
        finally:
            watching.cancel()
            await asyncio.gather(watching, crowd.close(), return_exceptions=True)

    # --- Faults -------------------------------------------------------------------------------------------------------

    async def _run_lane(self, number: int, breakage: Breakage, crowd: Crowd) -> None:
        kinds = KILLS if self.plan.kills else KINDS
        faults = lane(f"{self.plan.seed} lane {number}", kinds, SHARDS, GATEWAYS)
        while not self._over(breakage):
            if time.monotonic() > self._next_calm:
                await self._wait_calm(crowd)
                continue
            fault: Fault = next(faults)
            await asyncio.sleep(fault.pause_seconds)
            await breakage.strike(fault)
        await self._calm.abort()  # the others need not wait for this one any more

    def _over(self, breakage: Breakage) -> bool:
        if self.plan.kills:
            return sum(breakage.done[kind] for kind in KILLS) >= self.plan.kills
        return time.monotonic() >= self._until

    async def _wait_calm(self, crowd: Crowd) -> None:
        """Lets everything recover by itself, and measures how long that takes."""
        try:
            if await self._calm.wait() == 0:
                began = time.monotonic()
                if silent := await crowd.get_on(CALM_SECONDS):
                    self._find(f"{CALM_SECONDS:g} s after the last fault {', '.join(silent)} did not get on")
                self.report.calms += 1
                self.report.calm_seconds_max = max(self.report.calm_seconds_max, time.monotonic() - began)
                self._next_calm = time.monotonic() + self.plan.calm_every_seconds
                self._weather.forget(time.monotonic() - 300)
                self._tell(self._progress(crowd))
            await self._calm.wait()
        except asyncio.BrokenBarrierError:
            self._next_calm = time.monotonic() + self.plan.calm_every_seconds

    def _progress(self, crowd: Crowd) -> str:
        done = sum(self._breakage.done.values()) if self._breakage is not None else 0
        return (
            f"{time.monotonic() - self._began:6.0f} s: {done} faults, {self._ledger.plays_acknowledged:,} plays,"
            f" {crowd.asked.answers.total():,} answers, recovered within {self.report.calm_seconds_max:.1f} s"
        )

    async def _watch_memory(self) -> None:
        while True:
            for name in GATEWAYS:
                used = self._cluster.processes[name].memory_bytes
                if used > GATEWAY_MEMORY_BYTES_MAX >= self.report.gateway_memory_bytes_max:
                    self._find(f"{name} holds {used:,} bytes")
                self.report.gateway_memory_bytes_max = max(self.report.gateway_memory_bytes_max, used)
            await asyncio.sleep(0.5)

    # --- The end ------------------------------------------------------------------------------------------------------

    async def _compare(self, breakage: Breakage, crowd: Crowd) -> None:
        """Everything exactly: from both gateways, then again after a kill of all processes."""
        report = self.report
        began = time.monotonic()
        home = await crowd.bring_home(CALM_SECONDS)
        report.calm_seconds_max = max(report.calm_seconds_max, time.monotonic() - began)
        self._tell(f"comparing with the oracle: {self._ledger.plays_acknowledged:,} plays")
        if not home:
            return  # nothing is known exactly, and a finding already
        comparison = await asyncio.to_thread(
            Comparison, self._ledger, self._cluster.addresses, self._wrong, self.plan.seed, CALM_SECONDS
        )
        report.lost, report.double = await comparison.counts()
        await comparison.windows()
        await comparison.watch(crowd.watched)
        crowd.stop_asking()
        breakage.note("kill everything")
        with self._weather.broken(*SHARDS, *GATEWAYS):
            await self._cluster.kill_everything()
        lost, double = await comparison.counts()
        report.lost, report.double = max(report.lost, lost), max(report.double, double)
        await comparison.windows()
        report.windows_compared = comparison.compared


def save(report: Report, fault_log: list[str], path: Path) -> None:
    """As JSON, with the faults."""
    path.write_text(json.dumps(report.as_dict() | {"fault_log": fault_log}, indent=1) + "\n")
