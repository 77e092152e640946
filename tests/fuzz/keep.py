"""Copies into tests/fuzz/corpus what the last long run found: the smallest inputs first, so many bytes a target."""

from __future__ import annotations

import shutil

from tests.fuzz.run import COMMITTED, WORK
from tests.fuzz.targets import NAMES

BYTES_EACH = 20_000
FILES_EACH = 60


def main() -> None:
    for name in NAMES:
        found = sorted((WORK / "corpus" / name).glob("*"), key=lambda path: (path.stat().st_size, path.name))
        target = COMMITTED / name
        target.mkdir(parents=True, exist_ok=True)
        room = BYTES_EACH
        for path in [path for path in found if not path.name.startswith("seed-")][:FILES_EACH]:
            room -= path.stat().st_size
            if room < 0:
                break
            shutil.copyfile(path, target / path.name[:16])


if __name__ == "__main__":
    main()
