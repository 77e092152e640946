"""What native code prints: logged and counted, never in the way, and not lost with the process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.cluster.processes import environment
from topk_grpc.rpc.native_log import reason_of

BEGIN = """
import os, sys, time
from topk_grpc import metrics
from topk_grpc.rpc import log, native_log
native_log.capture()
log.configure("info", role="test")
"""
HANDSHAKE = (
    "I1124 02:13:50.847449   10911 ssl_transport_security.cc:2563] Handshake failed with error SSL_ERROR_SSL: "
    "error:100000c0:SSL routines:OPENSSL_internal:PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid context"
)


def run(code: str, before: str = "") -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the log lines, and everything else on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", before + BEGIN + code],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    lines: list[str] = []
    rest: list[str] = []
    for line in done.stderr.splitlines():
        (lines if line.startswith("{") else rest).append(line)
    return done.returncode, [json.loads(line) for line in lines], "\n".join(rest)


def test_a_failed_handshake_becomes_a_line_and_a_count() -> None:
    code, lines, rest = run(f"""
os.write(2, {HANDSHAKE!r}.encode() + b"\\n")
while not metrics.TLS_HANDSHAKES_FAILED.labels("no_client_certificate")._value.get():
    time.sleep(0.01)
""")
    assert (code, rest) == (0, "")
    [line] = lines
    assert (line["event"], line["reason"], line["role"]) == ("tls_handshake_failed", "no_client_certificate", "test")
    assert "PEER_DID_NOT_RETURN_A_CERTIFICATE" in line["detail"]


def test_a_flood_of_handshakes_is_counted_and_not_written_out() -> None:
    code, lines, _ = run(f"""
for _ in range(5000):
    os.write(2, {HANDSHAKE!r}.encode() + b"\\n")
    time.sleep(0)
deadline = time.monotonic() + 20
while metrics.TLS_HANDSHAKES_FAILED.labels("no_client_certificate")._value.get() < 5000:
    assert time.monotonic() < deadline
    time.sleep(0.01)
""")
    assert code == 0
    assert 1 <= len(lines) <= 40


def test_other_messages_pass_whole() -> None:
    _, lines, _ = run('os.write(2, b"free(): invalid pointer\\nand more\\n"); print("python", file=sys.stderr)')
    messages = [line["message"] for line in lines if line["event"] == "native_message"]
    assert messages == ["free(): invalid pointer\nand more"]


def test_a_full_pipe_holds_nobody_up() -> None:
    """The reader cannot run: this thread writes without letting go of the interpreter for long."""
    code, _, _ = run("""
sys.setswitchinterval(1000)
dropped = 0
for _ in range(200):
    try:
        os.write(2, b"x" * 65535 + b"\\n")
    except BlockingIOError:
        dropped += 1
""")
    assert code == 0


@pytest.mark.parametrize("ending", ["os.abort()", "os.kill(os.getpid(), 9)"])
def test_last_words_outlive_the_process(ending: str) -> None:
    """They are in the pipe when the process dies, and its reader has had no turn: none is started here."""
    no_reader = "import threading\nthreading.Thread.start = lambda self: None\n"
    code, lines, rest = run(f'os.write(2, b"the last words\\n")\n{ending}\n', no_reader)
    assert code < 0
    assert "the last words" in rest + "".join(line.get("message", "") for line in lines)
    if "abort" in ending:
        assert "Fatal Python error: Aborted" in rest


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE: x", "no_client_certificate"),
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired", "expired_certificate"),
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate", "foreign_certificate"),
        ("CERTIFICATE_VERIFY_FAILED: self-signed certificate", "foreign_certificate"),
        ("CERTIFICATE_VERIFY_FAILED: unsupported certificate purpose", "invalid_certificate"),
        ("WRONG_VERSION_NUMBER: x", "not_tls"),
        ("SSLV3_ALERT_BAD_CERTIFICATE", "refused_by_peer"),
        ("something new", "other"),
    ],
)
def test_reasons_of_failed_handshakes(detail: str, reason: str) -> None:
    assert reason_of(detail) == reason
