"""A pod as processes of this machine: its container's command in a network, a file system and a user of its own.

    network      a namespace that stands already (tests/cluster/hosts.py), with the pod's address
    files        this machine's, under a layer of the pod's own: read-only where the container's are, with its volumes
    user         the container's, without capabilities
    environment  the container's, and nothing else

What the image brings is this checkout's `.venv`, and Debian's etcd where the image has its own. Limits of resources
are not kept, and network policies neither.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.deploy.rendered import ROOT, Container, Manifest, Manifests, pod, pod_labels, replaced, volumes_of

PATH: Final = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
SERVICE_ACCOUNT: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
_BACKOFF_SECONDS: Final = (1.0, 10.0)

_ENTER: Final = """
set -e
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$LAYER"
mkdir "$LAYER/upper" "$LAYER/work" "$LAYER/root"
chmod 755 "$LAYER/upper"
mount -t overlay -o lowerdir=/,upperdir="$LAYER/upper",workdir="$LAYER/work" overlay "$LAYER/root"
cd "$LAYER/root"
"""


@dataclass(frozen=True)
class Image:
    """What a container's image name stands for.

    Attributes:
        entrypoint: of the image.
        links: files that the image has, and where this machine has them.
    """

    entrypoint: tuple[str, ...] = ()
    links: Mapping[str, str] = field(default_factory=dict)


def image_of(name: str) -> Image:
    """By the last part of its name."""
    known = {
        "topk-grpc": Image((str(Path(sys.executable).with_name("topk")),)),
        "etcd": Image(
            ("/usr/local/bin/etcd",), {f"/usr/local/bin/{name}": f"/usr/bin/{name}" for name in ("etcd", "etcdctl")}
        ),
    }
    return known[name.rsplit("/", 1)[-1].partition(":")[0]]


@dataclass(frozen=True)
class Place:
    """Where a pod runs.

    Attributes:
        within: runs a command in its network.
        address: in that network.
        hosts: a file with the names of all.
        volumes: the directory of the volumes that last, one for each claim.
        scratch: the directory of what goes with the pod.
        account: the service account's files, where the pod gets them.
        api: where the API is.
    """

    within: Sequence[str]
    address: str
    hosts: Path
    volumes: Path
    scratch: Path
    account: Path
    api: Mapping[str, str]


class Pod:
    """One pod, from its making to its end. Of one container.

    Attributes:
        name: of the pod.
        revision: of its template.
        container: with its environment.
        labels: of the pod.
        address: of the pod.
        ready: what its readiness probe said last, while it is not stopped.
        terminating: it was told to go.
        ended: how its process ended, in order; negative: by that signal.
        killed: the grace period was not enough.
        hooks_failed: how often.
        ready_seconds: how long it took to be ready for the first time.
    """

    def __init__(self, name: str, workload: Manifest, place: Place, manifests: Manifests) -> None:
        self._spec, self._workload = pod(workload), workload
        if self._spec.get("initContainers"):
            raise ValueError("this runner knows no init containers")
        (container,) = self._spec["containers"]
        number = int(last) if (last := name.rpartition("-")[2]).isdigit() else 0
        self.container = Container(workload, container, manifests.environment(workload, container, number))
        self.name, self.labels, self.revision = name, pod_labels(workload), revision_of(workload)
        self.address = place.address
        self._place = place
        self.ready = False
        self.terminating = False
        self.ended: list[int] = []
        self.killed = False
        self.hooks_failed = 0
        self.ready_seconds: float | None = None
        self.began = time.monotonic()
        self._process: asyncio.subprocess.Process | None = None
        self._log = place.scratch / "log"
        self._task = asyncio.create_task(self._run())

    @property
    def state(self) -> str:
        """In a word or two."""
        return "terminating" if self.terminating else "ready" if self.ready else "not ready"

    # --- The container ------------------------------------------------------------------------------------------------

    def _environment(self) -> dict[str, str]:
        return {"PATH": PATH, "HOME": "/", "HOSTNAME": self.name, **self._place.api, **self.container.environment}

    def _command(self, environment: Mapping[str, str]) -> list[str]:
        manifest = self.container.manifest
        command = manifest.get("command") or image_of(manifest["image"]).entrypoint
        return [replaced(word, environment) for word in (*command, *manifest.get("args", []))]

    def _as_user(self, environment: Mapping[str, str], command: Sequence[str]) -> list[str]:
        security = self._spec.get("securityContext", {}) | self.container.manifest.get("securityContext", {})
        user, group = str(security["runAsUser"]), str(security["runAsGroup"])
        become = ["setpriv", "--reuid", user, "--regid", group, "--groups", str(security.get("fsGroup", group))]
        become += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
        return [*become, "env", "-i", *(f"{name}={value}" for name, value in environment.items()), *command]

    def _mounts(self) -> list[tuple[Path, str, bool]]:
        """Directories, where they belong, and whether they are only to be read."""
        claims = {one["metadata"]["name"] for one in self._workload["spec"].get("volumeClaimTemplates", [])}
        volumes = volumes_of(self._workload)
        owner = self._spec.get("securityContext", {}).get("fsGroup", 0)
        found = []
        for mount in self.container.manifest.get("volumeMounts", []):
            name = mount["name"]
            volume: Manifest = volumes.get(name, {})
            if name in claims:
                source = self._place.volumes / f"{name}-{self.name}"
            elif "persistentVolumeClaim" in volume:
                source = self._place.volumes / volume["persistentVolumeClaim"]["claimName"]
            elif "emptyDir" in volume:
                source = self._place.scratch / name
            else:
                raise ValueError(f"this runner does not know the volume {volume}")
            if not source.exists():
                source.mkdir(parents=True)
                os.chown(source, 0, owner)
                source.chmod(0o2775)
            found.append((source, mount["mountPath"], mount.get("readOnly", False)))
        if self._spec.get("automountServiceAccountToken", True):
            found.append((self._place.account, SERVICE_ACCOUNT, True))
        return sorted(found, key=lambda one: one[1])

    def _script(self, command: Sequence[str]) -> str:
        """What makes the pod's files, and becomes its command."""
        lines = [_ENTER]
        mounts = [*self._mounts(), (ROOT, str(ROOT), True)]  # last, as it may lie within another
        lines += [
            f"ln -sfn {target} {shlex.quote('.' + name)}"
            for name, target in image_of(self.container.manifest["image"]).links.items()
        ]
        for source, target, read_only in mounts:
            # Resolved within: /var/run is a link, and must not lead to this machine's.
            lines += [
                f"at=.$(chroot . realpath -m {shlex.quote(target)})",
                f'mkdir -p "$at" && mount --bind {shlex.quote(str(source))} "$at"',
            ]
            if read_only:
                lines.append('mount -o remount,bind,ro "$at"')
        # Whoever is not root has to get as far as the checkout, and the interpreter.
        ways = [*reversed(ROOT.parents), *reversed(Path(sys.base_prefix).parents)]
        parents = dict.fromkeys(str(parent) for parent in ways if parent != Path("/"))
        lines += [f"chmod o+x {shlex.quote('.' + parent)}" for parent in parents]
        lines += [f"mount --rbind /{name} ./{name}" for name in ("proc", "dev", "sys")]
        lines.append(f"mount --bind {shlex.quote(str(self._place.hosts))} ./etc/hosts")
        if (self.container.manifest.get("securityContext") or {}).get("readOnlyRootFilesystem"):
            lines.append("mount -o remount,ro .")
        return "\n".join([*lines, f"exec chroot . {shlex.join(command)}"])

    async def _run(self) -> None:
        """Keeps the container running until the pod has to go."""
        pause, pause_max = _BACKOFF_SECONDS
        while not self.terminating:
            await self._start()
            watching = asyncio.create_task(self._probe())
            assert self._process is not None
            status = await self._process.wait()
            self._note(f"ended with {status}")
            self.ended.append(status)
            self.ready = False
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            if not self.terminating:
                await asyncio.sleep(pause)
                pause = min(pause_max, 2 * pause)

    async def _start(self) -> None:
        environment = self._environment()
        script = self._script(self._as_user(environment, self._command(environment)))
        layer = self._place.scratch / "layer"
        layer.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._place.within, "sh", "-c", script,
                env={"PATH": os.environ["PATH"], "LAYER": str(layer)},
                stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    async def run_inside(self, command: Sequence[str]) -> tuple[int, str]:
        """Runs a command in the running container, as an exec hook or probe is."""
        assert self._process is not None
        words = self._as_user(self._environment(), command)
        enter = ["nsenter", f"--target={self._process.pid}", "--mount", "--net", "--root", "--wd"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *enter, *words, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=asyncio.subprocess.STDOUT
        )
        try:
            said, _ = await process.communicate()
        except asyncio.CancelledError:
            with suppress(ProcessLookupError):
                process.kill()
            raise
        assert process.returncode is not None
        return process.returncode, said.decode()

    # --- Probes -------------------------------------------------------------------------------------------------------

    async def _probe(self) -> None:
        """Starts, then asks for readiness and liveness, each in its own time."""
        if (startup := self.container.manifest.get("startupProbe")) is not None:
            await self._until_failed(startup, done=True)
        await asyncio.gather(self._watch_readiness(), self._watch_liveness())

    async def _watch_liveness(self) -> None:
        if (probe := self.container.manifest.get("livenessProbe")) is not None:
            await self._until_failed(probe)

    async def _until_failed(self, probe: Manifest, *, done: bool = False) -> None:
        """Kills the container when the probe has failed too often; `done`: returns when it has passed once."""
        failed = 0
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        while True:
            passed = await self._passes(probe)
            if passed and done:
                return
            failed = 0 if passed else failed + 1
            if failed >= probe.get("failureThreshold", 3) and not self.terminating:
                self._note(f"a probe failed {failed} times: {probe}")
                self._signal(signal.SIGTERM)
                return
            await asyncio.sleep(probe.get("periodSeconds", 10))

    def _has_root(self) -> bool:
        """Whether the container's files are there, and its command runs among them."""
        return self._process is not None and str(Path(f"/proc/{self._process.pid}/root").readlink()) != "/"

    async def _watch_readiness(self) -> None:
        probe = self.container.manifest.get("readinessProbe")
        if probe is None:
            while not self._has_root():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            self.ready = True
            return
        failed = 0
        await asyncio.sleep(probe.get("initialDelaySeconds", 0))
        while True:
            if await self._passes(probe):
                failed = 0
                self.ready = True
                if self.ready_seconds is None:
                    self.ready_seconds = time.monotonic() - self.began
            else:
                failed += 1
                if failed >= probe.get("failureThreshold", 3):
                    self.ready = False
            await asyncio.sleep(probe.get("periodSeconds", 10))

    async def _passes(self, probe: Manifest) -> bool:
        kinds: dict[str, Callable[[Any], Awaitable[bool]]] = {
            "grpc": self._passes_grpc, "httpGet": self._passes_http, "exec": self._passes_exec
        }  # fmt: skip
        (kind,) = kinds.keys() & probe.keys()
        try:
            async with asyncio.timeout(probe.get("timeoutSeconds", 1)):
                return await kinds[kind](probe[kind])
        except (OSError, TimeoutError, grpc.RpcError):
            return False

    async def _passes_grpc(self, probe: Manifest) -> bool:
        async with grpc.aio.insecure_channel(f"{self._place.address}:{probe['port']}") as channel:
            request = health_pb2.HealthCheckRequest(service=probe.get("service", ""))
            answer = await health_pb2_grpc.HealthStub(channel).Check(request)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def _passes_http(self, probe: Manifest) -> bool:
        reader, writer = await asyncio.open_connection(self._place.address, self.container.ports[probe["port"]])
        try:
            writer.write(f"GET {probe['path']} HTTP/1.0\r\n\r\n".encode())
            status = int((await reader.readline()).split()[1])
        except (IndexError, ValueError):
            return False
        finally:
            writer.close()
        return HTTPStatus.OK <= status < HTTPStatus.BAD_REQUEST

    async def _passes_exec(self, probe: Manifest) -> bool:
        return (await self.run_inside(probe["command"]))[0] == 0

    # --- Its end ------------------------------------------------------------------------------------------------------

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _note(self, text: str) -> None:
        with self._log.open("a") as log:
            log.write(f"--- {text}\n")

    async def terminate(self) -> None:
        """As a kubelet does: the hook, SIGTERM, and SIGKILL when the grace period is over."""
        self.terminating, self.ready = True, False
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._spec.get("terminationGracePeriodSeconds", 30)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._run_hook()
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout_at(deadline):
                await asyncio.shield(self._task)
        except TimeoutError:
            self.killed = True
            self._signal(signal.SIGKILL)
            await self._task
        shutil.rmtree(self._place.scratch / "tmp", ignore_errors=True)

    async def _run_hook(self) -> None:
        hook = self.container.manifest.get("lifecycle", {}).get("preStop")
        if hook is None or self._process is None or self._process.returncode is not None:
            return
        if "sleep" in hook:
            await asyncio.sleep(hook["sleep"]["seconds"])
            return
        status, said = await self.run_inside(hook["exec"]["command"])
        self._note(f"preStop ended with {status}: {said}")
        self.hooks_failed += status != 0

    async def kill(self) -> None:
        """Ends it at once, with whatever it has."""
        self.terminating = True
        self._task.cancel()
        self._signal(signal.SIGKILL)
        if self._process is not None:
            await self._process.wait()
        await asyncio.gather(self._task, return_exceptions=True)

    def log_tail(self, lines: int = 30) -> str:
        """What it said last."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:]) if self._log.exists() else ""


def revision_of(workload: Manifest) -> str:
    """Changes when pods have to be made anew."""
    template = json.dumps(workload["spec"]["template"], sort_keys=True)
    return hashlib.sha256(template.encode()).hexdigest()[:10]
