"""Several hosts on one machine: network namespaces with addresses and names of their own, on one switch.

    host: eth0 10.77.0.N/24 ── port pN of the bridge, in a namespace of its own ── the other hosts

Nothing of it touches the network of the machine itself. What a host is called stands in /etc/netns/NAMESPACE/hosts,
which `ip netns exec` puts in the place of /etc/hosts.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

NETNS_FILES: Final = Path("/etc/netns")


def run_ip(*arguments: str) -> None:
    """Runs `ip`.

    Raises:
        OSError: there is none.
        RuntimeError: it failed, and says why.
    """
    done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


class Network:
    """Hosts on a switch. Use it as a context manager.

    Args:
        names: of the hosts.
        also: what else they are called, by name.
    """

    def __init__(self, names: Sequence[str], also: Mapping[str, Sequence[str]] | None = None) -> None:
        self._also = also or {}
        self._prefix = f"topk-test-{os.getpid()}"
        self._names = list(names)
        self._had_files = NETNS_FILES.exists()
        self.addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    @property
    def _switch(self) -> str:
        return self._namespace("switch")

    def _port(self, name: str) -> str:
        return f"p{self._names.index(name)}"

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        run_ip("netns", "add", self._switch)
        run_ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
        run_ip("-n", self._switch, "link", "set", "bridge", "up")
        for name in self._names:
            namespace, port = self._namespace(name), self._port(name)
            run_ip("netns", "add", namespace)
            run_ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            run_ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
            for device in ("lo", "eth0"):
                run_ip("-n", namespace, "link", "set", device, "up")
            run_ip("-n", namespace, "address", "add", f"{self.addresses[name]}/24", "dev", "eth0")
        self._write_names()

    def _write_names(self) -> None:
        """In place: a process that runs has the file itself, not its name."""
        lines = [
            "127.0.0.1 localhost",
            *(" ".join((address, name, *self._also.get(name, ()))) for name, address in self.addresses.items()),
        ]
        for name in self._names:
            folder = NETNS_FILES / self._namespace(name)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts").write_text("\n".join(lines) + "\n")

    def hosts_file(self, name: str) -> Path:
        """What a host has in the place of /etc/hosts."""
        return NETNS_FILES / self._namespace(name) / "hosts"

    def within(self, name: str) -> tuple[str, ...]:
        """What runs a command on a host, as that process."""
        return ("ip", "netns", "exec", self._namespace(name))

    # --- What tests do to it ------------------------------------------------------------------------------------------

    def cut_off(self, name: str, *, cut: bool = True) -> None:
        """Nothing comes from a host or gets to it, or everything again."""
        run_ip("-n", self._switch, "link", "set", self._port(name), "down" if cut else "up")

    def part(self, *names: str, cut: bool = True) -> None:
        """These hosts reach all others, but not each other; or each other again."""
        for name in names:
            isolated = "on" if cut else "off"
            run_ip("-n", self._switch, "link", "set", self._port(name), "type", "bridge_slave", "isolated", isolated)

    def move(self, name: str, address: str) -> None:
        """Gives a host another address, and all of them its name for it."""
        namespace = self._namespace(name)
        run_ip("-n", namespace, "address", "flush", "dev", "eth0")
        run_ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        self.addresses[name] = address
        self._write_names()

    def __exit__(self, *_: object) -> None:
        for name in [*self._names, "switch"]:
            with suppress(OSError, RuntimeError):  # it may not have come to be
                run_ip("netns", "del", self._namespace(name))
            shutil.rmtree(NETNS_FILES / self._namespace(name), ignore_errors=True)
        if not self._had_files:
            with suppress(OSError):
                NETNS_FILES.rmdir()


def why_not() -> str:
    """Why there can be no hosts here; empty: there can."""
    try:
        with Network(["a", "b"]) as network:
            network.part("a", "b")
            run_on: Mapping[str, tuple[str, ...]] = {name: network.within(name) for name in ("a", "b")}
            subprocess.run([*run_on["a"], "true"], check=True, capture_output=True, timeout=10)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"network namespaces cannot be made: {error}"
    return ""
