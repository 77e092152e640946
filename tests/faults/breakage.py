"""How each kind of fault is done, and undone. What a fault has to lead to is checked here as well."""

from __future__ import annotations

import asyncio
import errno
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

from tests.faults.cluster import SHARDS, Cluster, Ending, Process
from tests.faults.files import FileFault, struck, write_control
from tests.faults.proxy import TO_CLIENT, TO_SERVER, Trouble
from tests.faults.schedule import Fault
from tests.faults.weather import Weather
from topk_grpc.migration.members import draining, with_new_shards
from topk_grpc.migration.plan import moves_left
from topk_grpc.model import Topology
from topk_grpc.topology.change import change

READY_SECONDS: Final = 60.0
"""Within which a process that was started again has to be ready, on a busy machine."""

STOP_SECONDS: Final = 20.0
"""Within which a process has to end after SIGTERM."""


class Breakage:
    """Breaks things in a cluster, one at a time each.

    Attributes:
        done: how often each kind struck.
        log: what was done and when, for whoever looks for the cause of a finding.
    """

    def __init__(self, cluster: Cluster, weather: Weather, finding: Callable[[str], None], began: float) -> None:
        self._cluster, self._weather, self._finding, self._began = cluster, weather, finding, began
        self._locks = {name: asyncio.Lock() for name in cluster.processes}
        self._links = {name: asyncio.Lock() for name in cluster.proxies}
        self._numbers = 0
        self.done: Counter[str] = Counter()
        self.not_struck: Counter[str] = Counter()
        self.refused: dict[str, str] = {}
        self.log: list[str] = []

    def note(self, what: str) -> None:
        self.log.append(f"{time.monotonic() - self._began:9.3f} {what}")

    async def strike(self, fault: Fault) -> None:
        """Does it, for as long as it lasts; returns when it is undone."""
        network = hasattr(self, f"_network_{fault.kind}")
        lock = (self._links if network else self._locks)[fault.target]
        async with lock:
            self.note(f"{fault.kind} {fault.target} for {fault.seconds:.2f} s, strength {fault.strength:.2f}")
            affected = [fault.target]
            with self._weather.broken(*affected):
                if network:
                    work: Callable[[Fault], Awaitable[bool]] = getattr(self, f"_network_{fault.kind}")
                    try:
                        struck = await work(fault)
                    finally:
                        self._cluster.proxies[fault.target].trouble = Trouble()
                else:
                    struck = await getattr(self, f"_{fault.kind}")(fault, self._cluster.processes[fault.target])
            (self.done if struck else self.not_struck)[fault.kind] += 1
            self.note(f"{fault.kind} {fault.target} is over{'' if struck else ', and never struck'}")

    # --- Processes ----------------------------------------------------------------------------------------------------

    async def _back(self, process: Process, starts: int) -> None:
        if not await process.ready_after(starts, READY_SECONDS):
            self._finding(f"{process.name} is not ready {READY_SECONDS:g} s after it ended")

    async def _kill_shard(self, fault: Fault, process: Process) -> bool:
        starts = process.starts
        if not process.kill():
            return False
        if fault.strength < 0.3:  # and again, in the middle of its start
            await process.ended_after(starts, 10)
            await asyncio.sleep(fault.strength * 5)
            again = process.starts
            if process.kill():
                starts = again
        await self._back(process, starts)
        return True

    _kill_gateway = _kill_controller = _kill_shard

    async def _pause_shard(self, fault: Fault, process: Process) -> bool:
        if not process.signal(signal.SIGSTOP):
            return False
        try:
            await asyncio.sleep(fault.seconds)
        finally:
            process.signal(signal.SIGCONT)
        return True

    _pause_gateway = _pause_shard

    async def _stop_shard(self, fault: Fault, process: Process) -> bool:
        if not process.ready_at:
            return False
        starts = process.starts
        process.expected = "stop"
        process.signal(signal.SIGTERM)
        if not await process.ended_after(starts, STOP_SECONDS):
            self._finding(f"{process.name} has not ended {STOP_SECONDS:g} s after SIGTERM")
            process.kill()
        await self._back(process, starts)
        return True

    _stop_gateway = _stop_shard

    async def _move_slots(self, fault: Fault, process: Process) -> bool:
        """Has a shard drain, or one that does be kept after all: its slots move while other things break."""

        def decide(topology: Topology) -> Topology:
            drains = [shard.shard_id for shard in topology.shards if shard.draining]
            return with_new_shards(topology, drains) if drains else draining(topology, [process.name])

        changed = await change(self._cluster.store, decide, "a fault of the storm")
        self.note(f"{len(moves_left(changed))} pairs of shards have slots to move")
        return True

    # --- Network ------------------------------------------------------------------------------------------------------

    async def _network_cut(self, fault: Fault) -> bool:
        self._cluster.proxies[fault.target].trouble = Trouble(cut=frozenset({TO_SERVER, TO_CLIENT}))
        await asyncio.sleep(fault.seconds)
        return True

    async def _network_cut_one_way(self, fault: Fault) -> bool:
        way = TO_SERVER if fault.strength < 0.5 else TO_CLIENT
        self._cluster.proxies[fault.target].trouble = Trouble(cut=frozenset({way}))
        await asyncio.sleep(fault.seconds)
        return True

    async def _network_forget_connections(self, fault: Fault) -> bool:
        return self._cluster.proxies[fault.target].forget() > 0

    async def _network_reset(self, fault: Fault) -> bool:
        return self._cluster.proxies[fault.target].reset() > 0

    async def _network_half_close(self, fault: Fault) -> bool:
        return self._cluster.proxies[fault.target].half_close(TO_SERVER if fault.strength < 0.5 else TO_CLIENT) > 0

    async def _network_delay(self, fault: Fault) -> bool:
        self._cluster.proxies[fault.target].trouble = Trouble(delay_seconds=0.01 + 0.3 * fault.strength**2)
        await asyncio.sleep(fault.seconds)
        return True

    async def _network_throttle(self, fault: Fault) -> bool:
        self._cluster.proxies[fault.target].trouble = Trouble(bytes_per_second=20e3 + 400e3 * fault.strength)
        await asyncio.sleep(fault.seconds)
        return True

    # --- Disks --------------------------------------------------------------------------------------------------------

    async def _disk_full(self, fault: Fault, process: Process) -> bool:
        disk = self._cluster.disks[process.name]
        if not disk.mounted:
            self.refused["disk_full"] = disk.why_not
            return False
        process.may_fail = True  # one that starts meanwhile finds no room for its log
        try:
            until = time.monotonic() + 2 + fault.seconds
            while time.monotonic() < until:  # what a snapshot frees is taken again
                await asyncio.to_thread(disk.fill)
                await asyncio.sleep(0.2)
        finally:
            disk.free()
            process.may_fail = not process.ready_at
        if not process.ready_at:
            await self._back(process, process.starts - 1)
        process.may_fail = False
        return True

    async def _inject(self, fault: Fault, process: Process, ends: bool, *faults: FileFault) -> bool:
        """Sets faults of files up and waits until they have struck; whether the process then has to end by itself."""
        starts, control = process.starts, self._cluster.controls[process.name]
        process.may_fail = ends
        write_control(control, faults, fault.seed)
        wanted = {one.number for one in faults}
        until = time.monotonic() + 8 + fault.seconds
        try:
            while not wanted & struck(control) and time.monotonic() < until:
                await asyncio.sleep(0.05)
            hit = bool(wanted & struck(control))
            if hit and ends and not await process.ended_after(starts, 10):
                self._finding(f"{process.name} lives on after {fault.kind}")
            write_control(control, [], fault.seed)
            if ends and not process.ready_at:
                await self._back(process, process.starts - 1)
        finally:
            write_control(control, [], fault.seed)
            process.may_fail = False
        return hit

    def _number(self) -> int:
        self._numbers += 1
        return self._numbers

    async def _failed_sync(self, fault: Fault, process: Process) -> bool:
        skip = int(fault.strength * 30)
        return await self._inject(fault, process, True, FileFault(self._number(), "sync", "/log/", "error", skip=skip))

    async def _short_write(self, fault: Fault, process: Process) -> bool:
        skip = int(fault.strength * 30)
        return await self._inject(fault, process, True, FileFault(self._number(), "write", "/log/", "short", skip=skip))

    async def _power_loss(self, fault: Fault, process: Process) -> bool:
        chance = random.Random(fault.seed)
        operation, under = chance.choice(
            (("sync", "/log/"), ("sync", "/log/"), ("write", "/log/"), ("sync", "/snapshots/"), ("write", "/blocks/"),
             ("rename", "/snapshots/"), ("remove", ""), ("sync_directory", ""))
        )  # fmt: skip
        one = FileFault(self._number(), operation, under, "power", skip=chance.randrange(4))
        process.expected = "kill"
        try:
            return await self._inject(fault, process, True, one)
        finally:
            process.expected = ""

    async def _snapshot_error(self, fault: Fault, process: Process) -> bool:
        return await self._snapshot(fault, process, errno.EIO)

    async def _snapshot_disk_full(self, fault: Fault, process: Process) -> bool:
        return await self._snapshot(fault, process, errno.ENOSPC)

    async def _snapshot(self, fault: Fault, process: Process, code: int) -> bool:
        """A snapshot that fails costs nothing: the process goes on."""
        chance = random.Random(fault.seed)
        operation = chance.choice(("write", "create", "sync", "reserve"))
        under = chance.choice(("/snapshots/", "/blocks/"))
        one = FileFault(self._number(), operation, under, "error", code=code, skip=chance.randrange(3))
        starts = process.starts
        hit = await self._inject(fault, process, False, one)
        if hit and process.starts != starts and process.starts == starts + 1:
            self.note(f"{process.name} was started anew meanwhile")
        return hit

    async def _read_error(self, fault: Fault, process: Process) -> bool:
        """A start that cannot read its files fails, and changes nothing; the next one can."""
        chance = random.Random(fault.seed)
        under = chance.choice(("/log/", "/snapshots/", "/blocks/", "FORMAT"))
        one = FileFault(self._number(), "map", under, "error", skip=chance.randrange(2))
        control, starts = self._cluster.controls[process.name], process.starts
        write_control(control, [one], fault.seed)
        process.may_fail = True
        try:
            if not process.kill():
                return False
            await self._back(process, starts)
            return one.number in struck(control)
        finally:
            write_control(control, [], fault.seed)
            process.may_fail = False

    async def _slow_sync(self, fault: Fault, process: Process) -> bool:
        times = 1 + int(fault.strength * 3)
        one = FileFault(self._number(), "sync", "/log/", "slow", seconds=2.0, times=times)
        hit = await self._inject(fault, process, False, one)
        await asyncio.sleep(2.0 * times)
        return hit

    # --- Endings ------------------------------------------------------------------------------------------------------

    def judge(self, ending: Ending) -> None:
        """Every end of a process has to be one that was meant to be."""
        self.note(f"{ending.name} ended with {ending.status} ({ending.expected or 'not expected'})")
        right = {
            "kill": ending.status == -signal.SIGKILL,
            "stop": ending.status == 0,
            "fail": ending.status > 0 or ending.status == -signal.SIGKILL,
        }
        if not right.get(ending.expected, False):
            self._finding(
                f"{ending.name} ended with {ending.status}"
                f" ({'expected: ' + ending.expected if ending.expected else 'nothing was done to it'}): {ending.last}"
            )

    async def heal(self) -> None:
        """Undoes whatever a cancelled fault may have left."""
        for proxy in self._cluster.proxies.values():
            proxy.trouble = Trouble()
        for name, process in self._cluster.processes.items():
            process.signal(signal.SIGCONT)
            if name in SHARDS:
                self._cluster.disks[name].free()
                write_control(self._cluster.controls[name], [], 0)
                process.may_fail = False
