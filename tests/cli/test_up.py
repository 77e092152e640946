"""`topk up` with real processes: what it starts, what it survives, what it refuses."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.cluster


def write_plays(path: Path, songs: int) -> str:
    path.write_text("song,t\n" + "".join(f"song {song},2020-01-01 00:00:{song % 60:02}\n" for song in range(songs)))
    return str(path)


def ingest(run_topk: Any, file: str, gateway: str) -> None:
    done = run_topk("ingest", file, "--song", "song", "--time", "t", gateway=gateway)
    assert done.returncode == 0, done.stderr


def total(run_json: Any, gateway: str) -> int:
    return int(run_json("top", "-k", "1", gateway=gateway)["certificate"]["total_plays"])


def error_line(up: Any) -> str:
    lines = [line for line in up.errors if line.startswith("error: ")]
    assert [line for line in up.errors if "Traceback" in line] == []
    assert len(lines) == 1, up.errors
    return str(lines[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_starts_stops_and_keeps_the_plays(
    tmp_path: Path, start_up: Any, run_topk: Any, run_json: Any, number: int
) -> None:
    file = write_plays(tmp_path / "a.csv", 100)
    up = start_up(tmp_path / "data", "--shards", "3")
    gateway = up.wait_ready()
    assert up.children().keys() == {"gateway", "controller", "shard-0", "shard-1", "shard-2"}
    ingest(run_topk, file, gateway)
    status = run_json("cluster", "status", gateway=gateway)
    assert [shard["shard_id"] for shard in status["shards"]] == ["shard-0", "shard-1", "shard-2"]
    assert sum(shard["slots"] for shard in status["shards"]) == 1024
    assert up.stop(number) == 0
    assert not up.children()

    again = start_up(tmp_path / "data")  # as many shards as there were
    assert total(run_json, again.wait_ready()) == 100
    assert again.stop() == 0


def test_a_killed_shard_and_gateway_come_back(
    tmp_path: Path, start_up: Any, run_topk: Any, run_json: Any, until: Callable[..., Any]
) -> None:
    up = start_up(tmp_path / "data", "--shards", "2")
    gateway = up.wait_ready()
    ingest(run_topk, write_plays(tmp_path / "a.csv", 50), gateway)
    for role in ("shard-1", "gateway", "controller", "shard-0"):
        before = up.children()[role]
        os.kill(before, signal.SIGKILL)
        until(lambda role=role, before=before: up.children().get(role, before) != before, f"{role} is started again")
    until(lambda: run_topk("top", gateway=gateway).returncode == 0, "the cluster answers again")
    assert total(run_json, gateway) == 50
    ingest(run_topk, write_plays(tmp_path / "b.csv", 70), gateway)
    assert total(run_json, gateway) == 120


def test_children_end_when_the_supervisor_is_killed(tmp_path: Path, start_up: Any, run_json: Any, until: Any) -> None:
    up = start_up(tmp_path / "data", "--shards", "2")
    up.wait_ready()
    children = up.children()
    assert len(children) == 4
    up.process.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children.values()), "no child outlives it")
    again = start_up(tmp_path / "data")
    assert total(run_json, again.wait_ready()) == 0


def test_a_start_right_after_a_kill_waits_for_the_old_processes(tmp_path: Path, start_up: Any, run_json: Any) -> None:
    up = start_up(tmp_path / "data", "--shards", "2")
    up.wait_ready()
    up.process.kill()
    up.process.wait()
    assert total(run_json, start_up(tmp_path / "data").wait_ready()) == 0


def test_a_data_directory_in_use_is_refused(tmp_path: Path, start_up: Any) -> None:
    up = start_up(tmp_path / "data", "--shards", "1")
    up.wait_ready()
    second = start_up(tmp_path / "data", "--shards", "1")
    assert second.wait_end() == 1
    assert "in use by another process" in error_line(second)
    assert f"pid {up.process.pid}" in error_line(second)
    assert up.stop() == 0


def test_more_shards_join_at_the_start_and_fewer_are_refused(
    tmp_path: Path, start_up: Any, run_topk: Any, run_json: Any, until: Any
) -> None:
    up = start_up(tmp_path / "data", "--shards", "2")
    ingest(run_topk, write_plays(tmp_path / "a.csv", 500), up.wait_ready())
    up.stop()
    grown = start_up(tmp_path / "data", "--shards", "3")
    gateway = grown.wait_ready()

    def even() -> bool:
        return {shard["slots"] for shard in run_json("cluster", "status", gateway=gateway)["shards"]} == {341, 342}

    until(even, "the new shard has its share")
    assert total(run_json, gateway) == 500
    grown.stop()
    fewer = start_up(tmp_path / "data", "--shards", "2")
    assert fewer.wait_end() == 1
    assert "--shards is 2, but the cluster" in error_line(fewer)
    assert "has 3" in error_line(fewer)
    assert "topk cluster drain shard-2" in error_line(fewer)


def test_what_is_for_good_is_refused_otherwise(tmp_path: Path, start_up: Any, run_json: Any) -> None:
    up = start_up(tmp_path / "data", "--shards", "2", "--slots", "64", "--partitioner", "modulo")
    status = run_json("cluster", "status", gateway=up.wait_ready())
    assert (status["slots"], status["partitioner"]) == (64, "modulo")
    up.stop()
    for given in (("--slots", "65"), ("--partitioner", "ring")):
        again = start_up(tmp_path / "data", *given)
        assert again.wait_end() == 1
        assert f"{given[0]} is {given[1]}, but the cluster" in error_line(again)
    start_up(tmp_path / "data", "--slots", "64", "--partitioner", "modulo").wait_ready()


def test_a_port_in_use_is_refused_at_once(tmp_path: Path, start_up: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        began = time.monotonic()
        up = start_up(tmp_path / "data", "--port", str(port))
        assert up.wait_end() == 1
        assert time.monotonic() - began < 10
    assert f"127.0.0.1:{port}" in error_line(up)
    assert "Address already in use" in error_line(up)


def test_a_foreign_directory_is_refused(tmp_path: Path, start_up: Any) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    up = start_up(tmp_path / "home")
    assert up.wait_end() == 1
    assert "letter.txt" in error_line(up)
    file = start_up(tmp_path / "home" / "letter.txt")
    assert file.wait_end() == 1
    assert "is a file" in error_line(file)


def test_an_address_of_another_machine_is_refused(tmp_path: Path, start_up: Any) -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        up = start_up(tmp_path / "data", "--host", host, "--plaintext")
        assert up.wait_end() == 1
        assert host in error_line(up)


def test_a_damaged_log_is_named(tmp_path: Path, start_up: Any, run_topk: Any) -> None:
    up = start_up(tmp_path / "data", "--shards", "2")
    gateway = up.wait_ready()
    ingest(run_topk, write_plays(tmp_path / "a.csv", 5000), gateway)
    ingest(run_topk, write_plays(tmp_path / "b.csv", 6000), gateway)
    up.kill_everything()  # a graceful stop would leave a snapshot, and the log before it is not read
    segment = max((tmp_path / "data" / "shard-1" / "log").iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(segment.read_bytes())
    raw[len(raw.rstrip(b"\0")) // 3] ^= 0x10  # the rest of the segment is reserved, and empty
    segment.write_bytes(raw)
    damaged = start_up(tmp_path / "data")
    assert damaged.wait_end() == 1
    assert "shard-1 does not start" in error_line(damaged)
    assert str(segment.name) in error_line(damaged)
    assert "exit status 3)" in error_line(damaged)  # and was not tried again, which could not help
    assert not any("shard-1" in line and "started again" in line for line in damaged.errors)
    assert not damaged.lines  # never ready
    assert not damaged.children()


def test_a_newer_format_is_named(tmp_path: Path, start_up: Any) -> None:
    up = start_up(tmp_path / "data", "--shards", "1")
    up.wait_ready()
    up.stop()
    path = tmp_path / "data" / "shard-0" / "FORMAT"
    from topk_grpc.storage.checksums import decode_self_checked, encode_self_checked

    content = decode_self_checked(path.read_bytes()) or {}
    path.write_bytes(encode_self_checked({**content, "format": 99}))
    newer = start_up(tmp_path / "data")
    assert newer.wait_end() == 1
    assert "99" in error_line(newer)


def test_settings_reach_the_servers(tmp_path: Path, start_up: Any, run_topk: Any, run_json: Any) -> None:
    up = start_up(
        tmp_path / "data", "--shards", "1", "--k-max", "50", environment={"TOPK_HEAP_SIZE": "20", "TOPK_LISTEN": "x"}
    )
    gateway = up.wait_ready()
    assert run_json("cluster", "status", gateway=gateway)["k_max"] == 50
    refused = run_topk("top", "-k", "51", gateway=gateway)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "1 to 50" in refused.stderr


def test_usage_errors_exit_with_2(tmp_path: Path, run_topk: Any) -> None:
    for arguments in (
        ["up"],
        ["up", "--data-dir", str(tmp_path), "--shards", "0"],
        ["shard"],
        ["nosuch"],
        ["top", "-k", "x"],
    ):
        assert run_topk(*arguments).returncode == 2
    assert not list(tmp_path.iterdir())
