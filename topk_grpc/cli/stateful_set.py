"""What a pod can know of the StatefulSet it belongs to: how many replicas that is to have.

One GET with the pod's service account, by the standard library: a client of all of Kubernetes would be larger than we
are.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import Final

from topk_grpc.errors import SettingError, UnavailableError

_SECONDS: Final = 5.0
_HOST_VARIABLE: Final = "KUBERNETES_SERVICE_HOST"
_PORT_VARIABLE: Final = "KUBERNETES_SERVICE_PORT"


class StatefulSet:
    """A StatefulSet of this pod's namespace.

    Args:
        name: of the set.
        credentials: the directory of the pod's service account.
    """

    def __init__(self, name: str, credentials: str) -> None:
        self.name = name
        self._credentials = Path(credentials)

    def ordinal_of(self, pod: str) -> int | None:
        """The number of one of its pods; None: it is none of them."""
        number = pod.removeprefix(f"{self.name}-")
        return int(number) if number != pod and number.isascii() and number.isdecimal() else None

    def ordinals(self) -> range:
        """The numbers of the pods that it is to have. Blocks for some seconds at most.

        Raises:
            SettingError: there are no credentials, the API refuses them, or it knows no such set.
            UnavailableError: the API does not answer.
        """
        host, port = os.environ.get(_HOST_VARIABLE, ""), os.environ.get(_PORT_VARIABLE, "")
        if not host:
            raise SettingError(f"{_HOST_VARIABLE} is not set: this is for the containers of a Kubernetes pod")
        try:
            token, namespace = (self._read(name) for name in ("token", "namespace"))
            context = ssl.create_default_context(cafile=str(self._credentials / "ca.crt"))
        except OSError as error:
            raise SettingError(
                f"the service account in {self._credentials} cannot be read ({error}): the pod needs"
                " automountServiceAccountToken, or name the directory (--kubernetes-credentials)"
            ) from error
        path = f"/apis/apps/v1/namespaces/{namespace}/statefulsets/{self.name}"
        try:
            with closing(
                http.client.HTTPSConnection(host, int(port or 443), timeout=_SECONDS, context=context)
            ) as connection:
                headers = {"Authorization": f"Bearer {token}", "Accept": "application/json"}
                connection.request("GET", path, headers=headers)
                response = connection.getresponse()
                body = response.read()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UnavailableError(f"the Kubernetes API at {host}:{port} does not answer: {error}") from error
        return self._ordinals(response.status, body)

    def _ordinals(self, status: int, body: bytes) -> range:
        if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND}:
            raise SettingError(
                f"the Kubernetes API answers {status} for the StatefulSet {self.name}: the service account needs a Role"
                " with `get` on it, and the name has to be right (--statefulset)"
            )
        try:
            if status != HTTPStatus.OK:
                raise ValueError(f"status {status}")
            spec = json.loads(body)["spec"]
            first = int(spec.get("ordinals", {}).get("start", 0))
            return range(first, first + int(spec.get("replicas", 1)))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UnavailableError(f"the Kubernetes API does not say what {self.name} is: {error!r}") from error

    def _read(self, name: str) -> str:
        return (self._credentials / name).read_text(encoding="utf-8").strip()
