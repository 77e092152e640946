"""What pods ask of a Kubernetes API: one StatefulSet at a time, over TLS, with the token of a service account."""

from __future__ import annotations

import json
import re
import ssl
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from tests.security.certificates import Authority

_PATH: Final = re.compile(r"/apis/apps/v1/namespaces/([^/]+)/statefulsets/([^/]+)")


class KubernetesApi:
    """Serves from a thread of its own.

    Args:
        folder: for certificates, and for the service account as a pod sees it, in `account`.
        host: to listen on; the certificate names it.

    Attributes:
        sets: the StatefulSets as they are asked for, by name.
        allowed: the sets that the account may get.
        asked: how often it was asked.
        account: the directory that is mounted into pods.
    """

    def __init__(self, folder: Path, namespace: str, host: str = "127.0.0.1") -> None:
        self.sets: dict[str, Mapping[str, Any]] = {}
        self.allowed: set[str] = set()
        self.asked = 0
        self.account = folder / "account"
        self.account.mkdir(parents=True)
        self._namespace, self._token = namespace, "token-of-the-shards"
        authority = Authority(folder, "api-ca")
        pair = authority.issue("api", hosts=(host,))
        authority.write(self.account / "ca.crt")
        (self.account / "token").write_text(self._token)
        (self.account / "namespace").write_text(namespace)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.cert, pair.key)
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, value = api.answer(self.path, self.headers.get("Authorization", ""))
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer((host, 0), Handler)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.host, self.port = host, self._server.server_address[1]

    def answer(self, path: str, authorization: str) -> tuple[int, Any]:
        """Status and body."""
        self.asked += 1
        found = _PATH.fullmatch(path)
        if authorization != f"Bearer {self._token}":
            return 401, {"kind": "Status", "reason": "Unauthorized"}
        if found is None or found[1] != self._namespace or found[2] not in self.allowed:
            return 403, {"kind": "Status", "reason": "Forbidden"}
        if found[2] not in self.sets:
            return 404, {"kind": "Status", "reason": "NotFound"}
        return 200, self.sets[found[2]]

    @property
    def environment(self) -> dict[str, str]:
        """What every container finds in its environment."""
        return {"KUBERNETES_SERVICE_HOST": self.host, "KUBERNETES_SERVICE_PORT": str(self.port)}

    def close(self) -> None:
        """Ends it."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
