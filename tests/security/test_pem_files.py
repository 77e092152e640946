"""Files of certificates and keys: checked as a whole, and never left half replaced."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from tests.security.certificates import Authority
from topk_grpc.errors import SettingError
from topk_grpc.rpc.tls import PemFiles, TlsOptions


def test_files_that_do_not_fit_are_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    one, two = authority.issue("one"), authority.issue("two")
    with pytest.raises(SettingError, match=r"one\.pem .*two\.key.* another certificate"):
        PemFiles(one.cert, two.key, None)
    with pytest.raises(SettingError, match=r"nowhere\.pem cannot be read"):
        PemFiles(tmp_path / "nowhere.pem", one.key, None)
    with pytest.raises(SettingError, match=r"one\.key holds no CA"):
        PemFiles(None, None, one.key)
    (tmp_path / "none.pem").write_text("no certificate")
    with pytest.raises(SettingError, match=r"none\.pem .*no PEM"):
        PemFiles(tmp_path / "none.pem", one.key, None)
    with pytest.raises(SettingError, match="belong together"):
        TlsOptions(cert=one.cert)


def test_an_encrypted_key_is_refused_without_asking(tmp_path: Path) -> None:
    pair = Authority(tmp_path, "ca").issue("one")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), None)
    pair.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    with pytest.raises(SettingError, match="encrypted"):
        PemFiles(pair.cert, pair.key, None)


def test_half_a_replacement_is_not_taken(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "ca")
    used, fresh = authority.issue("used"), authority.issue("fresh")
    files = PemFiles(used.cert, used.key, authority.path)
    before = files.pems
    assert not files.refresh()

    shutil.copy(fresh.cert, used.cert)
    assert not files.refresh()
    assert (files.pems, files.generation) == (before, 1)

    shutil.copy(fresh.key, used.key)
    assert files.refresh()
    assert (files.pems.cert, files.generation) == (fresh.cert.read_bytes(), 2)
    assert not files.refresh()


def test_a_swapped_symlink_is_a_change(tmp_path: Path) -> None:
    """As the kubelet updates mounted secrets."""
    authority = Authority(tmp_path, "ca")
    for name in ("..1", "..2"):
        pair = authority.issue(name)
        (tmp_path / f"data{name}").mkdir()
        shutil.copy(pair.cert, tmp_path / f"data{name}" / "tls.crt")
        shutil.copy(pair.key, tmp_path / f"data{name}" / "tls.key")
    link = tmp_path / "..data"
    link.symlink_to(tmp_path / "data..1")
    files = PemFiles(link / "tls.crt", link / "tls.key", None)
    (tmp_path / "..new").symlink_to(tmp_path / "data..2")
    (tmp_path / "..new").replace(link)
    assert files.refresh()
    assert files.pems.cert == (tmp_path / "data..2" / "tls.crt").read_bytes()
