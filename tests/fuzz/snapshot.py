"""Targets: snapshots. Files with any bytes in them, and snapshots with parts changed behind their checksums.

A checksum keeps accidents away; what it cannot keep away is a defect of the release that wrote it, or somebody who has
the disk. So every reader behind it holds what it reads against what it needs: a snapshot is refused with a
`CorruptError`, or the state that comes out of it can be asked, counted on and saved again without harm.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any, Final

import numpy as np

from tests.engine.engine_shard import NOW
from tests.fuzz.harness import INTERESTING, Choices, Target, change, change_json, refusing
from tests.shard.cores import PATH, batch, commit, new_disk, numbered, open_core, take_snapshot
from tests.storage.simulated_disk import SimulatedDisk
from topk_grpc.engine import cells, query
from topk_grpc.engine.query import Scope
from topk_grpc.errors import CorruptError, ForeignDirectoryError, OutOfRangeError, VersionError
from topk_grpc.model import Bounds, Play
from topk_grpc.shard.core import ShardCore
from topk_grpc.storage import Block, DataDirectory, Snapshot
from topk_grpc.storage.array_files import DamagedFileError, read_arrays, read_column, write_arrays, write_column
from topk_grpc.storage.checksums import crc32c
from topk_grpc.storage.manifest import decode_manifest, encode_manifest
from topk_grpc.storage.snapshot import SnapshotStore

cells.CHUNK_CELLS = 1 << 8  # type: ignore[misc]  # a state that costs little to make

STANDING: Final = "session:1m,sliding:10m,tumbling:1h"
FILE_BYTES_MAX: Final = 1 << 16

# --- A shard with something of everything -----------------------------------------------------------------------------


def _sample() -> tuple[SimulatedDisk, Snapshot]:
    disk = new_disk()
    core = open_core(PATH, disk, standing_windows=STANDING, tiers="1s:1h,1m:*")
    core.configure(NOW)
    for sequence in range(1, 5):
        commit(
            core, numbered(sequence), batch(sequence, Play("é", NOW - sequence * 5000, 2, ("de", "fr")), producer="q")
        )
    commit(core, batch(9, Play("late", NOW - 7_200_000, 3), Play("gone", NOW + 10**9), producer="r"))
    core.move_standing(NOW + 4000)
    take_snapshot(core)
    commit(core, numbered(5))
    take_snapshot(core)
    commit(core, numbered(6))
    core.close()
    store = SnapshotStore(DataDirectory.open(PATH, disk.copy()))
    snapshot = store.load([])
    assert snapshot is not None
    assert snapshot.blocks
    return disk, snapshot


DISK, SNAPSHOT = _sample()
_ARRAYS: Final = sorted(SNAPSHOT.arrays)
_COLUMNS: Final = [(block, name) for block in range(len(SNAPSHOT.blocks)) for name in ("buckets", "counts", "entries")]


def _change_array(choices: Choices, array: Any) -> Any:
    """Another one: elements changed, more or fewer, of another type or shape."""
    changed = np.array(array)
    for _ in range(1 + choices.below(2)):
        match choices.below(10):
            case 0:
                changed = changed[: choices.below(len(changed) + 1)] if changed.ndim else changed
            case 1:
                changed = np.concatenate([changed, changed[: choices.below(5)]]) if changed.ndim else changed
            case 2:
                dtype = choices.pick("<i8", "<i4", "u1", "<u8", "<f8", "<i2", "?", "S3", ">i8", "<M8[s]")
                changed = changed.astype(dtype) if changed.dtype.kind in "iuf" else changed
            case 3:
                changed = choices.pick(changed.reshape(1, -1), changed.reshape(-1), changed.reshape(-1, 1), changed[:0])
            case 4 if changed.size > 1:
                changed.reshape(-1)[:] = changed.reshape(-1)[::-1].copy()
            case _ if changed.size and changed.dtype.kind in "iu":
                flat, at = changed.reshape(-1), choices.below(1 << 16) % changed.size
                value = choices.pick(
                    *(int(flat[at]) + choices.below(9) - 4, choices.number(), int(flat[at - 1])),
                    INTERESTING[choices.below(len(INTERESTING))],
                )
                bits = np.iinfo(changed.dtype)
                flat[at] = (value - int(bits.min)) % (1 << bits.bits) + int(bits.min)
    return changed


def changed_snapshot(choices: Choices) -> Snapshot:
    arrays = dict(SNAPSHOT.arrays)
    blocks = [Block(block.block_id, dict(block.columns)) for block in SNAPSHOT.blocks]
    meta: Any = json.loads(json.dumps(SNAPSHOT.meta))
    for _ in range(choices.below(4)):
        match choices.below(8):
            case 0:
                arrays.pop(_ARRAYS[choices.below(len(_ARRAYS))], None)
            case 1 | 2:
                block, name = _COLUMNS[choices.below(len(_COLUMNS))]
                columns: Any = blocks[block].columns
                columns[name] = _change_array(choices, columns[name])
            case 3 | 4:
                meta = change_json(choices, meta)
            case _:
                name = _ARRAYS[choices.below(len(_ARRAYS))]
                if name in arrays:
                    arrays[name] = _change_array(choices, arrays[name])
    if not isinstance(meta, dict):
        meta = {}
    return Snapshot(SNAPSHOT.position, meta, arrays, tuple(blocks))


# --- Targets ----------------------------------------------------------------------------------------------------------


def restore(data: bytes) -> None:
    """A snapshot whose bytes are as they were written, and whose content is not what was meant."""
    core = _new_core()
    with refusing(CorruptError, VersionError, ForeignDirectoryError):
        core._restore(changed_snapshot(Choices(data)))
        use(core)


def _new_core() -> ShardCore:
    core = ShardCore.__new__(ShardCore)
    core._settings, core._cluster = _TEMPLATE._settings, _TEMPLATE._cluster
    core._directory, core._sessions_due_ms = _TEMPLATE._directory, 0
    return core


_TEMPLATE: Final = open_core(PATH, DISK.copy(), standing_windows=STANDING)


def use(core: ShardCore) -> None:
    """Asks a state everything, counts on it, and saves it. What can be asked of a sound state can be asked of this."""
    state = core.state
    query.charts(state)
    for chart in ("", "x"):
        for scope in (
            Scope(chart),
            Scope(chart, Bounds(NOW - 3_600_000, NOW + 3_600_000)),
            Scope(chart, Bounds(NOW - 55_000, NOW + 5000), 60_000),
        ):
            with refusing(OutOfRangeError):
                best, _ = query.top_k(state, scope, 100)
                query.top_k(state, scope, 3)
                query.counts_of(state, scope, ["shared-1", "é", "unheard of", *best.song_ids[:1]])
                query.standings(state, scope, [("shared-0", 3), ("", 1)], 2)
    from tests.engine.engine_shard import append_request
    from topk_grpc.engine.admission import admit, read_request
    from topk_grpc.engine.apply import apply

    plays = (Play("shared-1", NOW, 1, ("x",)), Play("new", NOW, 5, ("y",)), Play("shared-2", NOW + 4000, -1, ("x",)))
    for part in (batch(1, *plays), batch(77, *plays), batch(1, *plays, producer="fresh")):
        apply(state, admit(state, read_request(append_request([part])), core.limits(NOW)))
    core._move_sessions(NOW + 60_000)
    state.producers.forget_idle(NOW - 1000)
    meta, arrays = state.to_snapshot()
    json.dumps(meta)
    for name, board in state.boards.items():
        roll_up = state.roll_up
        for merge in cells.choose_merges(
            board.cells.take_chunks(), dict(board.cells.blocks), board.cells.done, roll_up
        ):
            merge.cells(roll_up)
        assert f"{name}.counts" in arrays


class FilesOf:
    """Files in memory, for reading."""

    def __init__(self, files: dict[Path, bytes]) -> None:
        self.files = files

    def names(self, directory: Path) -> list[str]:
        return sorted({path.relative_to(directory).parts[0] for path in self.files if directory in path.parents})

    def map(self, path: Path, *, changing: bool = False) -> memoryview:
        if path not in self.files:
            raise FileNotFoundError(path)
        return memoryview(self.files[path])


class Memory:
    """A file in memory, for writing."""

    def __init__(self) -> None:
        self.data = bytearray()

    def create(self, _path: Path, **_how: bool) -> Memory:
        return self

    def write(self, offset: int, pieces: Any) -> None:
        assert offset == len(self.data)
        for piece in pieces:
            self.data += piece

    def sync(self) -> None:
        pass

    close = sync


def _column_bytes(array: Any) -> bytes:
    file = Memory()
    write_column(file, Path("/x"), array)  # type: ignore[arg-type]
    return bytes(file.data)


def _array_bytes(**arrays: Any) -> bytes:
    file = Memory()
    write_arrays(file, Path("/x"), arrays)  # type: ignore[arg-type]
    return bytes(file.data)


_COLUMN: Final = _column_bytes(np.arange(4, dtype=np.int32))
_NPZ: Final = _array_bytes(a=np.arange(3), b=np.zeros((2, 2), np.uint8), c=np.empty(0, np.int32))


def column(data: bytes) -> None:
    """A .npy file: any bytes, or a valid one with some of them changed."""
    choices = Choices(data)
    content = choices.rest() if choices.below(2) else change(choices, _COLUMN)
    with refusing(DamagedFileError):
        array = read_column(memoryview(content), Path("/blocks/1.npy"))
        assert array.nbytes <= len(content)
        assert not array.dtype.hasobject
        expected = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        assert expected.dtype == array.dtype
        assert expected.tobytes() == array.tobytes()


def arrays(data: bytes) -> None:
    """A .npz file: any bytes, or a valid one with some of them changed. Never more memory than the file has bytes."""
    choices = Choices(data)
    content = choices.rest() if choices.below(2) else change(choices, _NPZ)
    with refusing(DamagedFileError):
        read = read_arrays(memoryview(content), Path("/arrays.npz"))
        assert all(array.nbytes <= len(content) for array in read.values())


def manifest(data: bytes) -> None:
    """A manifest: any bytes, or other members under a right checksum."""
    choices = Choices(data)
    if choices.below(3) == 0:
        content = choices.rest()
    else:
        body = choices.rest() if choices.below(3) == 0 else _json_body(change_json(choices, _MANIFEST))
        content = b'{"crc32c": "%08x", ' % crc32c(body) + body
    with refusing(DamagedFileError, VersionError):
        decoded = decode_manifest(content, Path("/snapshots/000001/manifest.json"))
        assert decode_manifest(encode_manifest(decoded), Path("/again")) == decoded


def _json_body(content: Any) -> bytes:
    return json.dumps(content).encode()[1:] + b"\n"


def _manifest_of(disk: SimulatedDisk) -> tuple[Path, dict[str, Any]]:
    path = [path for path in disk.files(PATH / "snapshots") if path.name == "manifest.json"][-1]
    content = json.loads(bytes(disk.map(path)))
    del content["crc32c"]
    return path, content


_MANIFEST_PATH, _MANIFEST = _manifest_of(DISK)


def store(data: bytes) -> None:
    """The directory of a shard's snapshots, any file of which has changed, with the seals that belong to it."""
    choices = Choices(data)
    content = {path: bytes(DISK.map(path)) for path in DISK.files(PATH) if "/log/" not in str(path)}
    told = json.loads(json.dumps(_MANIFEST))
    touched = sorted(path for path in content if path.suffix in {".npy", ".npz"} and "000001" not in path.parts)
    path = touched[choices.below(len(touched))]
    content[path] = change(choices, content[path])
    if choices.below(4):
        _reseal(told, path, content[path])
    if choices.below(2):
        told = change_json(choices, told)
    body = _json_body(told) if isinstance(told, dict) else b"}"
    content[_MANIFEST_PATH] = b'{"crc32c": "%08x", ' % crc32c(body) + body
    if choices.below(16) == 1:
        del content[touched[choices.below(len(touched))]]
    directory = DataDirectory(PATH, FilesOf(content), None, "0" * 32, is_new=False)  # type: ignore[arg-type]
    notes: list[str] = []
    with refusing(VersionError):
        loaded = SnapshotStore(directory).load(notes)
        assert loaded is not None or notes
        assert all(re.match(r"snapshot \d{6} is damaged: .+", note) for note in notes)


def _reseal(told: dict[str, Any], path: Path, content: bytes) -> None:
    seal = {"bytes": len(content), "crc32c": f"{crc32c(content):08x}"}
    if path.suffix == ".npz":
        told["arrays"] = seal
        return
    number, name, _ = path.name.split(".")
    for block in told["blocks"]:
        if block["block_id"] == int(number):
            block["columns"][name] = seal


# --- Seeds ------------------------------------------------------------------------------------------------------------


def _restore_seeds() -> list[bytes]:
    kinds = [bytes([1, kind, at, at, 5, at, 3, at]) for kind in range(8) for at in range(0, 40, 3)]
    return [b"\0", *kinds, bytes(range(60)), bytes([3, 7, 5, 3, 1, 4, 2, 6] * 6)]


def _change_seeds(whole: bytes) -> list[bytes]:
    return [
        b"\1" + whole,
        b"\0\1\0\0\0\5",
        b"\0\2\20\0\3\5\7\0",
        *(bytes([0, 2, at, 0, 0, 7]) for at in range(0, 255, 7)),
    ]


def _manifest_seeds() -> list[bytes]:
    valid = encode_manifest(decode_manifest(bytes(DISK.map(_MANIFEST_PATH)), _MANIFEST_PATH))
    return [
        b"\0" + valid,
        b"\1\0" + _json_body(_MANIFEST),
        *(bytes([1, 1, *range(at, at + 24)]) for at in range(0, 200, 8)),
    ]


def _store_seeds() -> list[bytes]:
    return [bytes([at, 1, at, 0, at % 5, at, at, 1, 1, at, 7]) for at in range(0, 250, 9)]


TARGETS = (
    Target("manifest", manifest, _manifest_seeds, 10, 1200),
    Target("column", column, lambda: _change_seeds(_COLUMN), 10, 400),
    Target("arrays", arrays, lambda: _change_seeds(_NPZ), 10, 1200),
    Target("store", store, _store_seeds, 3, 200),
    Target("restore", restore, _restore_seeds, 3, 200),
)
