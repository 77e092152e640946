"""Plays songs through the client library until its standard input ends, and then says what was acknowledged.

    python -m tests.cluster.player GATEWAY[,GATEWAY…] SEED

One line of JSON in the end: the plays of each song. A producer by itself, for wherever a test needs one to be.
"""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from collections import Counter

from topk_grpc import BlockingTopKClient
from topk_grpc.errors import UnavailableError

SONGS = 200
PATIENCE_SECONDS = 120.0


def main() -> None:
    ended = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    chance = random.Random(int(sys.argv[2]))
    played: Counter[str] = Counter()
    with BlockingTopKClient(sys.argv[1].split(","), batch_plays=50, deadline_seconds=PATIENCE_SECONDS) as client:
        while not ended.is_set():
            song = f"song {chance.randrange(SONGS)}"
            client.record(song, time.time_ns() // 1_000_000)
            played[song] += 1
            time.sleep(0.002)
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                client.flush()
                break
            except UnavailableError:
                if time.monotonic() > give_up:
                    raise
    print(json.dumps(played))


if __name__ == "__main__":
    main()
