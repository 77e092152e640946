"""Whether the service that pip-audit asks can be reached: exit status 0 if so, else 1 and the reason."""

from __future__ import annotations

import json
import sys
import urllib.request
from importlib.metadata import version

URL = f"https://pypi.org/pypi/grpcio/{version('grpcio')}/json"  # the question that is then asked of each package


def main() -> int:
    try:
        with urllib.request.urlopen(URL, timeout=10) as answer:
            known = "vulnerabilities" in json.load(answer)
    except (OSError, ValueError) as error:
        print(f"{URL}: {error}", file=sys.stderr)
        return 1
    if not known:  # a mirror that has packages, and no answer to what is wrong with them
        print(f"{URL}: no answer about vulnerabilities", file=sys.stderr)
    return 0 if known else 1


if __name__ == "__main__":
    sys.exit(main())
