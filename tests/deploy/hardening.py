"""Checks of what pods may do and may use: the restricted profile, images, resources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from tests.deploy.rendered import Manifest, Manifests, bytes_of, label, pod
from topk_grpc._version import VERSION

SAFE_VOLUMES: Final = {"configMap", "downwardAPI", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


def pods_are_restricted(manifests: Manifests) -> Iterator[str]:
    """The `restricted` profile of the Pod Security Standards, a root file system that is read-only, and no host."""
    for namespace in manifests.of_kind("Namespace"):
        if namespace["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            yield f"{label(namespace)} does not enforce the restricted profile"
    for workload in manifests.workloads():
        spec = pod(workload)
        said = spec.get("securityContext", {})
        if said.get("runAsNonRoot") is not True or said.get("runAsUser", 0) < 10_000:
            yield f"{label(workload)} may run as root, or as a user of the node"
        if said.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{label(workload)} has no seccomp profile"
        if any(spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{label(workload)} sees its host"
        for volume in spec.get("volumes", []):
            if not set(volume) - {"name"} <= SAFE_VOLUMES:
                yield f"{label(workload)}: volume {volume['name']} is of no safe kind"
        if spec.get("enableServiceLinks") is not False:
            yield f"{label(workload)} is given variables of Services, whose names begin as our settings do"
    for container in manifests.containers():
        said = container.manifest.get("securityContext", {})
        if said.get("allowPrivilegeEscalation") is not False or said.get("privileged"):
            yield f"{container.where} may gain rights"
        if said.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{container.where} keeps capabilities"
        if said.get("readOnlyRootFilesystem") is not True:
            yield f"{container.where} may write to its root file system"
        if {"runAsUser", "runAsNonRoot", "seccompProfile"} & set(said):
            yield f"{container.where} undoes what its pod says"


def images_are_pinned(manifests: Manifests) -> Iterator[str]:
    """Every image has a registry and the tag of one version; ours is of this version."""
    for container in manifests.containers():
        image = container.manifest["image"]
        match = re.fullmatch(r"([\w.-]+\.[\w.-]+)/([\w./-]+):(v?\d+\.\d+\.\d+)", image)
        if match is None:
            yield f"{container.where}: {image} has no registry, or no tag of one version"
        elif container.is_topk and match[3] != VERSION:
            yield f"{container.where}: {image} is not of this version, {VERSION}"


def resources_are_bounded(manifests: Manifests) -> Iterator[str]:
    """Requests and limits of all three kinds; a shard's budget leaves half of its memory to snapshots and queries."""
    for container in manifests.containers():
        resources = container.manifest.get("resources", {})
        for kind in ("cpu", "memory", "ephemeral-storage"):
            requested, limit = (resources.get(each, {}).get(kind) for each in ("requests", "limits"))
            if requested is None or limit is None:
                yield f"{container.where}: no request or no limit of {kind}"
            elif bytes_of(requested) > bytes_of(limit):
                yield f"{container.where} requests more {kind} than it may have"
        budget = container.environment.get("TOPK_MEMORY_BYTES_MAX")
        limit = resources.get("limits", {}).get("memory", "0")
        if container.manifest["name"] == "shard" and not 0 < float(budget or 0) <= bytes_of(limit) / 2:
            yield f"{container.where}: TOPK_MEMORY_BYTES_MAX is {budget}, of a limit of {limit}"
        for volume in pod(container.workload).get("volumes", []):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{container.where}: {volume['name']} may fill the node's disk"


def quotas_have_room(manifests: Manifests) -> Iterator[str]:
    """What is applied fits into the namespace's quota, with room for one pod more of each kind."""
    for quota in manifests.of_kind("ResourceQuota"):
        for name, most in quota["spec"]["hard"].items():
            needed = sum(_needed(workload, name, _replicas(workload) + 1) for workload in manifests.workloads())
            if needed > bytes_of(most):
                yield f"{label(quota)}: {name} is {most}, and {needed:g} would be needed"


def _replicas(workload: Manifest) -> int:
    return int(workload["spec"].get("replicas", 1))


def _needed(workload: Manifest, name: str, pods: int) -> float:
    """What so many pods take of one of a quota's rows."""
    claims = workload["spec"].get("volumeClaimTemplates", [])
    if name == "pods":
        return pods
    if name == "persistentvolumeclaims":
        return pods * len(claims)
    if name == "requests.storage":
        return pods * sum(bytes_of(each["spec"]["resources"]["requests"]["storage"]) for each in claims)
    if name.startswith("services."):
        return 0
    kind, _, resource = name.partition(".")
    resources: list[Any] = [each["resources"] for each in pod(workload)["containers"]]
    return pods * sum(bytes_of(each[kind][resource]) for each in resources)
