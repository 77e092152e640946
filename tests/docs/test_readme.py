"""The README's commands and code, run from top to bottom as they stand there; only port and directory are others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from tests.cluster.processes import Server, environment, free_port, wait_for

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ADDRESS = "127.0.0.1:50050"
UP = ".venv/bin/topk up "


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def first_steps() -> list[str]:
    """The command blocks of that section, in order, without the installation."""
    section = README.partition("\n## First steps\n")[2].partition("\n## ")[0]
    return re.findall(r"^```sh\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are typed: the `topk` of this environment stands in for the one that `make install` makes."""
    folder = tmp_path_factory.mktemp("readme")
    topk = folder / ".venv/bin/topk"
    topk.parent.mkdir(parents=True)
    topk.write_text(f'#!/bin/sh\nexec {sys.executable} -m topk_grpc "$@"\n')
    topk.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The gateway of the cluster that the README starts."""
    port = free_port()
    [command] = [line for block in first_steps() for line in block.splitlines() if line.startswith(UP)]
    arguments = command.removeprefix(UP).removesuffix(" &").split()
    arguments[arguments.index("--data-dir") + 1] = str(folder / "data")
    server = Server(["up", *arguments, "--port", str(port)], folder / "up")
    try:
        wait_for(lambda: "ready: " in server.out.read_text(), 60, f"the cluster is ready: {server.stderr}")
        yield f"127.0.0.1:{port}"
    finally:
        server.stop()


def run(script: str, folder: Path, address: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        check=False,
        cwd=folder,
        env=environment() | {"TOPK_GATEWAY": address, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_first_steps_work_as_written(folder: Path, address: str) -> None:
    out = ""
    for block in first_steps():
        typed = [line for line in block.splitlines() if not line.startswith((UP, "make "))]
        out += run("\n".join(typed), folder, address)
    [shown] = blocks("text")
    assert shown in out
    assert "plays.csv: 6 plays" in out
    answer = json.loads(out.splitlines()[-1])
    assert answer["certificate"]["complete"]
    assert [entry["count"] for entry in answer["entries"]] == [3, 2, 1]


def test_windows_work_as_written(folder: Path, address: str) -> None:
    """Behind the first steps, whose plays they count."""
    section = README.partition("\n## Windows\n")[2].partition("\n## ")[0]
    [block] = re.findall(r"^```sh\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    totals = re.findall(r"^(\d+) plays of \d songs; exact", run(block, folder, address), flags=re.MULTILINE)
    assert totals == ["2", "1", "2", "2", "3"]
    assert {kind.partition(":")[0] for kind in re.findall(r"--window (\S+)", block)} == {
        *("tumbling", "sliding", "session", "range"),
    }


def test_python_example_works_as_written(folder: Path, address: str) -> None:
    [example] = blocks("python")
    assert ADDRESS in example
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", example.replace(ADDRESS, address)],
        check=False,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "song_id='Boston - More Than a Feeling', count=1000" in done.stdout
    assert done.stdout.rstrip().endswith("True")


def test_grpcurl_call_is_answered_by_reflection(folder: Path, address: str) -> None:
    """grpcurl is not to be had everywhere: what it does is done here, without any code made from our protos."""
    [command] = [block for block in blocks("sh") if block.startswith("grpcurl")]
    found = re.fullmatch(r"grpcurl -plaintext -d '(.*)' \\\n *(\S+) (\S+)/(\S+)\n", command)
    assert found is not None
    body, target, service_name, method_name = found.groups()
    assert target == ADDRESS
    with grpc.insecure_channel(address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert service_name in database.get_services()
        pool = DescriptorPool(database)
        method = pool.FindServiceByName(service_name).FindMethodByName(method_name)
        request = json_format.Parse(body, GetMessageClass(method.input_type)())
        call: grpc.UnaryUnaryMultiCallable[Message, Message] = channel.unary_unary(
            f"/{service_name}/{method_name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = json_format.MessageToDict(call(request, timeout=20))
    assert answer["certificate"]["complete"] is True
    assert answer["bounds"]


def test_both_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`?make (\w+)", README))
    assert {"demo", "test", "install"} <= named
    for target in named - {"it"}:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"
