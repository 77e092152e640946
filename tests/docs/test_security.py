"""docs/security.md: its recipe is run as it stands; only the port is another."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.processes import Server, environment, free_port, wait_for
from tests.security.certificates import Authority
from tests.topology.etcd_server import EtcdServer, Tls, needs_etcd
from tests.topology.topologies import FIRST
from topk_grpc.errors import SettingError
from topk_grpc.gateway.tokens import parse_tokens
from topk_grpc.topology import StoreAccess, open_store

pytestmark = pytest.mark.cluster

PAGE = (Path(__file__).parents[2] / "docs/security.md").read_text()
RECIPE = PAGE.partition("\n## A recipe\n")[2].partition("\n## ")[0]
AUTHORITY, TOKENS, UP, CLIENT = re.findall(r"^```sh\n(.*?)^```$", RECIPE, re.DOTALL | re.MULTILINE)
[PROGRAM] = re.findall(r"^```python\n(.*?)^```$", RECIPE, re.DOTALL | re.MULTILINE)


def run(folder: Path, *command: str, **variables: str) -> str:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        check=False,
        cwd=folder,
        env=environment() | {"PATH": path, "COLUMNS": "100"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def shell(folder: Path, script: str, **variables: str) -> str:
    return run(folder, "bash", "-euo", "pipefail", "-c", script, **variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not on this machine: install it to run the recipe")
    folder = tmp_path_factory.mktemp("recipe")
    topk = folder / "bin/topk"
    topk.parent.mkdir()
    topk.write_text(f'#!/bin/sh\nexec {sys.executable} -m topk_grpc "$@"\n')
    topk.chmod(0o755)
    shell(folder, AUTHORITY)
    shell(folder, TOKENS)
    return folder


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[str]:
    port = free_port()
    words = UP.replace("\\\n", " ").removesuffix(" &\n").split()
    assert words.pop(0) == "topk"
    arguments = [str(folder / word) if re.search(r"\.(pem|key|toml)$|^data$", word) else word for word in words]
    server = Server([*arguments, "--port", str(port)], folder / "up")
    try:
        wait_for(lambda: "ready: " in server.out.read_text(), 60, f"the cluster is ready: {server.stderr}")
        yield f"127.0.0.1:{port}"
    finally:
        server.stop()


def test_the_recipe_works_as_written(folder: Path, gateway: str) -> None:
    out = shell(folder, CLIENT, TOPK_GATEWAY=gateway)
    assert "plays.csv: 1 plays" in out
    assert "Barracuda" in out
    shown = run(folder, sys.executable, "-W", "error", "-c", PROGRAM.replace("127.0.0.1:50050", gateway))
    assert "song_id='Barracuda', count=1" in shown


@needs_etcd
@pytest.mark.skipif(shutil.which("etcdctl") is None, reason="there is no etcdctl: install it (Debian: etcd-client)")
async def test_the_recipe_for_etcd_works_as_written(tmp_path: Path) -> None:
    [commands] = re.findall(
        r"^```sh\n(.*?)^```$", PAGE.partition("\n## etcd\n")[2].partition("\n## ")[0], re.DOTALL | re.MULTILINE
    )
    authority = Authority(tmp_path, "ca")
    pair = authority.issue("administrator")
    for user in ("root", "topk"):
        (tmp_path / f"{user}.password").write_text(f"password-of-{user}\n")
    server = EtcdServer(tmp_path / "etcd", Tls(authority.path, authority.issue("etcd")))
    try:
        server.start()
        certificates = {"CACERT": authority.path, "CERT": pair.cert, "KEY": pair.key}
        given = {"API": "3", "ENDPOINTS": f"https://{server.address}"} | {k: str(v) for k, v in certificates.items()}
        shell(tmp_path, commands, **{f"ETCDCTL_{name}": value for name, value in given.items()})
        access = StoreAccess(
            str(authority.path), str(pair.cert), str(pair.key), "topk", str(tmp_path / "topk.password")
        )
        own, other = open_store(server.url("clusters/one"), access), open_store(server.url("clusters/two"), access)
        await own.compare_and_set(FIRST)
        assert await own.read() == FIRST
        with pytest.raises(SettingError, match="permission denied"):
            await other.read()
        await own.close()
        await other.close()
    finally:
        server.kill()


def test_the_example_of_a_tokens_file_is_one() -> None:
    [example] = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    [token] = parse_tokens(example.encode(), "the example").values()
    assert (token.name, token.plays_per_second) == ("importer", 50_000)
