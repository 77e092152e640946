"""The blocking face: the same client from threads that have no event loop."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime

import grpc
import numpy as np
import pytest

import topk_grpc
from tests.client.model_server import ModelServer, Script
from topk_grpc import BlockingTopKClient, InvalidArgumentError, Rejected, TopKClient, UnavailableError
from topk_grpc.client.blocking import shared_loop


@contextmanager
def model_server(make: Callable[[], ModelServer] = ModelServer) -> Iterator[ModelServer]:
    """Serves on the clients' own loop: gRPC serves one loop a process well."""

    async def start() -> ModelServer:
        server = make()
        await server.start()
        return server

    server = shared_loop().run(start())
    try:
        yield server
    finally:
        shared_loop().run(server.__aexit__())


def test_ten_lines_stream_plays_and_ask_for_a_top_k() -> None:
    with model_server() as server:
        gateway = server.targets[0]
        # As in the README.
        with topk_grpc.BlockingTopKClient(gateway) as client:
            for song in ["Toto - Africa", "Boston - More Than a Feeling", "Toto - Africa"]:
                client.record(song, datetime(2014, 6, 16, 18, 28, tzinfo=UTC), charts=["KSEG"])
            client.flush()
            answer = client.top_k("tumbling:1d", k=10, chart="KSEG", as_of="2014-06-16T20:00:00Z")
            lines = [f"{entry.rank}. {entry.song_id}: {entry.count}" for entry in answer.entries]
        assert lines == ["1. Toto - Africa: 2", "2. Boston - More Than a Feeling: 1"]


def test_threads_share_a_client_and_every_play_counts_once() -> None:
    schedule = [Script(batches=3, unacknowledged=1, lost=1), Script(batches=9, lost=2, ending=grpc.StatusCode.ABORTED)]
    with (
        model_server(lambda: ModelServer(schedule)) as server,
        BlockingTopKClient(server.targets, batch_plays=50, batches_in_flight=2, random=lambda: 0.0) as client,
    ):

        def play(thread: int) -> Counter[str]:
            for index in range(500):
                client.record(f"song {index % 7}", 1 + index, count=1 + thread % 2)
            client.flush()
            return Counter({f"song {song}": len(range(song, 500, 7)) * (1 + thread % 2) for song in range(7)})

        with ThreadPoolExecutor(8) as pool:
            tally = sum(pool.map(play, range(8)), Counter[str]())
        assert server.cluster.counts() == tally
        assert client.stats.plays_accepted == 4000


def test_clients_of_many_threads_share_one_loop() -> None:
    with model_server() as server:
        before = threading.active_count()

        def play(index: int) -> None:
            with BlockingTopKClient(server.targets, linger_ms=1) as client:
                client.record(f"song {index}", 1)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(play, range(12)))
        assert sum(thread.name == "topk-client" for thread in threading.enumerate()) == 1
        assert threading.active_count() <= before
        assert server.cluster.counts().total() == 12


def test_a_batch_goes_when_it_has_lingered() -> None:
    with model_server() as server, BlockingTopKClient(server.targets, linger_ms=5) as client:
        acknowledged = threading.Event()
        client.record("a", 1)
        for _ in range(2000):
            if client.stats.batches_acknowledged or acknowledged.wait(0.005):
                break
        assert server.cluster.counts() == {"a": 1}


def test_record_waits_for_room_and_gives_up_after_the_deadline() -> None:
    with model_server(lambda: ModelServer([Script(batches=0, ending="hang")])) as server:
        client = BlockingTopKClient(server.targets, batch_plays=1, batches_in_flight=1, deadline_seconds=0.2)
        client.record("a", 1)
        client.record("a", 1)
        with pytest.raises(UnavailableError, match="no room"):
            client.record("a", 1)
        client.close()
        assert server.cluster.counts() == {"a": 2}


def test_what_record_took_while_another_thread_closes_is_counted() -> None:
    with model_server() as server:
        client = BlockingTopKClient(server.targets, batch_plays=7)

        def play(_: int) -> int:
            taken = 0
            try:
                while True:
                    client.record("a", 1)
                    taken += 1
            except InvalidArgumentError as error:
                assert "closed" in str(error)
            return taken

        with ThreadPoolExecutor(3) as pool:
            tasks = [pool.submit(play, index) for index in range(3)]
            while client.stats.batches_acknowledged < 3:
                client.flush()
            client.close()
            taken = sum(task.result() for task in tasks)
        assert server.cluster.counts() == {"a": taken}


def test_errors_reach_the_caller() -> None:
    with model_server() as server, BlockingTopKClient(server.targets) as client:
        with pytest.raises(InvalidArgumentError):
            client.record(7, 1)  # type: ignore[arg-type]
        with pytest.raises(topk_grpc.WindowError):
            client.top_k("daily")
        client.record("", 1)
        with pytest.raises(topk_grpc.RejectedPlaysError):
            client.flush()
    with pytest.raises(InvalidArgumentError, match="closed"):
        client.record("a", 1)
    with pytest.raises(InvalidArgumentError, match="closed"):
        client.flush()


def test_columns_songs_charts_and_description() -> None:
    one = np.array([0, 1], dtype=np.int64)
    with model_server() as server, BlockingTopKClient(server.targets) as client:
        assert client.record_columns(b"a", one, one[1:], chart_data=b"US", chart_offsets=one * 2) == 1
        client.flush()
        assert client.songs(["a"]).songs[0].rank == 1
        assert [chart.chart for chart in client.charts()] == ["US"]
        assert client.describe().epoch == 7


def test_a_call_from_on_rejected_is_refused_instead_of_hanging() -> None:
    caught: list[BaseException] = []

    def call_back(_: Rejected) -> None:
        try:
            client.flush()
        except RuntimeError as error:
            caught.append(error)

    with model_server() as server, BlockingTopKClient(server.targets, on_rejected=call_back) as client:
        client.record("", 1)
        client.flush()
    assert "wait for itself" in str(caught[0])


def test_ctrl_c_leaves_a_waiting_call_and_the_client() -> None:
    with model_server(lambda: ModelServer([Script(batches=0, ending="hang")])) as server:

        def interrupt() -> None:
            os.kill(os.getpid(), signal.SIGINT)

        def stream_hangs() -> bool:
            return server.streams == 1

        def wait_and_interrupt() -> None:
            pause = threading.Event()
            while not stream_hangs():
                pause.wait(0.005)
            pause.wait(0.05)
            interrupt()

        thread = threading.Thread(target=wait_and_interrupt)
        with pytest.raises(KeyboardInterrupt), BlockingTopKClient(server.targets, linger_ms=0) as client:
            client.record("a", 1)
            thread.start()
            client.flush()
        thread.join()
        with pytest.raises(InvalidArgumentError, match="closed"):
            client.flush()


def test_both_faces_have_the_same_methods_and_arguments() -> None:
    def public(face: type) -> dict[str, object]:
        return {
            name: inspect.signature(member) if inspect.isfunction(member) else type(member)
            for name, member in vars(face).items()
            if not name.startswith("_")
        }

    def plain(signature: object) -> str:
        return str(signature).replace("AsyncGenerator[WatchUpdate, None]", "Generator[WatchUpdate, None, None]")

    blocking, asynchronous = public(BlockingTopKClient), public(TopKClient)
    assert {name: plain(value) for name, value in blocking.items()} == {
        name: plain(value) for name, value in asynchronous.items()
    }
    assert inspect.signature(BlockingTopKClient) == inspect.signature(TopKClient)
    assert BlockingTopKClient.top_k.__doc__ == TopKClient.top_k.__doc__
