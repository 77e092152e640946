from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.storage.workload import PATH, Owner, new_disk, write_log
from topk_grpc.errors import CorruptError, DirectoryInUseError, StorageError, VersionError
from topk_grpc.storage import DataDirectory

HOLD = """
import sys
from pathlib import Path
from topk_grpc.storage import DataDirectory
DataDirectory.open(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_missing_or_empty_directory_is_made_and_keeps_its_identity(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "a/b/c", tmp_path / "empty"):
        directory = DataDirectory.open(path)
        assert directory.is_new
        assert len(directory.directory_id) == 32
        directory.close()
        again = DataDirectory.open(path)
        assert not again.is_new
        assert again.directory_id == directory.directory_id
        again.close()


def test_the_root_of_a_fresh_file_system_is_empty_enough(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    assert DataDirectory.open(tmp_path).is_new


def test_a_directory_with_other_things_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(StorageError, match=r"not empty \(it holds thesis.tex\)"):
        DataDirectory.open(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used as a data directory"):
        DataDirectory.open(tmp_path / "file")


def test_a_directory_in_use_by_another_process_is_refused_until_that_dies(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "data")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            with pytest.raises(DirectoryInUseError, match=rf"in use by another process \(process {holder.pid}\): stop"):
                DataDirectory.open(tmp_path / "data")
        finally:
            os.kill(holder.pid, signal.SIGKILL)
            holder.wait()
    directory = DataDirectory.open(tmp_path / "data")
    assert not directory.is_new
    directory.close()


def test_a_directory_is_opened_once_in_a_process_too(tmp_path: Path) -> None:
    directory = DataDirectory.open(tmp_path)
    with pytest.raises(DirectoryInUseError):
        DataDirectory.open(tmp_path)
    directory.close()
    DataDirectory.open(tmp_path).close()


def test_a_newer_directory_is_a_version_error_that_names_both(tmp_path: Path) -> None:
    DataDirectory.open(tmp_path).close()
    content = json.loads((tmp_path / "FORMAT").read_text())
    (tmp_path / "FORMAT").write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(VersionError, match="data format 2, while this release reads up to 1: start the release that"):
        DataDirectory.open(tmp_path)


def test_a_flipped_bit_in_format_never_changes_the_identity() -> None:
    disk = write_log(groups=1)
    path = PATH / "FORMAT"
    content = bytes(disk.map(path))
    for at in range(len(content)):
        for bit in range(8):
            copy = disk.copy()
            copy.write_durably(path, content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            # A flip that makes it a newer version cannot be told from one.
            with pytest.raises((CorruptError, VersionError)):
                DataDirectory.open(PATH, copy)


def test_format_that_is_missing_beside_data_is_corruption() -> None:
    disk = write_log(groups=1)
    disk.remove_durably(PATH / "FORMAT")
    before = disk.files(PATH)
    with pytest.raises(CorruptError, match="FORMAT is missing, but there is data"):
        DataDirectory.open(PATH, disk)
    assert disk.files(PATH) == before


def test_what_an_interrupted_making_left_is_used() -> None:
    disk = new_disk()
    disk.make_directory(PATH)
    disk.make_directory(PATH / "log")
    disk.write_durably(PATH / "log/00000000000000000000.tmp", b"half")
    disk.write_durably(PATH / "FORMAT.tmp", b"half")
    owner = Owner(disk)
    assert owner.directory.is_new
    owner.append()
    owner.close()
    assert [path.name for path in disk.files(PATH)] == ["FORMAT", "LOCK", "00000000000000000000.log"]
