"""A cluster of real processes with TLS, client certificates, tokens and metrics."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import grpc

from tests.cluster.processes import READY_SECONDS, Server, _children, free_port, free_ports, wait_for
from tests.security.certificates import Authority, Pair
from topk_grpc.client import BlockingTopKClient, TlsOptions
from topk_grpc.gateway.tokens import digest_of
from topk_grpc.pb.topk.v1.topk_service_pb2_grpc import TopKServiceStub

TOKENS: Final = {
    "ingester": ("topk_test-ingest-0123456789", ["ingest"], ""),
    "asker": ("topk_test-query-0123456789", ["query"], ""),
    "operator": ("topk_test-admin-0123456789", ["query", "admin"], ""),
    "leaver": ("topk_test-leaver-0123456789", ["ingest", "query"], ""),
    "bygone": ("topk_test-bygone-0123456789", ["ingest", "query", "admin"], "2020-01-01T00:00:00Z"),
}


def tokens_toml(names: list[str]) -> str:
    lines = []
    for name in names:
        token, roles, expires = TOKENS[name]
        lines += ["[[token]]", f'name = "{name}"', f'sha256 = "{digest_of(token)}"', f"roles = {json.dumps(roles)}"]
        lines += [f"expires = {expires}"] if expires else []
    return "\n".join(lines) + "\n"


def bearer(name: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {TOKENS[name][0]}"),)


class Secured:
    """`topk up` with everything switched on."""

    def __init__(self, root: Path, **settings: str) -> None:
        self.root = root
        self.data_dir = root / "data"
        self.own_ca = Authority(root, "own-ca")
        self.client_ca = Authority(root, "client-ca")
        self.foreign_ca = Authority(root, "foreign-ca")
        self.server_pair = self.own_ca.issue("server")
        self.client_pair = self.client_ca.issue("client")
        self.tokens_file = root / "tokens.toml"
        self.tokens_file.write_text(tokens_toml(list(TOKENS)))
        self.port, self.metrics_port = free_port(), free_ports(4)
        self.address = f"127.0.0.1:{self.port}"
        self._settings = {
            "TOPK_TLS_CERT": str(self.server_pair.cert),
            "TOPK_TLS_KEY": str(self.server_pair.key),
            "TOPK_TLS_CA": str(self.own_ca.path),
            "TOPK_TLS_CLIENT_CA": str(self.client_ca.path),
            "TOPK_TOKENS_FILE": str(self.tokens_file),
            "TOPK_METRICS_PORT": str(self.metrics_port),
            "TOPK_LOG_LEVEL": "debug",
            **settings,
        }
        arguments = ["up", "--shards", "2", "--data-dir", str(self.data_dir), "--port", str(self.port)]
        self.server = Server(arguments, root / "up", self._settings)
        wait_for(self._ready, READY_SECONDS, f"the cluster is ready: {self.server.stderr}")

    def _ready(self) -> bool:
        assert self.server.process.poll() is None, self.server.stderr
        return "ready: " in self.server.out.read_text()

    def close(self) -> None:
        if self.server.process.poll() is None:
            self.server.stop()

    # --- Callers ------------------------------------------------------------------------------------------------------

    @contextmanager
    def channel(
        self, pair: Pair | None = None, *, tls: bool = True, ca: Authority | None = None, address: str = ""
    ) -> Iterator[grpc.Channel]:
        """A connection of its own, with the certificate given."""
        target = address or self.address
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        if not tls:
            opened = grpc.insecure_channel(target, options=options)
        else:
            key, cert = pair.pems() if pair is not None else (None, None)
            root = (ca or self.own_ca).path.read_bytes()
            opened = grpc.secure_channel(target, grpc.ssl_channel_credentials(root, key, cert), options=options)
        with opened:
            yield opened

    @contextmanager
    def stub(self) -> Iterator[Any]:
        """With a good certificate; tokens are the caller's."""
        with self.channel(self.client_pair) as channel:
            yield TopKServiceStub(channel)

    @property
    def tls(self) -> TlsOptions:
        return TlsOptions(ca=self.own_ca.path, cert=self.client_pair.cert, key=self.client_pair.key)

    def client(self, token: str | Path, **options: Any) -> BlockingTopKClient:
        return BlockingTopKClient(self.address, tls=self.tls, token=token, **options)

    # --- What can be seen from outside --------------------------------------------------------------------------------

    def metric(self, name: str, label: str = "", *, port: int | None = None) -> float:
        """A value of the gateway's; 0 where it has not been counted yet."""
        with urllib.request.urlopen(f"http://127.0.0.1:{port or self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.search(rf"^{name}{re.escape(label)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def refused(self, reason: str, *, port: int | None = None) -> float:
        return self.metric("topk_calls_refused_total", f'{{reason="{reason}"}}', port=port)

    def handshakes_failed(self, reason: str, *, port: int | None = None) -> float:
        return self.metric("topk_tls_handshakes_failed_total", f'{{reason="{reason}"}}', port=port)

    def events(self, name: str) -> list[dict[str, Any]]:
        found = []
        for line in self.server.stderr.splitlines():
            with suppress(ValueError):
                fields = json.loads(line)
                if fields.get("event") == name:
                    found.append(fields)
        return found

    def pids(self) -> dict[str, int]:
        return _children(self.server.pid)

    def topology(self) -> dict[str, Any]:
        raw: dict[str, Any] = json.loads((self.data_dir / "topology.json").read_text())
        return raw

    def replace(self, path: Path, text: str) -> None:
        """As an operator's tools do: a new file under the old name."""
        new = path.with_name(path.name + ".put")
        new.write_text(text)
        new.replace(path)

    def rotate(self, authority: Authority) -> Pair:
        """The cluster's own certificate and CA become others, in place."""
        fresh = authority.issue("fresh")
        for source, target in (
            (authority.path, self.own_ca.path),
            (fresh.key, self.server_pair.key),
            (fresh.cert, self.server_pair.cert),
        ):
            new = target.with_name(target.name + ".put")
            shutil.copy(source, new)
            new.replace(target)
        return fresh
