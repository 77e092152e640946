"""Checks that the sdist and the wheel in a directory hold what they must, and nothing that was built elsewhere.

Usage: check_artifacts.py DIRECTORY
"""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOS = [path.relative_to(ROOT / "protos") for path in (ROOT / "protos").rglob("*.proto")]
KERNELS = list((ROOT / "topk_grpc/kernels").glob("[!_]*.py"))
MODULES = [path.relative_to(ROOT) for path in (ROOT / "topk_grpc").rglob("*.py") if "_pb2" not in path.name]


def names(archive: Path) -> set[str]:
    if archive.suffix == ".whl":
        return set(zipfile.ZipFile(archive).namelist())
    with tarfile.open(archive) as members:
        return {name.partition("/")[2] for name in members.getnames()}


def generated(proto: Path) -> list[str]:
    stem = f"topk_grpc/pb/{proto.with_suffix('')}"
    return [f"{stem}_pb2.py", f"{stem}_pb2.pyi", f"{stem}_pb2_grpc.py", f"{stem}_pb2_grpc.pyi"]


def problems(sdist: set[str], wheel: set[str]) -> list[str]:
    both = {str(module) for module in MODULES} | {"topk_grpc/py.typed"}
    in_sdist = both | {f"protos/{proto}" for proto in PROTOS} | {"pyproject.toml", "setup.py", "README.md", "LICENSE"}
    in_wheel = both | {name for proto in PROTOS for name in generated(proto)}
    in_wheel |= {f"topk_grpc/pb/{proto}" for proto in PROTOS} | {"topk_grpc/kernels/_build_info.json"}
    found = [f"the sdist lacks {name}" for name in sorted(in_sdist - sdist)]
    found += [f"the wheel lacks {name}" for name in sorted(in_wheel - wheel)]
    compiled = {name.rpartition("/")[2].partition(".")[0] for name in wheel if name.endswith(".so")}
    found += [f"the wheel lacks the compiled {path.stem}" for path in KERNELS if path.stem not in compiled]
    found += [f"the sdist has {name}" for name in sorted(sdist) if name.endswith((".so", ".c")) or "_pb2" in name]
    found += [f"the wheel has {name}" for name in sorted(wheel) if not name.startswith(("topk_grpc/", "topk_grpc-"))]
    return found


def main() -> int:
    directory = Path(sys.argv[1])
    [sdist], [wheel] = directory.glob("*.tar.gz"), directory.glob("*.whl")
    pure = wheel.name.endswith("-none-any.whl")
    found = problems(names(sdist), names(wheel))
    if pure:
        found = [each for each in found if "compiled" not in each and "_build_info" not in each]
    for each in found:
        print(f"error: {each}")
    print(f"{sdist.name}, {wheel.name}: {'as they should be' if not found else 'wrong'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
