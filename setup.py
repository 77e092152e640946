"""Generates the protobuf code and compiles the kernels; everything else stands in pyproject.toml.

A kernel that does not compile fails the build, so that nobody runs the slow form without knowing. TOPK_NO_COMPILE=1
asks for that form: the same results, hundreds of times slower. TOPK_BOUNDS_CHECKS=1 compiles with every array access
checked. TOPK_SANITIZE=1 compiles for fuzzing (`make fuzz-build`): array accesses checked, and with clang's address and
undefined-behaviour sanitizers and its coverage counters; such kernels load only where these are preloaded.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PROTOS = Path("protos")
GENERATED = Path("topk_grpc/pb")
KERNELS = Path("topk_grpc/kernels")
BUILD_INFO = KERNELS / "_build_info.json"


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


COMPILE = not is_set("TOPK_NO_COMPILE")
CLANG = os.environ.get("CLANG", "clang")
SANITIZE = is_set("TOPK_SANITIZE")
BOUNDS_CHECKS = SANITIZE or is_set("TOPK_BOUNDS_CHECKS")


# --- Protobuf code ----------------------------------------------------------------------------------------------------


def write_plugin(directory: Path, name: str, function: str) -> Path:
    """A launcher of a mypy-protobuf plugin for protoc.

    Where pip puts the plugins' own scripts depends on how it builds; what this process can import, its launcher can.
    """
    launcher = directory / name
    path = os.pathsep.join(entry for entry in sys.path if entry)
    code = f"from mypy_protobuf.main import {function}; {function}()"
    command = shlex.join([sys.executable, "-c", code])
    launcher.write_text(f"#!/bin/sh\nPYTHONPATH={shlex.quote(path)} exec {command}\n")
    launcher.chmod(0o755)
    return launcher


def generate_protobuf() -> None:
    """Runs protoc into topk_grpc/pb and makes the generated imports absolute."""
    from grpc_tools import protoc

    protos = sorted(str(path) for path in PROTOS.rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        plugins = {name: write_plugin(Path(scratch), f"protoc-gen-{name}", function) for name, function in PLUGINS}
        status = protoc.main(
            [
                *("protoc", f"--proto_path={PROTOS}"),
                *(f"--plugin=protoc-gen-{name}={launcher}" for name, launcher in plugins.items()),
                *(f"--python_out={out}", f"--grpc_python_out={out}"),
                *(f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}"),
                *protos,
            ]
        )
        if status:
            raise SystemExit(f"protoc failed with status {status}; its messages stand above")
        for path in sorted([*out.rglob("*.py"), *out.rglob("*.pyi")]):
            write_if_changed(GENERATED / path.relative_to(out), absolute_imports(path.read_text()))


PLUGINS = (("mypy", "main"), ("mypy_grpc", "grpc"))


def absolute_imports(text: str) -> str:
    """The proto path stays topk/v1, whatever package the generated code lies in."""
    text = re.sub(r"^from topk\.", "from topk_grpc.pb.topk.", text, flags=re.MULTILINE)
    text = re.sub(r"^import topk\.", "import topk_grpc.pb.topk.", text, flags=re.MULTILINE)
    return re.sub(r"(?<![\w./\"'])topk\.v1\.(\w+_pb2)", r"topk_grpc.pb.topk.v1.\1", text)


def write_if_changed(path: Path, text: str) -> None:
    """Leaves an equal file alone, and never shows half a file to a process that imports it meanwhile."""
    if path.exists() and path.read_text() == text:
        return
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


class BuildPy(build_py):
    """Generates the protobuf code first, and ships the protos beside it for clients in other languages."""

    def run(self) -> None:
        generate_protobuf()
        if self.editable_mode and not COMPILE:
            # The uncompiled kernels would stand in the shadow of compiled ones from before.
            for stale in [*KERNELS.glob("*.so"), BUILD_INFO]:
                stale.unlink(missing_ok=True)
        super().run()
        if not self.editable_mode:
            for proto in PROTOS.rglob("*.proto"):
                target = Path(self.build_lib) / GENERATED / proto.relative_to(PROTOS)
                self.mkpath(str(target.parent))
                self.copy_file(str(proto), str(target))


# --- Kernels ----------------------------------------------------------------------------------------------------------


class BuildExt(build_ext):
    """Compiles, then records the hash of each source, so that an edited source beside an old kernel is seen."""

    def run(self) -> None:
        # Taken before: should a source be edited meanwhile, the record does not fit it and the import says so.
        sources = {extension.name.rpartition(".")[2]: Path(extension.sources[0]) for extension in self.extensions}
        hashes = {name: hashlib.sha256(source.read_bytes()).hexdigest() for name, source in sources.items()}
        super().run()
        if hashes:
            record = BUILD_INFO if self.inplace else Path(self.build_lib) / BUILD_INFO
            record.write_text(json.dumps(hashes, indent=1, sort_keys=True) + "\n")

    def build_extensions(self) -> None:
        from Cython.Build import cythonize

        translated = cythonize(
            [Extension(extension.name, extension.sources) for extension in self.extensions],
            build_dir="build/cython-sanitized" if SANITIZE else "build/cython",
            force=True,  # time stamps know nothing of directives, nor of sources checked out with an older one
            compiler_directives={
                "language_level": 3,
                "boundscheck": BOUNDS_CHECKS,
                "wraparound": False,
                "cdivision": True,
                "initializedcheck": BOUNDS_CHECKS,
                "annotation_typing": True,
            },
        )
        for extension, c_form in zip(self.extensions, translated, strict=True):
            extension.sources = c_form.sources
        self.force = True
        self.parallel = self.parallel or os.cpu_count()
        try:
            super().build_extensions()
        except Exception:
            print(
                "error: a kernel did not compile. A C compiler and Python's headers are needed (gcc, python3-dev);"
                " TOPK_NO_COMPILE=1 installs the kernels uncompiled: the same results, hundreds of times slower",
                file=sys.stderr,
            )
            raise


def kernels() -> list[Extension]:
    if not COMPILE:
        return []
    flags = ["-O3", "-g0"]
    if SANITIZE:
        os.environ.update(CC=CLANG, LDSHARED=f"{CLANG} -shared")
        sanitizers = "-fsanitize=fuzzer-no-link,address,undefined"
        flags = ["-O2", "-gline-tables-only", "-fno-omit-frame-pointer", sanitizers, "-fno-sanitize-recover=all"]
    sources = sorted(KERNELS.glob("[!_]*.py"))
    return [Extension(f"topk_grpc.kernels.{path.stem}", [str(path)], extra_compile_args=flags) for path in sources]


class Build(build):
    """Starts from nothing: what an earlier build left in build/lib… would be packed into this one's wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


os.chdir(ROOT)
setup(ext_modules=kernels(), cmdclass={"build": Build, "build_py": BuildPy, "build_ext": BuildExt})
