"""A Kubernetes of one machine: what its controllers, its kubelet, its services and its API do for these manifests.

StatefulSets and Deployments make pods, replace them when their template changes, and have as many as they are to have;
a Service takes connections for the pods that are ready. Runs within the network namespace of the node.
"""

from __future__ import annotations

import asyncio
import copy
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.deploy.rendered import Manifest, Manifests, pod_labels
from tests.kubernetes.api import KubernetesApi
from tests.kubernetes.pods import Place, Pod, revision_of

NODE: Final = "node"
_AGAIN_SECONDS: Final = 0.2


async def until(condition: Callable[[], bool], seconds: float) -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: it does not hold in time.
    """
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(_AGAIN_SECONDS)


def hosts_of(manifests: Manifests, most: Mapping[str, int], bare: Sequence[str] = ()) -> dict[str, list[str]]:
    """The hosts that pods may run on, one for each at once, and what each is called.

    Args:
        manifests: of the cluster.
        most: the pods of a workload that there may be at once, where that is not one more than it says.
        bare: pods that no workload keeps.
    """
    hosts: dict[str, list[str]] = {name: [] for name in bare}
    for workload in manifests.workloads():
        name, labels = _name(workload), pod_labels(workload)
        count = most.get(name, workload["spec"].get("replicas", 1) + (workload["kind"] == "Deployment"))
        services = [each for each in manifests.of_kind("Service") if each["spec"]["selector"].items() <= labels.items()]
        for number in range(count):
            pod = f"{name}-{number}"
            hosts[pod] = [
                each
                for service in services
                if service["spec"].get("clusterIP") == "None" and workload["spec"].get("serviceName") == _name(service)
                for each in _domains(f"{pod}.{_name(service)}", service)
            ]
    hosts[NODE] = [
        each
        for service in manifests.of_kind("Service")
        if service["spec"].get("clusterIP") != "None"
        for each in (_name(service), *_domains(_name(service), service))
    ]
    return hosts


def _name(thing: Manifest) -> str:
    return str(thing["metadata"]["name"])


def _domains(name: str, service: Manifest) -> list[str]:
    namespace = service["metadata"]["namespace"]
    return [name, *(f"{name}.{namespace}{rest}" for rest in ("", ".svc", ".svc.cluster.local"))]


@dataclass
class Machine:
    """What the pods share.

    Attributes:
        root: for everything that they write.
        within: runs a command on a host, by its name.
        addresses: of the hosts.
        hosts: a file with the names of all.
        api: the Kubernetes API.
        going: claims of volumes that are deleted when their pods have gone.
    """

    root: Path
    within: Mapping[str, Sequence[str]]
    addresses: Mapping[str, str]
    hosts: Path
    api: KubernetesApi
    made: int = 0
    going: set[str] = field(default_factory=set)

    @property
    def volumes(self) -> Path:
        """Of the volumes that last, one for each claim."""
        return self.root / "volumes"

    def release(self, pod: str) -> None:
        """Deletes the volumes that waited for a pod's end."""
        for claim in [claim for claim in self.going if claim.endswith(f"-{pod}")]:
            shutil.rmtree(self.volumes / claim)
            self.going.remove(claim)

    def place(self, host: str) -> Place:
        """Where the next pod on a host runs."""
        self.made += 1
        return Place(
            self.within[host],
            self.addresses[host],
            self.hosts,
            self.volumes,
            self.root / "pods" / f"{host}-{self.made}",
            self.api.account,
            self.api.environment,
        )


class Workload:
    """What keeps the pods of a StatefulSet or a Deployment.

    Attributes:
        wanted: the object as it was applied last.
        pods: by host.
        gone: those that are no more.
    """

    def __init__(self, machine: Machine, manifests: Manifests, wanted: Manifest) -> None:
        self._machine = machine
        self._manifests = manifests
        self.wanted = wanted
        self.pods: dict[str, Pod] = {}
        self.gone: list[Pod] = []
        self._ending: dict[Pod, asyncio.Task[None]] = {}
        self._task = asyncio.create_task(self._run())

    @property
    def name(self) -> str:
        """Of the workload."""
        return _name(self.wanted)

    @property
    def replicas(self) -> int:
        """How many pods there are to be."""
        return int(self.wanted["spec"].get("replicas", 1))

    @property
    def settled(self) -> bool:
        """All pods are ready and of the wanted revision, and there are no others."""
        revision = revision_of(self.wanted)
        return (
            not self._ending
            and len(self.pods) == self.replicas
            and all(pod.ready and pod.revision == revision for pod in self.pods.values())
        )

    def apply(self, wanted: Manifest, manifests: Manifests) -> None:
        """Another version of it; where that says no number of replicas, it stays."""
        self.wanted = copy.deepcopy(wanted) | {"spec": {"replicas": self.replicas} | wanted["spec"]}
        self._manifests = manifests

    def scale(self, replicas: int) -> None:
        """As `kubectl scale`."""
        self.wanted = copy.deepcopy(self.wanted) | {"spec": self.wanted["spec"] | {"replicas": replicas}}

    def delete(self, host: str) -> None:
        """As `kubectl delete pod`."""
        self._end(host)

    def _make(self, host: str) -> None:
        place = self._machine.place(host)
        place.scratch.mkdir(parents=True)
        self.pods[host] = Pod(host, self.wanted, place, self._manifests)

    def _end(self, host: str) -> None:
        pod = self.pods[host]
        if pod not in self._ending:
            self._ending[pod] = asyncio.create_task(self._see_off(host, pod))

    async def _see_off(self, host: str, pod: Pod) -> None:
        await pod.terminate()
        self._machine.release(host)
        del self.pods[host], self._ending[pod]
        self.gone.append(pod)

    async def _run(self) -> None:
        step = self._step_set if self.wanted["kind"] == "StatefulSet" else self._step_deployment
        while True:
            step()
            await asyncio.sleep(_AGAIN_SECONDS)

    def _step_set(self) -> None:
        """One step of a StatefulSet: too few, too many, or one of an older revision."""
        parallel = self.wanted["spec"].get("podManagementPolicy") == "Parallel"
        hosts = [f"{self.name}-{number}" for number in range(self.replicas)]
        missing = [host for host in hosts if host not in self.pods]
        surplus = [host for host in self.pods if host not in hosts]
        unready = any(not pod.ready for pod in self.pods.values())
        if missing and (parallel or not unready):
            for host in missing if parallel else missing[:1]:
                self._make(host)
        elif surplus and (parallel or not self._ending):
            for host in surplus if parallel else sorted(surplus)[-1:]:
                self._end(host)
        elif not unready and not self._ending:
            old = [host for host in hosts if self.pods[host].revision != revision_of(self.wanted)]
            if old:
                self._end(old[-1])

    def _step_deployment(self) -> None:
        """One step of a Deployment: new pods as far as the surge allows, old ones go when others are ready."""
        rolling = self.wanted["spec"].get("strategy", {}).get("rollingUpdate", {})
        surge, unavailable = (_count(rolling.get(each, 1), self.replicas) for each in ("maxSurge", "maxUnavailable"))
        if self.wanted["spec"].get("strategy", {}).get("type") == "Recreate":
            surge, unavailable = 0, self.replicas
        revision = revision_of(self.wanted)
        staying = {host: pod for host, pod in self.pods.items() if not pod.terminating}
        new = [host for host, pod in staying.items() if pod.revision == revision]
        old = [host for host in staying if host not in new]
        if len(new) < self.replicas and len(staying) < self.replicas + surge:
            # Pods of a Deployment take a host that is free: those that are going still have theirs.
            free = (host for host in self._machine.addresses if host.rpartition("-")[0] == self.name)
            if host := next((host for host in free if host not in self.pods), ""):
                self._make(host)
                return
        ready = sum(pod.ready for pod in staying.values())
        extra = [*old, *new[self.replicas :]]
        if extra and (ready > self.replicas - unavailable or not staying[extra[0]].ready):
            self._end(extra[0])

    async def close(self) -> None:
        """Ends everything at once."""
        self._task.cancel()
        for task in self._ending.values():
            task.cancel()
        await asyncio.gather(self._task, *self._ending.values(), return_exceptions=True)
        await asyncio.gather(*(pod.kill() for pod in self.pods.values()))


def _count(value: int | str, replicas: int) -> int:
    return value if isinstance(value, int) else replicas * int(value.rstrip("%")) // 100


class ServiceProxy:
    """A Service with an address of the cluster: each connection goes to a pod that is ready."""

    def __init__(self, service: Manifest, pods: Callable[[], Iterator[Pod]]) -> None:
        self._selector = service["spec"]["selector"]
        self._ports = service["spec"]["ports"]
        self._pods = pods
        self._servers: list[asyncio.Server] = []
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, address: str) -> None:
        """Listens."""
        for port in self._ports:

            def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: Manifest = port) -> None:
                task = asyncio.create_task(self._pass_on(reader, writer, port))
                self._connections.add(task)
                task.add_done_callback(self._connections.discard)

            self._servers.append(await asyncio.start_server(take, address, port["port"]))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: Manifest) -> None:
        ends = [
            (pod.address, pod.container.ports[port["targetPort"]])
            for pod in self._pods()
            if self._selector.items() <= pod.labels.items() and pod.ready and not pod.terminating
        ]
        try:
            if not ends:
                return
            with suppress(OSError):
                there, back = await asyncio.open_connection(*random.choice(ends))
                await asyncio.gather(copy_stream(reader, back), copy_stream(there, writer))
        finally:
            writer.close()

    async def close(self) -> None:
        """Ends it, and what goes through it."""
        for server in self._servers:
            server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)


async def copy_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Passes on what comes, until it ends or breaks."""
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@dataclass
class Kubernetes:
    """The whole. Use it as an asynchronous context manager."""

    machine: Machine
    manifests: Manifests
    workloads: dict[str, Workload] = field(default_factory=dict)
    _proxies: list[ServiceProxy] = field(default_factory=list)
    _bare: dict[str, Pod] = field(default_factory=dict)

    async def __aenter__(self) -> Kubernetes:
        for service in self.manifests.of_kind("Service"):
            if service["spec"].get("clusterIP") != "None":
                proxy = ServiceProxy(service, self.pods)
                self._proxies.append(proxy)
                await proxy.start(self.machine.addresses[NODE])
        self._allow()
        for workload in self.manifests.workloads():
            self.workloads[_name(workload)] = Workload(self.machine, self.manifests, workload)
            self._tell_api(_name(workload))
        return self

    def _allow(self) -> None:
        """What Roles let service accounts ask for."""
        for role in self.manifests.of_kind("Role"):
            for rule in role["rules"]:
                if "statefulsets" in rule["resources"] and "get" in rule["verbs"] and "apps" in rule["apiGroups"]:
                    self.machine.api.allowed.update(rule.get("resourceNames", ()))

    def _tell_api(self, name: str) -> None:
        self.machine.api.sets[name] = self.workloads[name].wanted

    def pods(self) -> Iterator[Pod]:
        """Those of the workloads that there are."""
        for workload in self.workloads.values():
            yield from workload.pods.values()

    def pod(self, name: str) -> Pod:
        """The one of this name."""
        return self._bare[name] if name in self._bare else next(pod for pod in self.pods() if pod.name == name)

    def apply(self, manifests: Manifests) -> None:
        """As `kubectl apply` of a newer version."""
        self.manifests = manifests
        for wanted in manifests.workloads():
            self.workloads[_name(wanted)].apply(wanted, manifests)
            self._tell_api(_name(wanted))

    def scale(self, name: str, replicas: int) -> None:
        """As `kubectl scale`."""
        self.workloads[name].scale(replicas)
        self._tell_api(name)

    def make_pod(self, manifest: Manifest) -> None:
        """As `kubectl apply` of a pod that no workload keeps."""
        name, template = _name(manifest), {"metadata": manifest["metadata"], "spec": manifest["spec"]}
        place = self.machine.place(name)
        place.scratch.mkdir(parents=True)
        self._bare[name] = Pod(name, {**manifest, "spec": {"template": template}}, place, self.manifests)

    async def delete_pod(self, name: str, seconds: float) -> None:
        """As `kubectl delete pod`: until it is gone.

        Raises:
            TimeoutError: it takes longer.
        """
        if name in self._bare:
            await self._bare.pop(name).terminate()
            return
        pod = self.pod(name)
        for workload in self.workloads.values():
            if name in workload.pods:
                workload.delete(name)
        await until(lambda: all(each is not pod for each in self.pods()), seconds)

    def delete_claim(self, name: str) -> None:
        """As `kubectl delete pvc`: what a pod has mounted goes with it."""
        if not self.has_claim(name):
            raise ValueError(f"there is no claim {name}")
        self.machine.going.add(name)
        holders = [pod.name for pod in self.pods() if name.endswith(f"-{pod.name}")]
        if not holders:
            self.machine.release(name.partition("-")[2])

    def has_claim(self, name: str) -> bool:
        """Whether there is a volume for it."""
        return (self.machine.volumes / name).exists()

    def settled(self, names: Sequence[str] = ()) -> bool:
        """Whether workloads, all or these, are as they are to be."""
        return all(self.workloads[name].settled for name in names or self.workloads)

    async def until_settled(self, seconds: float, names: Sequence[str] = ()) -> float:
        """Waits until workloads, all or these, are as they are to be; how long that took.

        Raises:
            AssertionError: it took too long.
        """
        began = time.monotonic()
        await asyncio.sleep(2 * _AGAIN_SECONDS)
        try:
            await until(lambda: self.settled(names), seconds)
        except TimeoutError:
            raise AssertionError(f"not settled within {seconds:g} s:\n{self.tell()}") from None
        return time.monotonic() - began

    def tell(self) -> str:
        """How everything is."""
        lines = []
        for workload in self.workloads.values():
            lines.append(f"{workload.name}: {workload.replicas} wanted")
            for pod in workload.pods.values():
                lines += [f"  {pod.name} {pod.state}, ended {pod.ended}", pod.log_tail()]
        return "\n".join(lines)

    def every_pod(self) -> Iterator[Pod]:
        """Those that there are, and those that there were."""
        for workload in self.workloads.values():
            yield from (*workload.gone, *workload.pods.values())

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(proxy.close() for proxy in self._proxies))
        await asyncio.gather(*(workload.close() for workload in self.workloads.values()))
        await asyncio.gather(*(pod.kill() for pod in self._bare.values()))
