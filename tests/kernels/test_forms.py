"""The two forms themselves, and the guard against a compiled kernel that was made from another source."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import topk_grpc.kernels
from tests.kernels.forms import DIRECTORY, FORMS, MODULES, Kernels
from topk_grpc.errors import StaleKernelError
from topk_grpc.kernels import check_current

SO = "cpython-311-x86_64-linux-gnu.so"


def test_every_kernel_is_tested() -> None:
    assert {path.stem for path in DIRECTORY.glob("[!_]*.py")} == set(MODULES)


def test_forms_are_what_they_are_called(kernels: Kernels) -> None:
    for module in MODULES:
        file = getattr(kernels, module).__file__
        assert file.endswith(".py") == (kernels.form == "source"), file
    assert kernels.strings.hash_columns is kernels.hash.hash_columns
    assert kernels.split.PlayColumns is kernels.wire.PlayColumns


def test_compiled_says_which_form_is_installed() -> None:
    assert topk_grpc.kernels.compiled() == (FORMS[0].form == "compiled")
    if topk_grpc.kernels.compiled():
        assert {path.name.partition(".")[0] for path in DIRECTORY.glob("*.so")} == set(MODULES)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two kernels as a build leaves them."""
    hashes = {}
    for name in ("one", "two"):
        source = tmp_path / f"{name}.py"
        source.write_text(f"# {name}\n")
        (tmp_path / f"{name}.{SO}").write_bytes(b"machine code")
        hashes[name] = hashlib.sha256(source.read_bytes()).hexdigest()
    (tmp_path / "_build_info.json").write_text(json.dumps(hashes))
    return tmp_path


def test_kernels_as_built_are_taken(directory: Path) -> None:
    check_current(directory)


def test_source_without_compiled_form_is_taken(directory: Path) -> None:
    (directory / "three.py").write_text("# three\n")
    check_current(directory)


def test_edited_source_beside_compiled_kernel_is_refused(directory: Path) -> None:
    (directory / "two.py").write_text("# two, edited\n")
    with pytest.raises(StaleKernelError) as error:
        check_current(directory)
    for part in ("two", str(directory), "pip install -e .", "delete the .so files"):
        assert part in str(error.value)


@pytest.mark.parametrize("lost", ["_build_info.json", "two.py"])
def test_compiled_kernel_of_unknown_origin_is_refused(directory: Path, lost: str) -> None:
    (directory / lost).unlink()
    with pytest.raises(StaleKernelError, match="build again"):
        check_current(directory)


def test_compiled_kernel_missing_in_the_record_is_refused(directory: Path) -> None:
    (directory / "_build_info.json").write_text("{}")
    with pytest.raises(StaleKernelError, match="kernel one"):
        check_current(directory)


def test_nothing_compiled_is_fine_whatever_the_record_says(directory: Path) -> None:
    for path in directory.glob("*.so"):
        path.unlink()
    (directory / "two.py").write_text("# two, edited\n")
    check_current(directory)
    (directory / "_build_info.json").unlink()
    check_current(directory)
