"""Checks of the network policies: what has to pass does, and what need not does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from tests.deploy.rendered import Manifest, Manifests, label, pod, pod_labels

NEEDED: Final = frozenset(
    {
        ("topk-gateway", "topk-shard", 50051),
        ("topk-controller", "topk-shard", 50051),
        ("topk-shard", "topk-shard", 50051),
        ("topk-gateway", "topk-etcd", 2379),
        ("topk-controller", "topk-etcd", 2379),
        ("topk-shard", "topk-etcd", 2379),
        ("topk-etcd", "topk-etcd", 2380),
    }
)
"""Who calls whom, and at which port. Nothing else passes within the cluster."""


def only_what_is_needed_passes(manifests: Manifests) -> Iterator[str]:
    """Within the cluster the policies allow `NEEDED`, and nothing else."""
    workloads = manifests.workloads()
    ports = {port["containerPort"] for each in workloads for port in _ports(each)}
    for source in workloads:
        for target in workloads:
            for port in sorted(ports & {each["containerPort"] for each in _ports(target)}):
                names = (source["metadata"]["name"], target["metadata"]["name"], port)
                out = _allows(manifests, source, target, port, "Egress")
                into = _allows(manifests, target, source, port, "Ingress", at=target)
                if names in NEEDED and not (out and into):
                    yield f"{names[0]} cannot reach {names[1]} at {port}"
                if names not in NEEDED and out and into:
                    yield f"{names[0]} can reach {names[1]} at {port}, and has no reason to"


def strangers_are_kept_out(manifests: Manifests) -> Iterator[str]:
    """Everything is denied to every pod unless a policy allows it; from the namespace clients reach gateways alone."""
    denied = [
        each
        for each in manifests.of_kind("NetworkPolicy")
        if each["spec"]["podSelector"] == {} and not each["spec"].get("ingress") and not each["spec"].get("egress")
    ]
    if not any(set(each["spec"]["policyTypes"]) == {"Ingress", "Egress"} for each in denied):
        yield "no policy denies everything to all pods of the namespace"
    for target in manifests.workloads():
        for port in _ports(target):
            reached = _allows(manifests, target, None, port["containerPort"], "Ingress", at=target)
            meant = (target["metadata"]["name"], port["name"]) == ("topk-gateway", "grpc")
            if reached != meant:
                yield f"a client {'cannot' if meant else 'can'} reach {label(target)} at {port['containerPort']}"


def everybody_can_look_up_names(manifests: Manifests) -> Iterator[str]:
    """DNS, in both protocols; and the API server for those alone who have a token for it."""
    for workload in manifests.workloads():
        allowed = {
            (port.get("protocol"), port["port"])
            for policy in _policies(manifests, workload, "Egress")
            for rule in policy["spec"].get("egress", [])
            if not rule.get("to")
            for port in rule.get("ports", [])
        }
        if not {("UDP", 53), ("TCP", 53)} <= allowed:
            yield f"{label(workload)} cannot look up names"
        has_token = pod(workload).get("automountServiceAccountToken") is not False
        if has_token != ({("TCP", 443), ("TCP", 6443)} <= allowed):
            yield f"{label(workload)} has a token and no way to the API, or a way and no token"


def _allows(
    manifests: Manifests, of: Manifest, peer: Manifest | None, port: int, kind: str, at: Manifest | None = None
) -> bool:
    """Whether a policy of a workload lets it speak with a peer; None: some pod of the namespace without labels."""
    target = at or peer
    assert target is not None
    numbers = {each["name"]: each["containerPort"] for each in _ports(target)}
    for policy in _policies(manifests, of, kind):
        for rule in policy["spec"].get("ingress" if kind == "Ingress" else "egress", []):
            peers = rule.get("from" if kind == "Ingress" else "to")
            named = [numbers.get(each["port"], each["port"]) for each in rule.get("ports", [])]
            if (not named or port in named) and (not peers or any(_is(peer, each) for each in peers)):
                return True
    return False


def _is(peer: Manifest | None, described: Manifest) -> bool:
    if "podSelector" not in described or "namespaceSelector" in described:
        return False
    labels = described["podSelector"].get("matchLabels", {})
    return bool(labels.items() <= (pod_labels(peer) if peer is not None else {}).items())


def _policies(manifests: Manifests, workload: Manifest, kind: str) -> list[Manifest]:
    return [
        each
        for each in manifests.of_kind("NetworkPolicy")
        if kind in each["spec"]["policyTypes"]
        and each["spec"]["podSelector"].get("matchLabels", {}).items() <= pod_labels(workload).items()
    ]


def _ports(workload: Manifest) -> list[Manifest]:
    return [port for container in pod(workload)["containers"] for port in container.get("ports", [])]
