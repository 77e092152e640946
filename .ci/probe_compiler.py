"""Says whether C extensions can be built here, as setuptools would build the kernels: a compiler, and Python.h.

Exit status 0 if so; 1 if not, with the cause on standard output, one line.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = "#include <Python.h>\nPyMODINIT_FUNC PyInit_probe(void) { return PyModule_Create(NULL); }\n"
SETUP = """
from setuptools import Extension, setup
setup(name="probe", packages=[], py_modules=[], ext_modules=[Extension("probe", ["probe.c"])])
"""


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "probe.c").write_text(SOURCE)
        (directory / "setup.py").write_text(SETUP)
        # In a process of its own: what it prints is for a log, and PYTHONPATH must not bring in another setuptools.
        probe = subprocess.run(
            [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
            cwd=directory,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
    if probe.returncode == 0:
        return 0
    lines = [line.strip() for line in probe.stdout.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    print((telling or lines or ["no reason given"])[0])
    return 1


if __name__ == "__main__":
    sys.exit(main())
