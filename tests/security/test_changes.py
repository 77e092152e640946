"""What changes while a cluster runs: tokens, certificates, the authority itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from tests.cluster.processes import GLOBAL, reason_of, run_topk, wait_for
from tests.security.certificates import Authority
from tests.security.secured import TOKENS, Secured, bearer, tokens_toml
from topk_grpc import BlockingTopKClient, UnauthenticatedError
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1.play_pb2 import Play, PlayBatch

pytestmark = pytest.mark.cluster

TOP = pb.GetTopKRequest(window=GLOBAL, k=10)
PLAYED = 1_700_000_000_000


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """A cluster whose files these tests change."""
    cluster = Secured(tmp_path_factory.mktemp("changed"))
    try:
        yield cluster
    finally:
        cluster.close()


def write_tokens(own: Secured, names: list[str], more: str = "") -> None:
    loaded = len(own.events("tokens_loaded"))
    own.replace(own.tokens_file, tokens_toml(names) + more)
    wait_for(lambda: len(own.events("tokens_loaded")) > loaded, 10, "the tokens are read anew")


def test_a_token_that_is_taken_out_ends_streams_and_calls(own: Secured) -> None:
    with own.stub() as stub:
        steps = stub.WatchTopK(pb.WatchTopKRequest(window=GLOBAL, k=1), metadata=bearer("leaver"), timeout=60)
        assert next(steps).number
        plays = stub.StreamPlays(iter_slowly(), metadata=bearer("leaver"), timeout=60)
        others = stub.WatchTopK(pb.WatchTopKRequest(window=GLOBAL, k=2), metadata=bearer("asker"), timeout=60)
        assert next(others).number
        time_before = time.monotonic()

        write_tokens(own, [name for name in TOKENS if name != "leaver"])

        for stream in (steps, plays):
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            assert reason_of(caught.value) == "TOKEN_UNKNOWN"
        assert time.monotonic() - time_before < 10
        assert any(line.get("stream") == "open" for line in own.events("caller_refused"))
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetTopK(TOP, metadata=bearer("leaver"), timeout=20)
        assert reason_of(caught.value) == "TOKEN_UNKNOWN"
        assert others.is_active()
        others.cancel()
        write_tokens(own, list(TOKENS))
        stub.GetTopK(TOP, metadata=bearer("leaver"), timeout=20)


def iter_slowly() -> Iterator[pb.StreamPlaysRequest]:
    """A client that has nothing to send for now."""
    time.sleep(60)
    yield pb.StreamPlaysRequest()


def test_a_token_expires_while_a_stream_runs(own: Secured) -> None:
    now = time.time() + 8
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
    soon = tokens_toml(["leaver"]) + f"expires = {moment}\n"
    write_tokens(own, [name for name in TOKENS if name != "leaver"], soon)
    with own.stub() as stub:
        steps = stub.WatchTopK(pb.WatchTopKRequest(window=GLOBAL, k=1), metadata=bearer("leaver"), timeout=60)
        assert next(steps).number
        with pytest.raises(grpc.RpcError) as caught:
            list(steps)
    assert reason_of(caught.value) == "TOKEN_EXPIRED"
    write_tokens(own, list(TOKENS))


def test_a_broken_tokens_file_leaves_the_old_one_in_force(own: Secured) -> None:
    told = len(own.events("tokens_file_unusable"))
    own.replace(own.tokens_file, tokens_toml(list(TOKENS)) + '[[token]]\nname = "half')
    wait_for(lambda: own.metric("topk_tokens_file_failed") == 1, 10, "the metric says so")
    wait_for(lambda: len(own.events("tokens_file_unusable")) == told + 1, 10, "the log says so once")
    with own.stub() as stub:
        stub.GetTopK(TOP, metadata=bearer("asker"), timeout=20)
        own.replace(own.tokens_file, tokens_toml(list(TOKENS)))
        wait_for(lambda: own.metric("topk_tokens_file_failed") == 0, 10, "it has been put right")
        stub.GetTopK(TOP, metadata=bearer("asker"), timeout=20)


def test_a_client_keeps_its_plays_while_its_token_is_refused(own: Secured, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("topk_not-a-token\n")
    with own.client(token, deadline_seconds=20, linger_ms=1) as client:
        client.record("kept", PLAYED)
        with pytest.raises(UnauthenticatedError, match="not known"):
            client.flush()
        with pytest.raises(UnauthenticatedError):
            client.record("not taken", PLAYED)
        with pytest.raises(UnauthenticatedError):
            client.top_k("global")
        token.write_text(TOKENS["leaver"][0])
        client.flush()
        client.record("kept", PLAYED)
        client.flush()
        counts = {song.song_id: song.count for song in client.songs(["kept", "not taken"]).songs}
    assert counts == {"kept": 2, "not taken": 0}


def test_a_client_goes_over_to_a_new_token_by_itself(own: Secured, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKENS["leaver"][0])
    with own.client(token, deadline_seconds=20, linger_ms=1) as client:
        client.record("renewed", PLAYED)
        client.flush()
        token.write_text(TOKENS["ingester"][0])
        write_tokens(own, [name for name in TOKENS if name != "leaver"])
        wait_for(lambda: _reconnected(client), 20, "the stream is another one")
        client.record("renewed", PLAYED)
        client.flush()
        assert client.stats.plays_accepted >= 2
    write_tokens(own, list(TOKENS))


def _reconnected(client: BlockingTopKClient) -> bool:
    """Whether the stream has ended and another one has delivered; nothing fails meanwhile."""
    client.record("renewed", PLAYED)
    client.flush()
    return bool(client.stats.reconnects)


def test_a_token_over_its_rate_is_held_back_and_counted(own: Secured) -> None:
    write_tokens(
        own, [name for name in TOKENS if name != "leaver"], tokens_toml(["leaver"]) + "plays_per_second = 100\n"
    )
    plays = [Play(song_id="much", played_at_ms=PLAYED)] * 1200  # a burst of 10 s and what it owes for 2 s

    def request(sequence: int) -> PlayBatch:
        return PlayBatch(producer_id="much", sequence=sequence, plays=plays if sequence == 1 else plays[:1])

    delayed = own.metric("topk_plays_delayed_total", '{limit="token"}')
    with own.stub() as stub:
        stub.RecordPlays(pb.RecordPlaysRequest(batch=request(1)), metadata=bearer("leaver"), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            stub.RecordPlays(pb.RecordPlaysRequest(batch=request(2)), metadata=bearer("leaver"), timeout=20)
        assert reason_of(caught.value) == "RATE_LIMITED"
        # Another token of the same producer is not concerned, and a stream waits.
        stub.RecordPlays(pb.RecordPlaysRequest(batch=request(3)), metadata=bearer("ingester"), timeout=20)
        stream = [pb.StreamPlaysRequest(batch=request(2))]
        [ack] = stub.StreamPlays(iter(stream), metadata=bearer("leaver"), timeout=30)
        assert ack.accepted == 1
    assert own.refused("RATE_LIMITED") >= 1
    assert own.metric("topk_plays_delayed_total", '{limit="token"}') == delayed + 1
    assert own.metric("topk_batches_delayed_total", '{limit="token"}') >= 1
    assert 0 < own.metric("topk_rate_delay_seconds_total", '{limit="token"}') < 30
    assert own.events("rate_limited")[-1]["token"] == "leaver"
    write_tokens(own, list(TOKENS))


def served_serial(own: Secured, address: str, client_key: Path, client_cert: Path) -> int:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(client_cert, client_key)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname=host) as connection,
    ):
        der = connection.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def test_certificates_and_their_authority_are_replaced_while_it_runs(own: Secured, tmp_path: Path) -> None:
    pair = own.client_pair
    assert served_serial(own, own.address, pair.key, pair.cert) == own.server_pair.serial
    with own.client(TOKENS["leaver"][0], deadline_seconds=30) as client:
        client.record("before", PLAYED)
        client.flush()

        fresh = own.rotate(Authority(tmp_path, "another-ca"))

        wait_for(
            lambda: served_serial(own, own.address, pair.key, pair.cert) == fresh.serial, 10, "the new one is served"
        )
        gateway = own.pids()["gateway"]
        for name in ("shard-0", "shard-1"):  # which then show, and ask for, what the new authority has signed
            started = len(own.events("ready"))
            os.kill(own.pids()[name], signal.SIGKILL)
            wait_for(lambda started=started: len(own.events("ready")) > started, 40, "the shard is back")  # type: ignore[misc]
        for number in range(20):
            client.record(f"after {number}", PLAYED)
        client.flush()
        assert own.pids()["gateway"] == gateway
    # A client that has the new authority's certificate, by the same files.
    with own.client(TOKENS["leaver"][0], deadline_seconds=30) as client:
        assert len(client.top_k("global", k=100).entries) >= 21


def test_the_command_line_shows_certificate_and_token(own: Secured, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKENS["asker"][0] + "\n")
    where = ("--gateway", own.address, "--tls-ca", str(own.own_ca.path))
    shown = ("--tls-cert", str(own.client_pair.cert), "--tls-key", str(own.client_pair.key))

    done = run_topk("top", *where, *shown, "--token-file", str(token), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["certificate"]["complete"]

    for arguments, hint in (
        ((*where, *shown), "TOPK_TOKEN"),
        ((*where, "--token-file", str(token)), "--tls-cert"),
        (("--gateway", own.address, "--token-file", str(token)), "--tls"),
        (("--gateway", own.address, "--token-file", str(token), "--tls"), "--tls-ca"),
    ):
        done = run_topk("charts", *arguments)
        assert done.returncode == 1
        assert hint in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
