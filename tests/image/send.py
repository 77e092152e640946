"""Runs in a pod: sends the plays of a CSV file (song, epoch ms) in batches, with pauses, and says how many counted.

Usage: send.py GATEWAY FILE. The file's name is the producer's, so the same file again counts once. TLS and token come
from TOPK_TLS_CA and TOPK_TOKEN, as for client commands.
"""

import csv
import os
import sys
import time
from pathlib import Path

from topk_grpc import BlockingTopKClient, TlsOptions

BATCH_PLAYS = 500
PAUSE_SECONDS = 0.1


def main() -> int:
    gateway, path = sys.argv[1:]
    authority = os.environ.get("TOPK_TLS_CA")
    rows = list(csv.reader(Path(path).read_text().splitlines()))
    with BlockingTopKClient(
        gateway,
        tls=TlsOptions(ca=authority) if authority else None,
        token=os.environ.get("TOPK_TOKEN"),
        producer_id=Path(path).name,
        expect_duplicates=True,
        batch_plays=BATCH_PLAYS,
        linger_ms=60_000,
        deadline_seconds=120,
    ) as client:
        for begin in range(0, len(rows), BATCH_PLAYS):
            for song, played_at in rows[begin : begin + BATCH_PLAYS]:
                client.record(song, int(played_at))
            client.flush()
            time.sleep(PAUSE_SECONDS)
        print(f"accepted {client.stats.plays_accepted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
