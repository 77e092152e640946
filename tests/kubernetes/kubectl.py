"""A kubectl for the Kubernetes of these tests: commands of docs/operations.md do to it what they do to a real one.

    KUBECTL_SOCKET=PATH python -m tests.kubernetes.kubectl ARGUMENTS

passes its arguments on to the `Kubectl` that listens there, prints what that says, and ends with its status. Whatever
a kubectl would do and this one does not know is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

import yaml

from tests.deploy.rendered import Manifests, kustomized
from tests.kubernetes.cluster import Kubernetes, copy_stream, until

SETTLE_SECONDS: Final = 240.0
_AGAIN_SECONDS: Final = 0.2
_BYTES_MAX: Final = 1 << 20

Answer = tuple[int, str]


class Kubectl:
    """Does what callers ask for.

    Args:
        kubernetes: to do it to.
        namespace: that everything is in; another one is an error.
        folder: for the socket, and for the program `kubectl`.
    """

    def __init__(self, kubernetes: Kubernetes, namespace: str, folder: Path) -> None:
        self._kubernetes = kubernetes
        self._namespace = namespace
        self._socket = folder / "kubectl.socket"
        self._program = folder / "kubectl"
        self._program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.kubernetes.kubectl "$@"\n')
        self._program.chmod(0o755)
        self._server: asyncio.Server | None = None
        self.asked: list[list[str]] = []
        self._verbs: dict[str, Callable[[argparse.Namespace], Awaitable[Answer]]] = {
            "apply": self._apply, "cordon": self._cordon, "delete": self._delete, "drain": self._drain,
            "exec": self._exec, "get": self._get, "port-forward": self._port_forward, "rollout": self._rollout,
            "scale": self._scale, "wait": self._wait,
        }  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs to find it, and `topk`."""
        folders = [self._program.parent, Path(sys.executable).parent, os.environ["PATH"]]
        return {"KUBECTL_SOCKET": str(self._socket), "PATH": os.pathsep.join(map(str, folders))}

    async def start(self) -> None:
        """Listens."""
        self._server = await asyncio.start_unix_server(self._serve, self._socket, limit=_BYTES_MAX)

    async def close(self) -> None:
        """Ends it."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = json.loads(await reader.readline())
        try:
            status, said = await self._do(told["arguments"], Path(told["directory"]), reader)
        except Exception as error:  # a test reads it
            status, said = 1, f"kubectl {' '.join(told['arguments'])}: {error!r}\n"
        writer.write(json.dumps({"status": status, "said": said}).encode())
        writer.close()

    async def _do(self, arguments: Sequence[str], directory: Path, caller: asyncio.StreamReader) -> Answer:
        self.asked.append(list(arguments))
        parsed = _parser().parse_intermixed_args(_until_dashes(arguments))
        namespaced = parsed.verb not in {"cordon", "drain"} and not parsed.kustomize
        if namespaced and parsed.namespace != self._namespace:
            return 1, f"there is nothing in the namespace {parsed.namespace}\n"
        parsed.directory, parsed.caller = directory, caller
        parsed.command = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
        return await self._verbs[parsed.verb](parsed)

    # --- What it can do -----------------------------------------------------------------------------------------------

    async def _apply(self, asked: argparse.Namespace) -> Answer:
        if asked.kustomize:
            self._kubernetes.apply(Manifests(kustomized(asked.directory / asked.kustomize)))
            return 0, "configured\n"
        for manifest in yaml.safe_load_all((asked.directory / asked.filename).read_text(encoding="utf-8")):
            manifest["metadata"]["namespace"] = self._namespace
            self._kubernetes.make_pod(manifest)
        return 0, "created\n"

    async def _scale(self, asked: argparse.Namespace) -> Answer:
        _, name = asked.things
        self._kubernetes.scale(name, asked.replicas)
        return 0, f"statefulset.apps/{name} scaled\n"

    async def _rollout(self, asked: argparse.Namespace) -> Answer:
        verb, *things = asked.things
        if verb != "status":
            raise ValueError(f"no rollout {verb}")
        await self._kubernetes.until_settled(SETTLE_SECONDS, [one.partition("/")[2] for one in things])
        return 0, "rollout complete\n"

    async def _get(self, asked: argparse.Namespace) -> Answer:
        """`get pods --watch`; until nothing changes any more, when whoever watches would end it."""
        if asked.things != ["pods"] or not asked.watch:
            raise ValueError("only `get pods --watch` is known")
        label, _, value = asked.selector.partition("=")
        lines: list[str] = []
        while True:
            pods = [pod for pod in self._kubernetes.pods() if pod.labels.get(label) == value]
            now = [f"{pod.name} {pod.state}" for pod in pods]
            lines += [line for line in now if line not in lines]
            if pods and all(pod.ready for pod in pods) and self._kubernetes.settled():
                return 0, "\n".join(lines) + "\n"
            await asyncio.sleep(_AGAIN_SECONDS)

    async def _delete(self, asked: argparse.Namespace) -> Answer:
        kind, *names = asked.things
        for name in names:
            if kind == "pvc":
                self._kubernetes.delete_claim(name)
            elif kind == "pod":
                await self._kubernetes.delete_pod(name, SETTLE_SECONDS)
            else:
                raise ValueError(f"no delete {kind}")
        if kind == "pvc" and asked.wait:
            await until(lambda: not any(map(self._kubernetes.has_claim, names)), SETTLE_SECONDS)
        return 0, "".join(f"{kind} {name} deleted\n" for name in names)

    async def _drain(self, asked: argparse.Namespace) -> Answer:
        """One pod of each kind at a time, as the budgets of `production` have it. They come back on this node."""
        gone = []
        for pod in list(self._kubernetes.pods()):
            await self._kubernetes.delete_pod(pod.name, SETTLE_SECONDS)
            await self._kubernetes.until_settled(SETTLE_SECONDS)
            gone.append(pod.name)
        return 0, "".join(f"pod/{name} evicted\n" for name in gone)

    async def _cordon(self, asked: argparse.Namespace) -> Answer:
        """There is no other node: nothing."""
        return 0, f"node/{asked.things[0]} cordoned\n"

    async def _exec(self, asked: argparse.Namespace) -> Answer:
        (name,) = asked.things
        return await self._kubernetes.pod(name).run_inside(asked.command)

    async def _port_forward(self, asked: argparse.Namespace) -> Answer:
        """Until the caller ends it."""
        service, port = asked.things

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection(service.partition("/")[2], int(port))
            await asyncio.gather(copy_stream(reader, back), copy_stream(there, writer))

        async with await asyncio.start_server(pass_on, "127.0.0.1", int(port)):
            await asked.caller.read()
        return 0, ""

    async def _wait(self, asked: argparse.Namespace) -> Answer:
        (thing,) = asked.things
        if getattr(asked, "for") != "condition=Ready":
            raise ValueError("only --for=condition=Ready is known")
        await until(lambda: self._kubernetes.pod(thing.partition("/")[2]).ready, 30)
        return 0, f"{thing} condition met\n"


def _until_dashes(arguments: Sequence[str]) -> Sequence[str]:
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    """The flags that are known; all others are refused."""
    parser = _Parser()
    parser.add_argument("-n", "--namespace", default="default")
    parser.add_argument("-k", "--kustomize", default="")
    parser.add_argument("-f", "--filename", default="")
    parser.add_argument("-l", "--selector", default="")
    parser.add_argument("--replicas", type=int)
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--wait", type=lambda text: text == "true", default=True)
    parser.add_argument("--for")
    parser.add_argument("--ignore-daemonsets", action="store_true")
    parser.add_argument("--delete-emptydir-data", action="store_true")
    parser.add_argument("verb")
    parser.add_argument("things", nargs="*")
    return parser


def main() -> None:
    """The program."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["KUBECTL_SOCKET"])
        told = {"arguments": sys.argv[1:], "directory": str(Path.cwd())}
        connection.sendall(json.dumps(told).encode() + b"\n")
        with connection.makefile("rb") as answer:
            answered = json.loads(answer.read())
    sys.stdout.write(answered["said"])
    sys.exit(answered["status"])


if __name__ == "__main__":
    main()
