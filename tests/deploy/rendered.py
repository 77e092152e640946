"""An overlay of deploy/kubernetes as `kubectl kustomize` renders it, and what can be asked of that."""

from __future__ import annotations

import copy
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
OVERLAYS: Final = ("dev", "production")
KUBECTL: Final = Path(sys.executable).with_name("kubectl")

Manifest = dict[str, Any]

WORKLOADS: Final = ("Deployment", "StatefulSet")
CLUSTER_WIDE: Final = ("Namespace",)


@functools.cache
def text_of(overlay: str, *components: str) -> str:
    """What would be applied; with components added as they say."""
    with tempfile.TemporaryDirectory() as folder:
        return kustomized(copied(Path(folder), overlay, *components))


def copied(folder: Path, overlay: str, *components: str) -> Path:
    """Copies deploy/kubernetes below a folder, to change it.

    Returns:
        The overlay's directory there. Components are added to it.
    """
    kubernetes = folder / "deploy/kubernetes"
    shutil.copytree(ROOT / "deploy/kubernetes", kubernetes)
    directory = kubernetes / "overlays" / overlay
    if components:
        with (directory / "kustomization.yaml").open("a") as file:
            file.write(f"components: [{', '.join(f'../../components/{name}' for name in components)}]\n")
    return directory


def kustomized(directory: Path) -> str:
    """What `kubectl apply -k` of a directory would apply."""
    return subprocess.run(
        [str(KUBECTL), "kustomize", str(directory)], check=True, capture_output=True, text=True
    ).stdout


@dataclass(frozen=True)
class Container:
    """One container of a workload, with its environment as its first pod has it."""

    workload: Manifest
    manifest: Manifest
    environment: Mapping[str, str]

    @property
    def where(self) -> str:
        """For messages."""
        return f"{label(self.workload)}, container {self.manifest['name']}"

    @property
    def is_topk(self) -> bool:
        """Whether it runs one of our roles, and no etcd."""
        return "topk" in str(self.manifest["image"])

    @property
    def ports(self) -> dict[str, int]:
        """What it opens, by name."""
        return {each["name"]: int(each["containerPort"]) for each in self.manifest.get("ports", [])}


class Manifests:
    """All manifests of an overlay. Change `all` to see a check fail."""

    def __init__(self, rendered: str) -> None:
        self.all: list[Manifest] = [each for each in yaml.safe_load_all(rendered) if each]

    @classmethod
    def of(cls, overlay: str, *components: str) -> Manifests:
        """Those of an overlay, to read and to change."""
        return copy.deepcopy(_read(overlay, *components))

    def of_kind(self, *kinds: str) -> list[Manifest]:
        """All of these kinds."""
        return [each for each in self.all if each["kind"] in kinds]

    def get(self, kind: str, name: str) -> Manifest | None:
        """The one of this name."""
        found = [each for each in self.of_kind(kind) if each["metadata"]["name"] == name]
        return found[0] if found else None

    def the(self, kind: str, name: str) -> Manifest:
        """The one of this name, which has to be there."""
        found = self.get(kind, name)
        assert found is not None, f"there is no {kind} {name}"
        return found

    def workloads(self) -> list[Manifest]:
        """What makes pods."""
        return self.of_kind(*WORKLOADS)

    def selected(self, labels: Mapping[str, str]) -> list[Manifest]:
        """The workloads whose pods have these labels."""
        return [each for each in self.workloads() if labels.items() <= pod_labels(each).items()]

    def containers(self) -> Iterator[Container]:
        """All containers of all pods."""
        for workload in self.workloads():
            for manifest in pod(workload)["containers"]:
                yield Container(workload, manifest, self.environment(workload, manifest))

    def container(self, name: str) -> Container:
        """The container of this name."""
        return next(each for each in self.containers() if each.manifest["name"] == name)

    def environment(self, workload: Manifest, container: Manifest, number: int = 0) -> dict[str, str]:
        """The variables that a container has in the workload's pod of a number, `$(NAME)` in them replaced.

        A reference to what is set only later stays as it is, as it does in Kubernetes.
        """
        pod_name = f"{workload['metadata']['name']}-{number}"
        fields = {"metadata.name": pod_name, "metadata.namespace": workload["metadata"]["namespace"]}
        values: dict[str, str] = {}
        for source in container.get("envFrom", []):
            settings = self.get("ConfigMap", source["configMapRef"]["name"])
            values.update(settings["data"] if settings else {})
        for entry in container.get("env", []):
            if "valueFrom" in entry:
                values[entry["name"]] = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
            else:
                values[entry["name"]] = replaced(str(entry["value"]), values)
        return values


def replaced(value: str, known: Mapping[str, str]) -> str:
    """A value with each `$(NAME)` that is known in it replaced."""
    return REFERENCE.sub(lambda match: known.get(match[1], match[0]), value)


REFERENCE: Final = re.compile(r"\$\((\w+)\)")


@functools.cache
def _read(overlay: str, *components: str) -> Manifests:
    return Manifests(text_of(overlay, *components))


def label(manifest: Manifest) -> str:
    """Kind and name."""
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def pod(workload: Manifest) -> Manifest:
    """What the workload's pods are made from."""
    return dict(workload["spec"]["template"]["spec"])


def pod_labels(workload: Manifest) -> dict[str, str]:
    """The labels of the workload's pods."""
    return dict(workload["spec"]["template"]["metadata"]["labels"])


def volumes_of(workload: Manifest) -> dict[str, Manifest]:
    """The volumes of the workload's pods, by name, those of claims included."""
    found = {each["name"]: each for each in pod(workload).get("volumes", [])}
    return found | {each["metadata"]["name"]: each for each in workload["spec"].get("volumeClaimTemplates", [])}


def bytes_of(quantity: str) -> float:
    """A quantity such as 512Mi or 250m as a number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(m|[KMGT]i)?", str(quantity))
    assert match is not None, quantity
    factors = {None: 1.0, "m": 0.001, "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
    return float(match[1]) * factors[match[2]]
