"""A real etcd for tests: started by exec on free ports of this machine, killed, and started again on its data."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import pytest

from tests.cluster.processes import free_port, wait_for
from tests.security.certificates import Pair

ETCD: Final = shutil.which("etcd")
needs_etcd = pytest.mark.skipif(ETCD is None, reason="there is no etcd: install it (Debian: etcd-server)")

_START_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Tls:
    """What etcd shows, and asks for."""

    ca: Path
    pair: Pair


class EtcdServer:
    """One member, alone in its cluster unless `together` has made it.

    Args:
        root: for its data and its log.
        tls: with it clients need a certificate.
        host: the address that it serves at.
        within: what runs a command where that address is (`ip netns exec NAME`).
    """

    def __init__(
        self, root: Path, tls: Tls | None = None, *, host: str = "127.0.0.1", within: Sequence[str] = ()
    ) -> None:
        self._root = root
        self._within = within
        self._tls = tls
        self._scheme = "http" if tls is None else "https"
        self.address = f"{host}:{free_port()}"
        self._peer = f"http://127.0.0.1:{free_port()}"
        self._cluster = f"{root.name}={self._peer}"
        self._health = f"http://127.0.0.1:{free_port()}"
        self._process: subprocess.Popen[bytes] | None = None
        root.mkdir(parents=True, exist_ok=True)

    @classmethod
    def together(cls, root: Path, count: int) -> list[EtcdServer]:
        """The members of one cluster, started."""
        members = [cls(root / f"member-{number}") for number in range(count)]
        cluster = ",".join(member._cluster for member in members)
        for member in members:
            member._cluster = cluster
            member.launch()
        for member in members:
            member.wait_healthy()
        return members

    def url(self, prefix: str = "topk") -> str:
        """What `--topology` names."""
        return f"etcd://{self.address}/{prefix}"

    def start(self) -> EtcdServer:
        """Returns when it answers; also again after `kill`."""
        self.launch()
        self.wait_healthy()
        return self

    def launch(self) -> None:
        """Returns at once."""
        assert ETCD is not None
        client = f"{self._scheme}://{self.address}"
        arguments = [
            *("--name", self._root.name, "--data-dir", str(self._root / "data"), "--log-level", "warn"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", self._peer, "--initial-advertise-peer-urls", self._peer),
            *("--initial-cluster", self._cluster, "--listen-metrics-urls", self._health),
        ]
        if self._tls is not None:
            arguments += ["--cert-file", str(self._tls.pair.cert), "--key-file", str(self._tls.pair.key)]
            arguments += ["--client-cert-auth", "--trusted-ca-file", str(self._tls.ca)]
        with (self._root / "etcd.log").open("ab") as log:
            environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
            self._process = subprocess.Popen(
                [*self._within, ETCD, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )

    def wait_healthy(self) -> None:
        wait_for(self._is_healthy, _START_SECONDS, f"etcd answers: see {self._root / 'etcd.log'}")

    def _is_healthy(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self._root / "etcd.log").read_text()[-2000:]
        url = f"{self._health}/health"
        if self._within:
            ask = f"import urllib.request as u; print(u.urlopen({url!r}, timeout=1).read())"
            asked = subprocess.run([*self._within, sys.executable, "-c", ask], check=False, capture_output=True)
            return b'"true"' in asked.stdout
        try:
            with urllib.request.urlopen(url, timeout=1) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def kill(self) -> None:
        """kill -9."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None

    def pause(self) -> None:
        """It answers nobody, and nobody is told."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)  # its threads stop a little later

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    # --- What an administrator does -----------------------------------------------------------------------------------

    def channel(self) -> grpc.Channel:
        if self._tls is None:
            return grpc.insecure_channel(self.address)
        key, cert = self._tls.pair.pems()
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(self._tls.ca.read_bytes(), key, cert))

    def compact(self) -> None:
        """Forgets all that has been replaced."""
        from aetcd import rpc

        with self.channel() as channel:
            stub: Any = rpc.KVStub(channel)
            revision = stub.Range(rpc.RangeRequest(key=b"x"), timeout=5).header.revision
            stub.Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=5)

    def put(self, key: str, value: bytes) -> None:
        from aetcd import rpc

        with self.channel() as channel:
            stub: Any = rpc.KVStub(channel)
            stub.Put(rpc.PutRequest(key=key.encode(), value=value), timeout=5)

    def remove(self, key: str) -> None:
        from aetcd import rpc

        with self.channel() as channel:
            stub: Any = rpc.KVStub(channel)
            assert stub.DeleteRange(rpc.DeleteRangeRequest(key=key.encode()), timeout=5).deleted == 1

    def ask_for_passwords(self, user: str, password: str, prefix: str) -> None:
        """Makes a user who may do everything below a prefix, and nothing else; nobody else may do anything."""
        from aetcd import rpc

        everything = rpc.Permission(permType=rpc.Permission.READWRITE, key=prefix.encode(), range_end=_after(prefix))
        with self.channel() as channel:
            stub: Any = rpc.AuthStub(channel)
            for name, role in (("root", "root"), (user, "topk")):
                stub.UserAdd(rpc.AuthUserAddRequest(name=name, password=password), timeout=5)
                stub.RoleAdd(rpc.AuthRoleAddRequest(name=role), timeout=5)
                stub.UserGrantRole(rpc.AuthUserGrantRoleRequest(user=name, role=role), timeout=5)
            stub.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="topk", perm=everything), timeout=5)
            stub.AuthEnable(rpc.AuthEnableRequest(), timeout=5)


def _after(prefix: str) -> bytes:
    return prefix[:-1].encode() + bytes([ord(prefix[-1]) + 1])
