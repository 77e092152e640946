"""Checks of what containers are told: settings that their role has and takes, addresses that lead somewhere."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, Final

from tests.deploy.commands import UnusableError, parse, role_of, settings_of, variables_of
from tests.deploy.rendered import REFERENCE, ROOT, Container, Manifest, Manifests, label, pod
from topk_grpc import TopKClient
from topk_grpc.cli.settings import ROLES
from topk_grpc.config import describe
from topk_grpc.rpc.channels import SERVICE_CONFIG

CLIENT_ATTEMPTS: Final = int(SERVICE_CONFIG["methodConfig"][0]["retryPolicy"]["maxAttempts"])
CLIENT_PAUSES_SECONDS: Final = 3
CLIENT_SECONDS: Final = float(inspect.signature(TopKClient).parameters["deadline_seconds"].default)

DOCUMENT: Final = ROOT / "docs/kubernetes.md"


def settings_are_taken(manifests: Manifests) -> Iterator[str]:
    """Each server would start with these arguments and variables, and reads every variable that is set."""
    for container in manifests.containers():
        if not container.is_topk:
            continue
        arguments = container.manifest.get("args", [])
        try:
            settings_of(arguments, container.environment)
            known = variables_of(arguments)
        except UnusableError as error:
            yield f"{container.where}: {error}"
            continue
        for _, command, *_ in _hooks(container):  # it has the same environment
            known |= variables_of([command])
        for name in sorted(container.environment):
            if name.startswith("TOPK_") and name not in known:
                yield f"{container.where}: {role_of(arguments)} has no setting {name}"


def _hooks(container: Container) -> list[list[str]]:
    hooks: Mapping[str, Any] = container.manifest.get("lifecycle", {})
    return [list(hook["exec"]["command"]) for hook in hooks.values()]


def hooks_can_run(manifests: Manifests) -> Iterator[str]:
    """What runs before a container stops is a command of ours, about the workload that it runs in."""
    for container in manifests.containers():
        for program, *arguments in _hooks(container):
            if program != "topk":
                yield f"{container.where}: {program} is not known to be in the image"
            else:
                try:
                    parse(arguments, container.environment)
                except UnusableError as error:
                    yield f"{container.where}: topk {' '.join(arguments)}: {error}"
            named = dict(zip(arguments[1::2], arguments[2::2], strict=False))
            if named.get("--statefulset") != container.workload["metadata"]["name"]:
                yield f"{container.where}: the hook asks about another workload than its own"


def variables_are_replaced(manifests: Manifests) -> Iterator[str]:
    """No value still has a reference in it: it may name only variables that stand before it."""
    for container in manifests.containers():
        for name, value in container.environment.items():
            if REFERENCE.search(value):
                yield f"{container.where}: {name} refers to what is not set before it: {value}"


def _servers(manifests: Manifests) -> Iterator[tuple[Container, Any]]:
    """Our containers with their settings; one that would not start is left to `settings_are_taken`."""
    for container in manifests.containers():
        if container.is_topk:
            with suppress(UnusableError):
                yield container, settings_of(container.manifest.get("args", []), container.environment)


def settings_agree_with_manifests(manifests: Manifests) -> Iterator[str]:
    """Ports, addresses and names that settings state are those of containers, Services and workloads."""
    for container, settings in _servers(manifests):
        listened = int(settings.listen.rpartition(":")[2])
        told = {"grpc": listened, "health": settings.health_port, "metrics": settings.metrics_port}
        if told != container.ports:
            yield f"{container.where} is told to listen at {told}, and opens {container.ports}"
        members = settings.topology.removeprefix("etcd://").partition("/")[0].split(",")
        for member in members:
            yield from _leads_nowhere(manifests, container, member)
        etcd = manifests.the("StatefulSet", "topk-etcd")
        if len(members) != etcd["spec"]["replicas"]:
            yield f"{container.where} knows {len(members)} of the {etcd['spec']['replicas']} members of etcd"
        if hasattr(settings, "advertise"):
            yield from _leads_nowhere(manifests, container, settings.advertise)
        if hasattr(settings, "create_shards"):
            yield from _names_shards(manifests, container, settings)


def _names_shards(manifests: Manifests, container: Container, settings: Any) -> Iterator[str]:
    shards = manifests.the("StatefulSet", "topk-shard")
    if settings.shard_prefix != shards["metadata"]["name"] + "-":
        yield f"{container.where}: shards would be named {settings.shard_prefix}N, their pods are not"
    if settings.create_shards != shards["spec"]["replicas"]:
        yield f"{container.where} makes {settings.create_shards} shards, {label(shards)} has another number"


def _leads_nowhere(manifests: Manifests, container: Container, address: str) -> Iterator[str]:
    """What is wrong with SERVICE:PORT or POD.SERVICE:PORT, with or without the namespace and the cluster's domain."""
    host, _, port = address.rpartition(":")
    namespace = container.workload["metadata"]["namespace"]
    host = re.sub(rf"\.{re.escape(namespace)}\.svc(\.cluster\.local)?$", "", host)
    pod_name, _, service_name = host.rpartition(".")
    service = manifests.get("Service", service_name)
    if service is None or int(port) not in [each["port"] for each in service["spec"]["ports"]]:
        yield f"{container.where}: {address} is no Service of {namespace}"
    elif pod_name:
        [workload] = manifests.selected(service["spec"]["selector"])
        name, _, number = pod_name.rpartition("-")
        if workload["spec"].get("serviceName") != service_name or workload["metadata"]["name"] != name:
            yield f"{container.where}: {address} is no pod of {label(workload)}"
        elif int(number) >= workload["spec"]["replicas"]:
            yield f"{container.where}: {label(workload)} has no pod {pod_name}"


def files_are_mounted(manifests: Manifests) -> Iterator[str]:
    """Every path that a setting names lies on a volume, and what is in a Secret is in docs/kubernetes.md."""
    document = DOCUMENT.read_text()
    for container in manifests.containers():
        for name, path in _paths(container).items():
            mount = _mount_of(container, path)
            if mount is None:
                yield f"{container.where}: {name} is {path}, where no volume is"
                continue
            volumes = {each["name"]: each for each in pod(container.workload).get("volumes", [])}
            secret = volumes.get(mount["name"], {}).get("secret")
            if secret is None:
                continue
            key = str(PurePosixPath(path).relative_to(mount["mountPath"]))
            if not secret_is_documented(document, secret["secretName"], key):
                yield f"{container.where}: docs/kubernetes.md does not make a Secret {secret['secretName']} with {key}"
            if secret.get("defaultMode", 0o644) & 0o007:
                yield f"{container.where}: everybody in the container may read the Secret {secret['secretName']}"


def _paths(container: Container) -> dict[str, str]:
    named = {info.variable for role in ROLES.values() for info in describe(role) if info.unit == "path"}
    return {
        name: value
        for name, value in container.environment.items()
        if name in named or (name.startswith("ETCD_") and name.endswith(("_FILE", "_DIR")))
    }


def _mount_of(container: Container, path: str) -> Manifest | None:
    mounts = container.manifest.get("volumeMounts", [])
    around = [each for each in mounts if PurePosixPath(path).is_relative_to(each["mountPath"])]
    return max(around, key=lambda each: len(each["mountPath"]), default=None)


def secret_is_documented(document: str, name: str, key: str) -> bool:
    """Whether a command of the document makes the Secret, with the key."""
    commands = re.findall(r"kubectl [^\n]*create secret generic (?:[^\n]*\\\n)*[^\n]*", document)
    for command in commands:
        made = re.search(r"create secret generic (\S+)", command)
        keys = re.findall(r"--from-file=(?:(\S+?)=)?(\S+)", command)
        names = {given or PurePosixPath(path).name for given, path in keys}
        if made is not None and re.fullmatch(made[1].replace("$part", r"\w+"), name) and key in names:
            return True
    return False


def grace_outlasts_the_stop(manifests: Manifests) -> Iterator[str]:
    """A pod is killed only after its server has had all the time that its settings give it."""
    for container, settings in _servers(manifests):
        delay = float(container.environment.get("TOPK_DRAIN_DELAY_SECONDS", 0))
        grace = pod(container.workload).get("terminationGracePeriodSeconds", 30)
        if grace < delay + settings.stop_seconds + 5:
            yield f"{container.where}: stops within {delay + settings.stop_seconds:g} s, is killed after {grace} s"
        if settings.drain_seconds >= settings.stop_seconds:
            yield f"{container.where}: drains for as long as it may take to stop"
        if _hooks(container) and grace < 1800:
            yield f"{container.where}: no time to move its slots before it leaves"


def missing_shards_are_named_in_time(manifests: Manifests) -> Iterator[str]:
    """A client that has asked as often as it does by itself still has time to hear which shard is missing."""
    for container in manifests.containers():
        if container.manifest["name"] != "gateway":
            continue
        try:
            settings = settings_of(container.manifest.get("args", []), container.environment)
        except UnusableError:
            continue  # said above
        if CLIENT_ATTEMPTS * settings.query_seconds + CLIENT_PAUSES_SECONDS >= CLIENT_SECONDS:
            yield f"{container.where}: clients give up before {CLIENT_ATTEMPTS} times {settings.query_seconds:g} s"


def etcd_knows_its_variables(manifests: Manifests) -> Iterator[str]:
    """Each ETCD_ variable is a flag of etcd; needs etcd."""
    etcd = shutil.which("etcd")
    assert etcd is not None
    text = subprocess.run([etcd, "--help"], capture_output=True, text=True, check=False)
    flags = set(re.findall(r"^\s+--([a-z0-9-]+)", text.stdout + text.stderr, re.MULTILINE))
    for container in manifests.containers():
        for name in container.environment:
            if name.startswith("ETCD_") and name.removeprefix("ETCD_").lower().replace("_", "-") not in flags:
                yield f"{container.where}: etcd has no {name}"


def etcd_members_agree(manifests: Manifests) -> Iterator[str]:
    """Each member finds itself in the first list of members, and the list has as many as there are pods."""
    workload = manifests.the("StatefulSet", "topk-etcd")
    [container] = pod(workload)["containers"]
    for number in range(workload["spec"]["replicas"]):
        environment = manifests.environment(workload, container, number)
        members = dict(each.split("=", 1) for each in environment["ETCD_INITIAL_CLUSTER"].split(","))
        if len(members) != workload["spec"]["replicas"]:
            yield f"{label(workload)}: ETCD_INITIAL_CLUSTER has {len(members)} members"
        if members.get(environment["ETCD_NAME"]) != environment["ETCD_INITIAL_ADVERTISE_PEER_URLS"]:
            yield f"{label(workload)}: {environment['ETCD_NAME']} is not at its place in ETCD_INITIAL_CLUSTER"
        for kind in ("CLIENT", "PEER"):
            name = "ETCD_ADVERTISE_CLIENT_URLS" if kind == "CLIENT" else "ETCD_INITIAL_ADVERTISE_PEER_URLS"
            schemes = {environment[each].partition(":")[0] for each in (name, f"ETCD_LISTEN_{kind}_URLS")}
            if len(schemes) != 1:
                yield f"{label(workload)}: {kind.lower()}s are told another scheme than is listened for"
