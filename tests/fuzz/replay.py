"""Runs inputs through a target: `python -m tests.fuzz.replay TARGET FILE…`. A finding ends in a traceback."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.fuzz.harness import watch_unraisable
from tests.fuzz.targets import load


def main() -> None:
    name, *files = sys.argv[1:]
    watch_unraisable()
    target = load(name)
    for file in files:
        target(Path(file).read_bytes())
        print(f"{file}: nothing found")


main()
