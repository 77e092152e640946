"""What `kubectl kustomize` makes of an overlay, and what a kubelet reads in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
OVERLAYS: Final = ROOT / "deploy" / "kubernetes" / "overlays"
KUBECTL: Final = Path(sys.executable).with_name("kubectl")

_REFERENCE: Final = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)")

Object = dict[str, Any]


def render(overlay: Path) -> list[Object]:
    """The objects of an overlay.

    Raises:
        subprocess.CalledProcessError: it does not render.
    """
    done = subprocess.run([KUBECTL, "kustomize", overlay], check=True, capture_output=True, text=True, timeout=60)
    return [each for each in yaml.safe_load_all(done.stdout) if each]


class Manifests:
    """Objects by kind and name."""

    def __init__(self, objects: list[Object]) -> None:
        self.objects = objects
        self._objects = {(one["kind"], one["metadata"]["name"]): one for one in objects}

    @classmethod
    def of(cls, overlay: str) -> Manifests:
        """Those of an overlay, by its name."""
        return cls(render(OVERLAYS / overlay))

    def every(self, kind: str) -> Iterator[Object]:
        """All of a kind."""
        return (one for (each, _), one in self._objects.items() if each == kind)

    def get(self, kind: str, name: str) -> Object:
        """One of them."""
        return self._objects[kind, name]

    def workloads(self) -> Iterator[Object]:
        """What makes pods."""
        return (one for kind in ("StatefulSet", "Deployment") for one in self.every(kind))

    def services_of(self, labels: Mapping[str, str]) -> Iterator[Object]:
        """The Services whose selector takes a pod with these labels."""
        for service in self.every("Service"):
            selector = service["spec"].get("selector") or {}
            if selector and selector.items() <= labels.items():
                yield service

    def values(self, kind: str, name: str) -> dict[str, bytes]:
        """What a ConfigMap or a Secret holds, by key."""
        found = self.get(kind, name)
        coded = (found.get("binaryData") or {}) if kind == "ConfigMap" else (found.get("data") or {})
        plain = (found.get("data") or {}) if kind == "ConfigMap" else (found.get("stringData") or {})
        return {key: base64.b64decode(value) for key, value in coded.items()} | {
            key: value.encode() for key, value in plain.items()
        }


@dataclass(frozen=True)
class Identity:
    """What a pod is told about itself.

    Attributes:
        name: of the pod.
        namespace: that it is in.
        address: its own.
        labels: its template's.
    """

    name: str
    namespace: str
    address: str
    labels: Mapping[str, str]

    def field(self, path: str) -> str:
        """As `fieldRef` names it."""
        known = {
            "metadata.name": self.name,
            "metadata.namespace": self.namespace,
            "status.podIP": self.address,
            "spec.nodeName": "node",
        }
        return known[path]


def environment_of(container: Object, identity: Identity, manifests: Manifests) -> dict[str, str]:
    """A container's variables, as a kubelet makes them."""
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        for reference, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            if reference in source:
                values = manifests.values(kind, source[reference]["name"])
                found |= {source.get("prefix", "") + key: value.decode() for key, value in values.items()}
    for variable in container.get("env", []):
        found[variable["name"]] = _value_of(variable, identity, manifests, found)
    return found


def _value_of(variable: Object, identity: Identity, manifests: Manifests, known: Mapping[str, str]) -> str:
    source = variable.get("valueFrom")
    if source is None:
        return expanded(variable.get("value", ""), known)
    if "fieldRef" in source:
        return identity.field(source["fieldRef"]["fieldPath"])
    for reference, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        if reference in source:
            return manifests.values(kind, source[reference]["name"])[source[reference]["key"]].decode()
    raise ValueError(f"the variable {variable['name']} comes from {list(source)}, which this runner does not know")


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """With $(NAME) replaced; one that is unknown stays as it is, and $$ is a $."""
    return _REFERENCE.sub(lambda found: variables.get(found[1], found[0]) if found[1] else "$", text)


def port_of(container: Object, port: int | str) -> int:
    """A port by its name or number."""
    if isinstance(port, int):
        return port
    return next(int(one["containerPort"]) for one in container["ports"] if one.get("name") == port)


def revision_of(workload: Object) -> str:
    """Changes when pods have to be made anew."""
    template = json.dumps(workload["spec"]["template"], sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()[:10]
