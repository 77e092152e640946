"""Certificates and keys: read from PEM files, checked before they are used, and read anew when the files change.

A renewed certificate is put in place by replacing files (cert-manager and the kubelet swap a symlink, others write one
file after the other), so what is read may not fit together for a moment. A set of files is therefore taken only as a
whole: the key belongs to the certificate, the CA is a certificate, and nothing changed while it was read. A server asks
before each handshake, which costs a stat for each file; a set that cannot be taken is logged once, and the one before
stays in use. Connections that stand are not touched: a certificate is looked at when a connection is made.
"""

from __future__ import annotations

import ssl
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc

from topk_grpc.errors import SettingError
from topk_grpc.rpc import log

_TRIES: Final = 3


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """How a client speaks TLS.

    Attributes:
        ca: a PEM file with the CAs that sign servers' certificates. None: the public ones that gRPC brings along.
        cert: a PEM file with the client's certificate and what lies between it and its CA, for servers that ask for
            one. It is read anew when it has changed.
        key: a PEM file with the private key of `cert`, without a passphrase.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        """Refuses half a pair.

        Raises:
            SettingError: a certificate without its key, or a key alone.
        """
        if bool(self.cert) != bool(self.key):
            raise SettingError("a TLS certificate and its key belong together: give cert and key, or neither")


@dataclass(frozen=True, slots=True)
class Pems:
    """The content of a set of files; what has no file is None."""

    cert: bytes | None
    key: bytes | None
    ca: bytes | None


class PemFiles:
    """A set of files that belong together. May be asked from any thread.

    Attributes:
        pems: what was read last and fits together.
        generation: rises with each new content.
    """

    def __init__(self, cert: str | Path | None, key: str | Path | None, ca: str | Path | None) -> None:
        """Reads them.

        Raises:
            SettingError: one cannot be read, or they do not fit together; the message says which and why.
        """
        self._paths = tuple(Path(each) if each else None for each in (cert, key, ca))
        self._lock = threading.Lock()
        self.generation = 1
        self._seen = self._identity()
        self.pems = self._read()

    def refresh(self) -> bool:
        """Reads them again if they have changed; whether there is something new. Never fails: see above."""
        with self._lock:
            identity = self._identity()
            if identity == self._seen:
                return False
            try:
                pems = self._read()
            except SettingError as error:
                log.error("tls_files_unusable", reason=str(error), consequence="the ones before stay in use")
                self._seen = identity  # told once; the next change is looked at again
                return False
            self._seen = identity
            if pems == self.pems:
                return False
            self.pems = pems
            self.generation += 1
            log.event("tls_files_reloaded", files=[str(path) for path in self._paths if path is not None])
            return True

    def _identity(self) -> tuple[object, ...]:
        found: list[object] = []
        for path in self._paths:
            try:
                stat = path.stat() if path is not None else None
            except OSError as error:
                found.append(error.errno)
                continue
            found.append(stat and (stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size))
        return tuple(found)

    def _read(self) -> Pems:
        cert, key, ca = self._paths
        problem: SettingError | None = None
        for _ in range(_TRIES):  # again, where somebody replaces them meanwhile
            before = self._identity()
            try:
                pems = Pems(*(None if path is None else path.read_bytes() for path in self._paths))
                if cert is not None and key is not None:
                    _check_pair(cert, key)
                if ca is not None and pems.ca is not None:
                    _check_ca(ca, pems.ca)
            except OSError as error:
                raise SettingError(f"{error.filename} cannot be read ({error.strerror}): check the path") from error
            except SettingError as error:
                problem = error
            else:
                problem = None
            if self._identity() == before:
                break
        if problem is not None:
            raise problem
        return pems


class _EncryptedError(Exception):
    pass


def _no_passphrase() -> str:
    raise _EncryptedError


def _check_pair(cert: Path, key: Path) -> None:
    # OpenSSL is asked, as gRPC's own complaint comes with the first handshake and names no file.
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, _no_passphrase)
    except _EncryptedError as error:
        raise SettingError(
            f"the key {key} is encrypted: give one without a passphrase, readable by nobody else"
        ) from error
    except ssl.SSLError as error:
        other = error.reason == "KEY_VALUES_MISMATCH"
        why = "the key belongs to another certificate" if other else f"they are no PEM ({error.reason})"
        raise SettingError(f"the certificate {cert} and the key {key} cannot be used: {why}") from error


def _check_ca(path: Path, pem: bytes) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise SettingError(f"{path} holds no CA certificate: give a PEM file with one or more") from error


# --- Credentials ------------------------------------------------------------------------------------------------------


def server_credentials(cert: str, key: str, client_ca: str) -> grpc.ServerCredentials:
    """What a server shows, and asks for.

    Args:
        cert: the certificate's file, with what lies between it and its CA.
        key: its private key's file.
        client_ca: a file with the CAs that clients' certificates have to be signed by; empty: clients show none.

    Returns:
        Credentials that follow the files.

    Raises:
        SettingError: the files cannot be used.
    """
    files = PemFiles(cert, key, client_ca or None)

    def configuration() -> grpc.ServerCertificateConfiguration:
        pems = files.pems
        return grpc.ssl_server_certificate_configuration([(pems.key or b"", pems.cert or b"")], pems.ca)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        return configuration() if files.refresh() else None

    fetcher: Any = fetch  # None, which says that there is nothing new, is missing in gRPC's type
    return grpc.dynamic_ssl_server_credentials(configuration(), fetcher, require_client_authentication=bool(client_ca))


def channel_credentials(pems: Pems) -> grpc.ChannelCredentials:
    """What a client shows and trusts, for as long as its channel lives."""
    return grpc.ssl_channel_credentials(pems.ca, pems.key, pems.cert)
