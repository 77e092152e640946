"""A writer of the topology dies before each of its calls to the system: the old topology stands, or the new one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.topology.topologies import at
from topk_grpc.topology.file import FileTopologyStore

ROOT = Path(__file__).parents[2]
WRITER = """
import json, os, sys
from pathlib import Path
from tests.topology.topologies import at
from topk_grpc.topology.file import FileTopologyStore

left, calls = int(sys.argv[2]), []

def before(event, arguments=()):
    global left
    if left is None or event not in {"open", "os.rename", "os.remove", "fcntl.flock", "fsync"}:
        return
    if event == "open" and isinstance(arguments[0], int):  # a descriptor that is there gets a file object
        return
    if left == 0:
        os._exit(9)  # as after kill -9: nothing is flushed, nothing given back
    left -= 1
    named = Path(str(arguments[event == "os.rename"])).name if arguments and event != "fcntl.flock" else ""
    calls.append(f"{event} {named}".strip())

fsync, os.fsync = os.fsync, lambda descriptor: (before("fsync"), fsync(descriptor))[1]
store = FileTopologyStore(Path(sys.argv[1]))
wanted = at(2, "127.0.0.1:9")
sys.addaudithook(before)
store._compare_and_set(wanted)
left = None
print(json.dumps(calls))
"""


def write(path: Path, calls: int) -> list[str] | None:
    """What the writer did; None if it died after so many calls."""
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path), str(calls)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode in {0, 9}, done.stderr
    return json.loads(done.stdout) if done.returncode == 0 else None


def test_a_writer_that_dies_at_any_step_leaves_the_old_topology_or_the_new_one(tmp_path: Path) -> None:
    old, new = at(1), at(2, "127.0.0.1:9")
    found = []
    for calls in range(100):
        path = tmp_path / f"{calls}" / "topology.json"
        path.parent.mkdir()
        store = FileTopologyStore(path)
        store._compare_and_set(old)
        path.with_name("topology.json.new").write_text("half of one that an earlier writer left")
        done = write(path, calls)
        found.append(store._read())
        if done is not None:
            break
        if found[-1] == old:
            assert write(path, 100) is not None  # the next writer is not held up by it
        assert store._read() == new
    assert done is not None
    # Before the new name everything in it is durable, after it the name is made durable. So whatever a loss of power
    # leaves of what was not synced, a reader sees the whole old file or the whole new one.
    assert done[-5:] == ["open topology.json.new", "fsync", "os.rename topology.json", f"open {calls}", "fsync"]
    assert len(done) == calls >= 8
    renamed = done.index("os.rename topology.json")
    assert found == [old] * (renamed + 1) + [new] * (calls - renamed)
