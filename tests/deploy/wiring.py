"""Checks that manifests fit together: what one names, another has. Schemas see none of this.

Each check is a function of all manifests of an overlay, and yields what is wrong, in words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tests.deploy.rendered import CLUSTER_WIDE, Manifest, Manifests, label, pod, pod_labels, volumes_of
from topk_grpc.rpc.health import LIVENESS, READINESS


def selectors_match_pods(manifests: Manifests) -> Iterator[str]:
    """Every selector selects pods: its own workload's where it belongs to one, somebody's elsewhere."""
    for workload in manifests.workloads():
        labels = workload["spec"]["selector"]["matchLabels"]
        if manifests.selected(labels) != [workload]:
            found = [label(each) for each in manifests.selected(labels)]
            yield f"{label(workload)} selects {found} instead of its own pods"
        for selector in _placing(workload):
            if not selector.items() <= pod_labels(workload).items():
                yield f"{label(workload)} is spread by labels that its pods have not: {selector}"
    for service in manifests.of_kind("Service"):
        if len(manifests.selected(service["spec"]["selector"])) != 1:
            yield f"{label(service)} does not select the pods of one workload"
    for budget in manifests.of_kind("PodDisruptionBudget"):
        if len(manifests.selected(budget["spec"]["selector"]["matchLabels"])) != 1:
            yield f"{label(budget)} does not select the pods of one workload"
    for policy in manifests.of_kind("NetworkPolicy"):
        for chosen in _policy_selectors(policy):
            if not manifests.selected(chosen.get("matchLabels", {})):
                yield f"{label(policy)} names labels that no pod has: {chosen}"


def _placing(workload: Manifest) -> Iterator[dict[str, str]]:
    spec = pod(workload)
    apart = spec.get("affinity", {}).get("podAntiAffinity", {})
    for term in apart.get("requiredDuringSchedulingIgnoredDuringExecution", []):
        yield term["labelSelector"]["matchLabels"]
    for preferred in apart.get("preferredDuringSchedulingIgnoredDuringExecution", []):
        yield preferred["podAffinityTerm"]["labelSelector"]["matchLabels"]
    for constraint in spec.get("topologySpreadConstraints", []):
        yield constraint["labelSelector"]["matchLabels"]


def _policy_selectors(policy: Manifest) -> Iterator[Manifest]:
    spec = policy["spec"]
    yield spec["podSelector"]
    for rule in [*spec.get("ingress", []), *spec.get("egress", [])]:
        for peer in [*rule.get("from", []), *rule.get("to", [])]:
            if "podSelector" in peer and "namespaceSelector" not in peer:
                yield peer["podSelector"]


def stateful_sets_have_their_service(manifests: Manifests) -> Iterator[str]:
    """serviceName is a headless Service of the pods: without it they have no names."""
    for workload in manifests.of_kind("StatefulSet"):
        service = manifests.get("Service", workload["spec"].get("serviceName", ""))
        if service is None:
            yield f"{label(workload)}: there is no Service {workload['spec'].get('serviceName')}"
            continue
        if service["spec"].get("clusterIP") != "None":
            yield f"{label(service)} is not headless"
        if not service["spec"].get("publishNotReadyAddresses"):
            yield f"{label(service)} hides pods that are not ready, which have to be found by their names"
        if not service["spec"]["selector"].items() <= pod_labels(workload).items():
            yield f"{label(service)} does not select the pods of {label(workload)}"


def ports_are_named_and_open(manifests: Manifests) -> Iterator[str]:
    """A Service leads to ports, by name, that the containers it selects have; names and numbers are there once."""
    for container in manifests.containers():
        ports = container.manifest.get("ports", [])
        if any("name" not in each for each in ports):
            yield f"{container.where}: a port without a name"
            continue
        if len(container.ports) != len(ports) or len(set(container.ports.values())) != len(ports):
            yield f"{container.where}: two ports share a name or a number"
    for service in manifests.of_kind("Service"):
        for workload in manifests.selected(service["spec"]["selector"]):
            opened = {each["name"]: each["containerPort"] for each in _ports(workload)}
            for port in service["spec"]["ports"]:
                if port["targetPort"] not in opened:
                    yield f"{label(service)}: {label(workload)} opens no port {port['targetPort']}"
                elif opened[port["targetPort"]] != port["port"]:
                    yield f"{label(service)}: port {port['port']} is another one on the pods"


def _ports(workload: Manifest) -> list[Manifest]:
    return [port for container in pod(workload)["containers"] for port in container.get("ports", [])]


def probes_hit_what_answers(manifests: Manifests) -> Iterator[str]:
    """All three probes are there, at ports that the container opens, and ask gRPC services that it has."""
    wanted = {"startupProbe": LIVENESS, "livenessProbe": LIVENESS, "readinessProbe": READINESS}
    for container in manifests.containers():
        for name, service in wanted.items():
            probe = container.manifest.get(name)
            if probe is None:
                yield f"{container.where} has no {name}"
            elif "grpc" in probe:
                if probe["grpc"]["port"] != container.ports.get("health"):
                    yield f"{container.where}: {name} does not ask the port named health"
                if probe["grpc"].get("service") != service:
                    yield f"{container.where}: {name} asks for {probe['grpc'].get('service')!r} instead of {service!r}"
            elif container.is_topk:
                yield f"{container.where}: {name} is no gRPC probe"
            elif probe["httpGet"]["port"] not in container.ports:
                yield f"{container.where}: {name} asks the port {probe['httpGet']['port']}, which is not open"


def volumes_are_mounted(manifests: Manifests) -> Iterator[str]:
    """Every mount has its volume, every volume its mount, and /tmp can be written to."""
    for workload in manifests.workloads():
        mounts = [mount for each in pod(workload)["containers"] for mount in each.get("volumeMounts", [])]
        names, volumes = {mount["name"] for mount in mounts}, volumes_of(workload)
        yield from (f"{label(workload)}: there is no volume {name}" for name in sorted(names - set(volumes)))
        yield from (f"{label(workload)}: volume {name} is not mounted" for name in sorted(set(volumes) - names))
    for container in manifests.containers():
        paths = [mount["mountPath"] for mount in container.manifest.get("volumeMounts", [])]
        if "/tmp" not in paths:
            yield f"{container.where}: /tmp is part of a root file system that is read-only"
        if len(set(paths)) != len(paths):
            yield f"{container.where}: two volumes on one path"


def references_exist(manifests: Manifests) -> Iterator[str]:
    """ConfigMaps, accounts, roles, and the targets of the autoscaler are there, in the namespace of all."""
    [namespace] = manifests.of_kind("Namespace")
    for manifest in manifests.all:
        if (
            manifest["kind"] not in CLUSTER_WIDE
            and manifest["metadata"].get("namespace") != (namespace["metadata"]["name"])
        ):
            yield f"{label(manifest)} is not in the namespace {namespace['metadata']['name']}"
    for container in manifests.containers():
        for source in container.manifest.get("envFrom", []):
            if manifests.get("ConfigMap", source["configMapRef"]["name"]) is None:
                yield f"{container.where}: there is no ConfigMap {source['configMapRef']['name']}"
    for workload in manifests.workloads():
        if manifests.get("ServiceAccount", pod(workload).get("serviceAccountName", "default")) is None:
            yield f"{label(workload)}: there is no ServiceAccount {pod(workload).get('serviceAccountName')}"
    for binding in manifests.of_kind("RoleBinding"):
        for each in [binding["roleRef"], *binding["subjects"]]:
            if manifests.get(each["kind"], each["name"]) is None:
                yield f"{label(binding)}: there is no {each['kind']} {each['name']}"
    for scaler in manifests.of_kind("HorizontalPodAutoscaler"):
        target = manifests.get(scaler["spec"]["scaleTargetRef"]["kind"], scaler["spec"]["scaleTargetRef"]["name"])
        if target is None:
            yield f"{label(scaler)} scales what is not there"
        elif "replicas" in target["spec"]:
            yield f"{label(target)} says how many replicas there are, and so does {label(scaler)}"
        elif any("cpu" not in each["resources"]["requests"] for each in pod(target)["containers"]):
            yield f"{label(target)} requests no cpu, of which {label(scaler)} takes a share"


def rights_are_the_least(manifests: Manifests) -> Iterator[str]:
    """Shards may read their own StatefulSet. Nobody else has a token, and no role says more than that."""
    bound = {each["name"] for binding in manifests.of_kind("RoleBinding") for each in binding["subjects"]}
    for workload in manifests.workloads():
        spec = pod(workload)
        has_token = spec.get("automountServiceAccountToken") is not False
        if has_token != (spec.get("serviceAccountName") in bound):
            yield f"{label(workload)}: a token is mounted where no role is bound, or the other way round"
        if has_token and workload["metadata"]["name"] != "topk-shard":
            yield f"{label(workload)} may ask the API, and has no reason to"
    for role in manifests.of_kind("Role"):
        for rule in role["rules"]:
            names = rule.get("resourceNames", [])
            allowed = {**rule, "resourceNames": None} == {
                "apiGroups": ["apps"],
                "resources": ["statefulsets"],
                "resourceNames": None,
                "verbs": ["get"],
            }
            if not allowed or any(manifests.get("StatefulSet", name) is None for name in names) or not names:
                yield f"{label(role)} allows more than to read a StatefulSet that is there: {rule}"
    for wide in manifests.of_kind("ClusterRole", "ClusterRoleBinding"):
        yield f"{label(wide)}: rights beyond the namespace"


def budgets_let_nodes_be_emptied(manifests: Manifests) -> Iterator[str]:
    """What has several pods has a budget, and it allows one to go."""
    for workload in manifests.workloads():
        budgets = [
            each
            for each in manifests.of_kind("PodDisruptionBudget")
            if each["spec"]["selector"]["matchLabels"].items() <= pod_labels(workload).items()
        ]
        if workload["spec"].get("replicas", 2) > 1 and manifests.of_kind("PodDisruptionBudget") and not budgets:
            yield f"{label(workload)} has no disruption budget"
        yield from (f"{label(each)} does not allow one pod to go" for each in budgets if _allowed(each) != 1)


def _allowed(budget: Manifest) -> Any:
    return budget["spec"].get("maxUnavailable")
