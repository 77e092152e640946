"""Runs the pods of an overlay with podman: what a kubelet would start, as far as one container of a pod can be.

what manifests say                              what podman is told
image, command, args, env, envFrom              the same, references replaced
limits of memory and cpu                        --memory, --cpus
securityContext                                 --user, --cap-drop, --security-opt, --read-only
emptyDir, Secret, volume claim                  a tmpfs of that size, files of the group, a directory that stays
Services                                        lines of /etc/hosts
probes                                          asked from here, over the pods' network
"""

from __future__ import annotations

import json
import os
import shutil
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.rendered import Manifest, Manifests, bytes_of, pod, volumes_of
from tests.image.machine import Machine

_SUBNET: Final = "10.91.7"
_READY_SECONDS: Final = 120.0


@dataclass(frozen=True)
class Pod:
    """One pod, which may run or not."""

    name: str
    address: str
    number: int
    workload: Manifest

    @property
    def container(self) -> Manifest:
        """Its only container."""
        [found] = pod(self.workload)["containers"]
        return dict(found)


class Pods:
    """All pods of an overlay on a network of their own. Use it as a context manager.

    Args:
        machine: with all images.
        manifests: of the overlay.
        folder: for volumes.
        secrets: a directory for each Secret, with a file for each key.
    """

    def __init__(self, machine: Machine, manifests: Manifests, folder: Path, secrets: Path | None = None) -> None:
        self._machine = machine
        self._manifests = manifests
        self._folder = folder
        self._secrets = secrets
        [namespace] = manifests.of_kind("Namespace")
        self._namespace = namespace["metadata"]["name"]
        self._network = f"topk-test-{os.getpid()}"
        self.pods = {each.name: each for each in self._list()}

    def _list(self) -> Iterator[Pod]:
        number = 10
        for workload in self._manifests.workloads():
            scaler = self._manifests.get("HorizontalPodAutoscaler", workload["metadata"]["name"])
            replicas = workload["spec"].get("replicas") or (scaler["spec"]["minReplicas"] if scaler else 1)
            for each in range(replicas):
                yield Pod(f"{workload['metadata']['name']}-{each}", f"{_SUBNET}.{number}", each, workload)
                number += 1

    def __enter__(self) -> Pods:
        self._machine.podman("network", "create", "--disable-dns", "--subnet", f"{_SUBNET}.0/24", self._network)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.pods:
            self._machine.podman("rm", "--force", "--time", "0", name, check=False)
        self._machine.podman("network", "rm", "--force", self._network, check=False)

    @property
    def _hosts(self) -> Iterator[str]:
        for service in self._manifests.of_kind("Service"):
            name = service["metadata"]["name"]
            [workload] = self._manifests.selected(service["spec"]["selector"])
            behind = [each for each in self.pods.values() if each.workload is workload]
            if workload["spec"].get("serviceName") == name:
                for each in behind:
                    yield f"{each.name}.{name}:{each.address}"
                    yield f"{each.name}.{name}.{self._namespace}.svc.cluster.local:{each.address}"
            else:
                yield f"{name}:{behind[0].address}"

    def start(self, *names: str) -> None:
        """Starts pods, each from nothing but its volumes."""
        for name in names or self.pods:
            each = self.pods[name]
            self._machine.podman("rm", "--force", "--time", "0", name, check=False)
            self._machine.podman("run", "--detach", *self._options(each), *self._command(each))

    def _options(self, each: Pod) -> Iterator[str]:
        said, limits = pod(each.workload)["securityContext"], each.container["resources"]["limits"]
        yield from ("--name", each.name, "--hostname", each.name, "--pull=never")
        yield "--restart=on-failure"  # as a kubelet does: a gateway that starts before there is a topology ends
        yield from ("--network", self._network, "--ip", each.address)
        yield from (f"--user={said['runAsUser']}:{said['runAsGroup']}", f"--group-add={said['fsGroup']}")
        yield from ("--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only", "--read-only-tmpfs=false")
        yield from (f"--memory={bytes_of(limits['memory']):.0f}", f"--cpus={bytes_of(limits['cpu']):g}")
        yield from (f"--add-host={line}" for line in self._hosts)
        environment = self._manifests.environment(each.workload, each.container, each.number)
        yield from (f"--env={name}={value}" for name, value in environment.items())
        volumes = volumes_of(each.workload)
        for mount in each.container["volumeMounts"]:
            yield from self._mounted(each, volumes[mount["name"]], mount["mountPath"], said["fsGroup"])

    def _mounted(self, each: Pod, volume: Manifest, path: str, group: int) -> Iterator[str]:
        if "emptyDir" in volume:
            size = f"{bytes_of(volume['emptyDir']['sizeLimit']):.0f}"
            yield f"--tmpfs={path}:rw,size={size},mode=1777,nosuid,nodev"
        elif "secret" in volume:
            assert self._secrets is not None
            copy = self._folder / "secrets" / volume["secret"]["secretName"]
            if not copy.exists():
                shutil.copytree(self._secrets / copy.name, copy)
                for file in copy.iterdir():
                    os.chown(file, 0, group)
                    file.chmod(volume["secret"]["defaultMode"])
            yield f"--volume={copy}:{path}:ro"
        else:
            claim = self._folder / f"{volume['metadata']['name']}-{each.name}"
            if not claim.exists():
                claim.mkdir()
                os.chown(claim, 0, group)
                claim.chmod(0o2775)
            yield f"--volume={claim}:{path}"

    def _command(self, each: Pod) -> Iterator[str]:
        entrypoint, *rest = each.container.get("command", [""])
        if entrypoint:
            yield f"--entrypoint={entrypoint}"
        yield each.container["image"]
        yield from (*rest, *each.container.get("args", []))

    def wait_until_ready(self, *names: str) -> None:
        """Waits until readiness probes are answered well."""
        deadline = time.monotonic() + _READY_SECONDS
        for name in names or self.pods:
            while not self.answers(name, "readinessProbe"):
                assert time.monotonic() < deadline, f"{name} does not become ready:\n{self.log(name)}"
                time.sleep(0.5)

    def answers(self, name: str, kind: str) -> bool:
        """Whether a probe of a pod is answered well, once."""
        each = self.pods[name]
        probe = each.container[kind]
        if "grpc" in probe:
            with grpc.insecure_channel(f"{each.address}:{probe['grpc']['port']}") as channel:
                request = health_pb2.HealthCheckRequest(service=probe["grpc"]["service"])
                try:
                    answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe["timeoutSeconds"])
                except grpc.RpcError:
                    return False
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
        [port] = [port["containerPort"] for port in each.container["ports"] if port["name"] == probe["httpGet"]["port"]]
        try:
            with urllib.request.urlopen(f"http://{each.address}:{port}{probe['httpGet']['path']}", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def stop(self, name: str) -> int:
        """SIGTERM, and after the pod's grace SIGKILL.

        Returns:
            The status that it ended with.
        """
        grace = min(pod(self.pods[name].workload)["terminationGracePeriodSeconds"], 90)
        self._machine.podman("stop", "--time", str(grace), name, seconds=grace + 30)
        return int(self._machine.podman("inspect", "--format", "{{.State.ExitCode}}", name))

    def kill(self, name: str) -> None:
        """SIGKILL."""
        self._machine.podman("kill", "--signal", "KILL", name)
        self._machine.podman("wait", name)

    def log(self, name: str) -> str:
        """The end of what it has said."""
        return self._machine.run("sh", "-c", f"podman logs --tail 40 {name} 2>&1", check=False)

    def inside(self, name: str, script: str) -> str:
        """Runs a shell's script in a pod."""
        return self._machine.podman("exec", name, "sh", "-c", script)

    def memory_bytes(self) -> dict[str, int]:
        """What the processes of each pod hold, without the page cache."""
        found = {}
        for name in self.pods:
            status = self.inside(name, "cat /proc/1/status")
            [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
            found[name] = int(line.split()[1]) << 10
        return found

    def client(self, *arguments: str, options: tuple[str, ...] = ()) -> tuple[int, str]:
        """Runs a client command of the image as a pod beside the others.

        Args:
            arguments: of the command.
            options: of podman.

        Returns:
            Its status, and what it printed on both of its outputs.
        """
        image = self.pods["topk-gateway-0"].container["image"]
        command = [
            *("podman", "run", "--rm", "--pull=never", "--network", self._network, "--read-only", "--user=10001:10001"),
            *(f"--add-host={line}" for line in self._hosts),
            *(*options, "--env=TOPK_GATEWAY=topk-gateway:50050", image, *arguments),
        ]
        script = 'out=$("$@" 2>&1); status=$?; printf "%s\\n%s" "$status" "$out"'
        status, _, output = self._machine.run("bash", "-c", script, "client", *command, seconds=300).partition("\n")
        return int(status), output

    def answer(self, *arguments: str, **options: Any) -> Any:
        """The same, of a command that prints JSON and works."""
        status, output = self.client(*arguments, "--json", **options)
        assert status == 0, output
        return json.loads(output[output.index("{") :])
