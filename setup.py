"""Generates the protobuf code and compiles the kernels; everything else stands in pyproject.toml.

TOPK_NO_COMPILE=1 installs the kernels uncompiled: the same results, hundreds of times slower. Without it a kernel that
does not compile fails the build.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
KERNELS = Path("topk_grpc/kernels")
BUILD_INFO = KERNELS / "_build_info.json"
COMPILE = os.environ.get("TOPK_NO_COMPILE", "") in ("", "0")


def kernel_sources() -> list[str]:
    return sorted(str(path) for path in KERNELS.glob("[!_]*.py"))


def generate_protobuf() -> None:
    """Runs protoc into topk_grpc/pb and makes the generated imports absolute."""
    out = Path("topk_grpc/pb")
    protos = sorted(str(path) for path in Path("protos").rglob("*.proto"))
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])
    environment = os.environ | {"PATH": scripts + os.pathsep + os.environ.get("PATH", "")}
    # pip's isolated build keeps the plugins beside its own site-packages, not beside the interpreter.
    for entry in sys.path:
        plugin = Path(entry).parent.parent.parent / "bin" / "protoc-gen-mypy"
        if plugin.exists():
            environment["PATH"] = str(plugin.parent) + os.pathsep + environment["PATH"]
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "--proto_path=protos"),
            *(f"--python_out={out}", f"--grpc_python_out={out}"),
            *(f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}"),
            *protos,
        ],
        check=True,
        env=environment,
    )
    for path in [*out.rglob("*_pb2*.py"), *out.rglob("*_pb2*.pyi")]:
        text = path.read_text()
        text = re.sub(r"^from topk\.", "from topk_grpc.pb.topk.", text, flags=re.MULTILINE)
        text = re.sub(r"^import topk\.", "import topk_grpc.pb.topk.", text, flags=re.MULTILINE)
        text = re.sub(r"(?<![\w./\"'])topk\.v1\.(\w+_pb2)", r"topk_grpc.pb.topk.v1.\1", text)
        path.write_text(text)


class BuildPy(build_py):
    def run(self) -> None:
        generate_protobuf()
        super().run()


class BuildExt(build_ext):
    """Compiles, then records the hash of each compiled source, so that an edited source beside an old kernel is seen."""

    def run(self) -> None:
        super().run()
        if self.extensions:
            hashes = {Path(p).stem: hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in kernel_sources()}
            targets = {BUILD_INFO} if self.inplace else {Path(self.build_lib) / BUILD_INFO}
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(hashes, indent=1, sort_keys=True))


def extensions() -> list:
    if not COMPILE:
        for stale in [*KERNELS.glob("*.so"), BUILD_INFO]:
            stale.unlink(missing_ok=True)
        return []
    from Cython.Build import cythonize
    from setuptools import Extension

    checked = os.environ.get("TOPK_BOUNDS_CHECKS", "") not in ("", "0")
    modules = [
        Extension(f"topk_grpc.kernels.{Path(p).stem}", [p], extra_compile_args=["-O3"]) for p in kernel_sources()
    ]
    return cythonize(
        modules,
        build_dir="build/cython",
        compiler_directives={
            "language_level": 3,
            "boundscheck": checked,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "annotation_typing": True,
        },
    )


os.chdir(ROOT)
setup(ext_modules=extensions(), cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
