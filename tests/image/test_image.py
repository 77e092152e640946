"""The image, and the pods of both overlays: plays are sent, shards stopped and killed, every count compared.

Runs when it is asked for: `make test-image`, as root on a Debian machine with the packages of tests/image/machine.py.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

from tests.deploy.rendered import Manifests
from tests.deploy.secrets import make_secrets
from tests.image.machine import PYTHON_IMAGE, Machine, missing
from tests.image.pods import Pods
from topk_grpc._version import VERSION

ASKED: Final = os.environ.get("TOPK_TEST_IMAGE", "") not in ("", "0")

pytestmark = [
    pytest.mark.skipif(not ASKED, reason="builds an image and takes minutes: make test-image runs it"),
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]

SONGS: Final = 300
PLAYS: Final = 20_000
BEGIN_MS: Final = 1_717_200_000_000
SEND: Final = Path(__file__).with_name("send.py")


@pytest.fixture(scope="module")
def machine() -> Machine:
    lacking = missing()
    assert not lacking, f"make test-image needs root, and Debian packages: {lacking} is missing"
    machine = Machine()
    machine.make_python()
    machine.make_etcd(Manifests.of("dev").container("etcd").manifest["image"])
    seconds = 0.0 if machine.is_current(_image()) else machine.make_image()
    base = machine.size_bytes(PYTHON_IMAGE)
    own = machine.size_bytes(_image()) - base
    print(f"\nbuilt in {seconds:.0f} s: {own / 1e6:.0f} MB on a base of {base / 1e6:.0f} MB")
    return machine


def _image() -> str:
    return str(Manifests.of("dev").container("gateway").manifest["image"])


def test_image_says_what_it_is(machine: Machine) -> None:
    [described] = json.loads(machine.podman("image", "inspect", _image()))
    labels = described["Labels"]
    assert labels["org.opencontainers.image.version"] == VERSION
    assert machine.is_current(_image()), labels["org.opencontainers.image.revision"]
    assert described["Config"]["User"] == "10001:10001"
    assert described["Config"]["Entrypoint"] == ["topk"]


def test_image_has_nothing_to_build_with(machine: Machine) -> None:
    script = "command -v gcc cc; test -e /opt/topk/bin/pip && echo pip; topk --version"
    said = machine.podman(
        *("run", "--rm", "--pull=never", "--network=none", "--read-only", "--entrypoint=sh", _image(), "-c", script)
    )
    assert said == f"topk-grpc {VERSION}, compiled kernels\n"


# --- The overlays -----------------------------------------------------------------------------------------------------


def _write_plays(path: Path, seed: int) -> Counter[str]:
    """Plays in a CSV file, the first songs more often than the last, and their counts."""
    chance = random.Random(seed)
    songs = [f"song {int(SONGS * chance.random() ** 3)}" for _ in range(PLAYS)]
    path.write_text("".join(f"{song},{BEGIN_MS + chance.randrange(7 * 86_400_000)}\n" for song in songs))
    path.chmod(0o644)
    return Counter(songs)


class Running:
    """An overlay that runs, and how clients reach it."""

    def __init__(self, pods: Pods, folder: Path, options: dict[str, tuple[str, ...]]) -> None:
        self.pods = pods
        self.expected: Counter[str] = Counter()
        self._folder = folder
        self._options = options

    def send(self, seed: int) -> None:
        """Sends a file of plays; the same seed is the same file, which counts once."""
        path = self._folder / f"plays-{seed}.csv"
        known = path.exists()
        counts = _write_plays(path, seed)
        mounts = (f"--volume={self._folder}:/plays:ro", f"--volume={SEND}:/send.py:ro", "--entrypoint=python3")
        status, output = self.pods.client(
            *("/send.py", "topk-gateway:50050", f"/plays/{path.name}"), options=(*mounts, *self._options["ingest"])
        )
        assert (status, output) == (0, f"accepted {PLAYS}"), output
        if not known:
            self.expected += counts

    def check(self) -> None:
        """Every count, and the order of all songs."""
        answer = self.pods.answer("top", "--window", "global", "-k", "1000", options=self._options["query"])
        assert answer["certificate"]["complete"]
        wanted = sorted(self.expected.items(), key=lambda each: (-each[1], each[0].encode()))
        assert [(each["song_id"], each["count"]) for each in answer["entries"]] == wanted

    def check_without(self, shard: str) -> None:
        """A shard is down: queries say so, and are answered without it where that is asked for."""
        status, output = self.pods.client("top", "--window", "global", options=self._options["query"])
        assert status == 1
        assert shard in output
        part = self.pods.answer("top", "--allow-partial", "-k", "1000", options=self._options["query"])
        assert part["certificate"]["missing_shards"] == [shard]
        for each in part["entries"]:
            assert each["count"] == self.expected[each["song_id"]]


@pytest.fixture(scope="module", params=["dev", "production"])
def running(
    request: pytest.FixtureRequest, machine: Machine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    overlay: str = request.param
    folder = tmp_path_factory.mktemp(overlay)
    folder.chmod(0o755)
    (folder / "plays").mkdir()
    secrets: Path | None = None
    options: dict[str, tuple[str, ...]] = {"ingest": (), "query": ()}
    if overlay == "production":
        made = tmp_path_factory.mktemp("secrets")
        secrets = make_secrets(made)
        options = {
            "ingest": _reach(secrets, (made / "importer.token").read_text()),
            "query": _reach(secrets, (made / "website.token").read_text()),
        }
    with Pods(machine, Manifests.of(overlay), folder, secrets) as pods:
        pods.start()
        pods.wait_until_ready()
        yield Running(pods, folder / "plays", options)


def _reach(secrets: Path, token: str) -> tuple[str, ...]:
    """How a client reaches the gateways of production: with the authority alone, and its token."""
    authority = secrets / "topk-gateway-tls/ca.crt"
    authority.chmod(0o644)
    for each in (authority.parent, authority.parents[1], authority.parents[2]):
        each.chmod(0o755)
    return (f"--volume={authority}:/ca.crt:ro", "--env=TOPK_TLS_CA=/ca.crt", f"--env=TOPK_TOKEN={token.strip()}")


def test_pods_are_confined(running: Running) -> None:
    script = "id -u; touch /x 2>/dev/null || echo no; touch /tmp/x && echo yes"
    for name in running.pods.pods:
        assert running.pods.inside(name, script) == "10001\nno\nyes\n"


def test_probes_are_answered(running: Running) -> None:
    for name in running.pods.pods:
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert running.pods.answers(name, kind), (name, kind)
    held = running.pods.memory_bytes()
    print("\nidle, MB: " + ", ".join(f"{name} {size / 1e6:.0f}" for name, size in held.items()))


def test_etcd_is_backed_up_from_within(running: Running) -> None:
    """As docs/operations.md does it: the container's variables say where etcd is, and who asks."""
    assert "saved" in running.pods.inside("topk-etcd-0", "etcdctl snapshot save /tmp/etcd.db").lower()


def test_every_count_is_exact_after_stops_and_kills(running: Running) -> None:
    running.send(1)
    running.check()

    assert running.pods.stop("topk-shard-0") == 0
    running.check_without("topk-shard-0")
    running.pods.start("topk-shard-0")
    running.pods.wait_until_ready("topk-shard-0")
    running.check()

    with ThreadPoolExecutor(1) as aside:
        sending = aside.submit(running.send, 2)
        time.sleep(2)  # of the four that it takes at least: any moment of it will do
        running.pods.kill("topk-shard-1")
        running.pods.start("topk-shard-1")
        sending.result()
    running.pods.wait_until_ready("topk-shard-1")
    running.check()

    running.send(1)  # once more
    running.check()


def test_gateway_and_controller_stop_in_time(running: Running) -> None:
    for name in ("topk-controller-0", "topk-gateway-0"):
        assert running.pods.stop(name) == 0
        running.pods.start(name)
    running.pods.wait_until_ready()
    running.check()
