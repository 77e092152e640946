"""The tokens file, and what a gate makes of it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from topk_grpc.errors import PermissionDeniedError, SettingError, TokenExpiredError, TokenUnknownError
from topk_grpc.gateway.access import TokenGate
from topk_grpc.gateway.tokens import digest_of, parse_tokens
from topk_grpc.rpc.access import ClusterGate

TOP = "/topk.v1.TopKService/GetTopK"
HASH = digest_of("a token")
ENTRY = f'[[token]]\nname = "a"\nsha256 = "{HASH}"\nroles = ["query"]\n'


def test_everything_of_an_entry_is_read() -> None:
    more = "expires = 2030-01-31T12:00:00+02:00\nplays_per_second = 2.5\n"
    token = parse_tokens((ENTRY + more).encode(), "here")[HASH]
    assert (token.name, token.roles, token.plays_per_second) == ("a", frozenset({"query"}), 2.5)
    assert token.expires_at == datetime(2030, 1, 31, 10, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[[token", "TOML"),
        ("[token]\nname = 'a'\n", r"\[\[token\]\]"),
        ("tokens = []\n", "has tokens"),
        (ENTRY + "expire = 2030-01-31\n", "expire is unknown"),
        (ENTRY.replace('"query"', '"queries"'), "roles"),
        (ENTRY.replace('["query"]', "[]"), "roles"),
        (ENTRY.replace(HASH, "topk_the-token-itself"), "64 hex"),
        (ENTRY.replace('name = "a"', 'name = "a b"'), "name"),
        (ENTRY + 'expires = "2030-01-31"\n', "without quotes"),
        (ENTRY + "plays_per_second = -1\n", "plays_per_second"),
        (ENTRY + ENTRY, "twice"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(SettingError, match=complaint) as caught:
        parse_tokens(text.encode(), "here")
    assert "here" in str(caught.value)
    assert "topk_the-token-itself" not in str(caught.value)


def test_a_gateway_without_its_tokens_file_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        TokenGate(str(tmp_path / "nowhere"))


def test_a_token_is_good_until_the_moment_it_expires(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(ENTRY + "expires = 1970-01-01T00:01:40Z\n")
    now = 99.9
    gate = TokenGate(str(file), lambda: now)
    credential = gate.credential({"authorization": "bearer  a token"})
    assert gate.admit(TOP, credential).name == "a"
    now = 100.0
    with pytest.raises(TokenExpiredError):
        gate.admit(TOP, credential)


def test_a_gate_goes_by_the_table(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(ENTRY)
    gate = TokenGate(str(file))
    credential = gate.credential({"authorization": "Bearer a token"})
    with pytest.raises(PermissionDeniedError, match="ingest"):
        gate.admit("/topk.v1.TopKService/StreamPlays", credential)
    with pytest.raises(TokenUnknownError):
        gate.admit(TOP, gate.credential({"authorization": "Bearer another"}))
    assert not gate.knows("/topk.v1.TopKService/NotInTheTable")


@pytest.mark.parametrize("given", ["", "secre", "secret ", "Secret", "ſecret"])
def test_a_cluster_gate_takes_nothing_but_the_secret(given: str) -> None:
    gate = ClusterGate("secret")
    assert not gate.credential({"topk-cluster-secret": given})
    assert gate.credential({"topk-cluster-secret": "secret"})
    assert not gate.credential({})
