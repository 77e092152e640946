"""What only etcd can do to a store: go away and come back, lose an answer, forget, hang, ask who you are."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.processes import free_port
from tests.faults.proxy import TO_CLIENT, TO_SERVER, Proxy, Trouble
from tests.security.certificates import Authority
from tests.topology.etcd_server import EtcdServer, Tls, needs_etcd
from tests.topology.test_stores import until
from tests.topology.topologies import at
from topk_grpc import metrics
from topk_grpc.errors import CorruptError, SettingError, TopologyConflictError, TopologyError, UnavailableError
from topk_grpc.topology import StoreAccess, TopologyStore, open_store

pytestmark = needs_etcd
pytest.importorskip("aetcd", reason="aetcd is not installed: pip install 'topk-grpc[etcd]'")

from topk_grpc.topology import etcd, etcd_client, etcd_presence  # noqa: E402  # they import aetcd

PREFIX = "tests/topk"


@dataclass
class Line:
    """A way to etcd that can be cut."""

    proxy: Proxy
    address: str

    def cut(self, *directions: int) -> None:
        """Nothing passes any more in these directions, and nobody is told."""
        self.proxy.trouble = Trouble(cut=frozenset(directions or (TO_SERVER, TO_CLIENT)))

    def mend(self) -> None:
        """Bytes pass again, over new connections: what was held up is lost."""
        self.proxy.reset()
        self.proxy.trouble = Trouble()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EtcdServer]:
    """One to be killed."""
    it = EtcdServer(tmp_path / "etcd")
    try:
        yield it.start()
    finally:
        it.kill()


@pytest.fixture
async def line(server: EtcdServer) -> AsyncIterator[Line]:
    """What a store's bytes to etcd pass through."""
    proxy = Proxy(lambda: int(server.address.rpartition(":")[2]))
    yield Line(proxy, f"127.0.0.1:{await proxy.start()}")
    await proxy.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to wait for what does not come."""
    monkeypatch.setattr(etcd_client, "CALL_SECONDS", 0.5)


@pytest.fixture
async def store(line: Line) -> AsyncIterator[etcd.EtcdTopologyStore]:
    it = etcd.EtcdTopologyStore(f"etcd://{line.address}/{PREFIX}", StoreAccess())
    yield it
    await it.close()


@pytest.fixture
async def direct(server: EtcdServer) -> AsyncIterator[TopologyStore]:
    it = open_store(server.url(PREFIX))
    yield it
    await it.close()


# --- Away -------------------------------------------------------------------------------------------------------------


async def test_a_watch_outlives_etcd(server: EtcdServer, direct: TopologyStore) -> None:
    await direct.compare_and_set(at(1))
    async with aclosing(direct.watch()) as later:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
        for epoch in (2, 3):
            following = asyncio.ensure_future(anext(later))
            server.kill()
            await until(lambda: _refuses(direct))
            assert not following.done()
            server.start()
            writer = open_store(server.url(PREFIX))
            await writer.compare_and_set(at(epoch))
            await writer.close()
            assert (await asyncio.wait_for(following, 20)).epoch == epoch


async def _refuses(store: TopologyStore) -> bool:
    try:
        await store.read()
    except UnavailableError:
        return True
    return False


async def test_what_changed_while_a_watch_was_cut_off_arrives_also_after_a_compaction(
    server: EtcdServer, line: Line, store: TopologyStore, direct: TopologyStore
) -> None:
    await direct.compare_and_set(at(1))
    async with aclosing(store.watch()) as later:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
        following = asyncio.ensure_future(anext(later))
        line.cut()
        for epoch in (2, 3, 4):
            await direct.compare_and_set(at(epoch))
        server.compact()
        assert not following.done()
        line.mend()
        assert (await asyncio.wait_for(following, 20)).epoch == 4


async def test_a_watch_from_before_a_compaction_ends(
    server: EtcdServer, store: etcd.EtcdTopologyStore, direct: TopologyStore
) -> None:
    for epoch in (1, 2, 3):
        await direct.compare_and_set(at(epoch))
    server.compact()
    async with aclosing(store._client.changes(store._key, 1)) as changes:
        with pytest.raises(UnavailableError, match="compacted"):
            await asyncio.wait_for(anext(changes), 10)


async def test_changes_wait_while_etcd_is_away_and_nothing_is_lost(server: EtcdServer, direct: TopologyStore) -> None:
    await direct.compare_and_set(at(1))
    server.kill()
    for call in (direct.read(), direct.compare_and_set(at(2)), direct.alive()):
        began = time.monotonic()
        with pytest.raises(UnavailableError, match=server.address):
            await call
        assert time.monotonic() - began < etcd_client.CALL_SECONDS + 2
    server.start()
    await until(lambda: _answers(direct))
    assert await direct.read() == at(1)
    await direct.compare_and_set(at(2))
    assert await direct.read() == at(2)


async def _answers(store: TopologyStore) -> bool:
    return not await _refuses(store)


async def test_being_away_and_back_is_said_once(
    server: EtcdServer, direct: TopologyStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "topk")
    await direct.compare_and_set(at(1))
    server.kill()
    for _ in range(3):
        assert await _refuses(direct)
        assert metrics.REGISTRY.get_sample_value("topk_topology_store_away") == 1
    server.start()
    await until(lambda: _answers(direct))
    assert metrics.REGISTRY.get_sample_value("topk_topology_store_away") == 0
    assert [record.getMessage() for record in caplog.records] == ["topology_store_away", "topology_store_back"]


@pytest.mark.usefixtures("quick")
async def test_of_several_members_one_that_answers_is_found(server: EtcdServer, line: Line) -> None:
    store = open_store(f"etcd://127.0.0.1:{free_port()},{line.address},{server.address}/{PREFIX}")
    await store.compare_and_set(at(1))
    async with aclosing(store.watch()) as later:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
        line.cut()
        assert await store.read() == at(1)
        began = time.monotonic()
        await store.compare_and_set(at(2))
        assert time.monotonic() - began < 0.5  # the one that answered is asked first from then on
    await store.close()


@pytest.mark.usefixtures("quick")
async def test_a_member_that_hangs_is_not_waited_for(server: EtcdServer, direct: TopologyStore) -> None:
    await direct.compare_and_set(at(1))
    server.pause()
    try:
        assert await _refuses(direct)
    finally:
        server.resume()
    await until(lambda: _answers(direct))


async def test_a_cluster_of_etcd_may_lose_any_member(tmp_path: Path) -> None:
    members = EtcdServer.together(tmp_path, 3)
    store = etcd.EtcdTopologyStore(f"etcd://{','.join(each.address for each in members)}/{PREFIX}", StoreAccess())
    try:
        await store.compare_and_set(at(1))
        epoch = 1
        async with (
            aclosing(store.watch()) as later,
            store.lead("office") as leadership,
            store.announce("shard-0", "here"),
        ):
            assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
            for how in ("pause", "kill", "pause"):
                asked = store._client._members.first.address
                (member,) = (each for each in members if each.address == asked)
                (member.kill if how == "kill" else member.pause)()
                epoch += 1
                await until(lambda: _changed(store, epoch))  # noqa: B023
                assert store._client._members.first.address != asked
                seen = 0
                async with asyncio.timeout(30):
                    while seen < epoch:
                        seen = (await anext(later)).epoch
                assert await store.alive() == {"shard-0": "here"}
                assert not leadership.lost.is_set()
                (member.launch if how == "kill" else member.resume)()
                await asyncio.to_thread(member.wait_healthy)
    finally:
        await store.close()
        for member in members:
            member.kill()


async def _changed(store: TopologyStore, epoch: int) -> bool:
    """Whether the topology is of that epoch, which is brought about. Its leader gone, etcd elects another one first."""
    try:
        if (await store.read()).epoch == epoch:
            return True
        await store.compare_and_set(at(epoch))
    except UnavailableError:
        return False
    return True


# --- Changes whose answer is lost -------------------------------------------------------------------------------------


def lose(store: etcd.EtcdTopologyStore, line: Line, monkeypatch: pytest.MonkeyPatch, what: str) -> list[int]:
    """The next change's request or its answer gets lost on the way; how many were sent is counted."""
    sent: list[int] = []
    replace = store._replace

    async def lossy(*arguments: Any) -> bool:
        sent.append(1)
        if len(sent) > 1:
            return await replace(*arguments)
        line.cut(TO_CLIENT if what == "answer" else TO_SERVER)
        try:
            return await replace(*arguments)
        finally:
            line.mend()

    monkeypatch.setattr(store, "_replace", lossy)
    return sent


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("what", "times"), [("answer", 1), ("request", 2)])
async def test_a_change_whose_answer_is_lost_is_settled_by_reading(
    store: etcd.EtcdTopologyStore,
    line: Line,
    direct: TopologyStore,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
    times: int,
) -> None:
    await store.compare_and_set(at(1))
    sent = lose(store, line, monkeypatch, what)
    await store.compare_and_set(at(2, "mine"))
    assert len(sent) == times
    assert await direct.read() == at(2, "mine")


@pytest.mark.usefixtures("quick")
async def test_a_change_that_got_lost_is_no_success_when_another_made_an_equal_one(
    store: etcd.EtcdTopologyStore, line: Line, direct: TopologyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.compare_and_set(at(1))
    lose(store, line, monkeypatch, "request")
    changing = asyncio.ensure_future(store.compare_and_set(at(2)))
    await until(lambda: _moved_to(direct, 2, line))
    with pytest.raises(TopologyConflictError, match="but 2 is there"):
        await changing


async def _moved_to(direct: TopologyStore, epoch: int, line: Line) -> bool:
    """Makes the change as soon as the other's has been lost."""
    if not line.proxy.trouble.cut:
        return False
    await direct.compare_and_set(at(epoch))
    return True


@pytest.mark.usefixtures("quick")
async def test_a_change_that_was_replaced_before_it_was_found_is_unknown(
    store: etcd.EtcdTopologyStore, line: Line, direct: TopologyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.compare_and_set(at(1))
    lose(store, line, monkeypatch, "answer")
    changing = asyncio.ensure_future(store.compare_and_set(at(2)))

    async def is_there() -> bool:
        return (await direct.read()).epoch == 2

    await until(is_there)
    await direct.compare_and_set(at(3))
    with pytest.raises(UnavailableError, match=r"epoch 2 .* unknown .*read it and decide again"):
        await changing


async def test_a_change_that_cannot_be_settled_is_given_up(
    server: EtcdServer, direct: TopologyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd, "CHANGE_SECONDS", 1.0)
    await direct.compare_and_set(at(1))
    assert isinstance(direct, etcd.EtcdTopologyStore)
    replace = direct._replace

    async def killed(*arguments: Any) -> bool:
        server.kill()
        return await replace(*arguments)

    monkeypatch.setattr(direct, "_replace", killed)
    with pytest.raises(UnavailableError, match=r"epoch 2 .* unknown"):
        await asyncio.wait_for(direct.compare_and_set(at(2)), 20)


# --- Leases -----------------------------------------------------------------------------------------------------------


async def test_a_leader_that_is_cut_off_knows_before_another_can_lead(
    store: TopologyStore, line: Line, direct: TopologyStore, caplog: pytest.LogCaptureFixture
) -> None:
    await direct.compare_and_set(at(1))
    order: list[str] = []

    async def follow() -> None:
        async with direct.lead("office"):
            order.append("another leads")

    async with store.lead("office") as leadership:
        following = asyncio.ensure_future(follow())
        await asyncio.sleep(2 * etcd_presence._REFRESH_SECONDS)
        assert not leadership.lost.is_set()
        assert not following.done()
        line.cut()
        await asyncio.wait_for(leadership.lost.wait(), etcd_presence.LEASE_SECONDS)
        order.append("lost")
        await asyncio.wait_for(following, 30)
        line.mend()
        await until(lambda: _answers(store))
        caplog.clear()
    assert order == ["lost", "another leads"]
    assert not caplog.records  # that etcd knows nothing more of its lease is no news


async def test_a_short_absence_of_etcd_deposes_nobody(server: EtcdServer, direct: TopologyStore) -> None:
    async with direct.lead("office") as leadership, direct.announce("shard-0", "here"):
        server.kill()
        server.start()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(leadership.lost.wait(), etcd_presence.LEASE_SECONDS + 1)
        assert await direct.alive() == {"shard-0": "here"}


async def test_a_leader_whose_key_was_removed_hears_of_it(server: EtcdServer, direct: TopologyStore) -> None:
    async with direct.lead("office") as leadership:
        server.remove(f"{PREFIX}/leader/office")
        await asyncio.wait_for(leadership.lost.wait(), 10)


async def test_an_announcement_is_made_again_when_it_was_lost(server: EtcdServer, direct: TopologyStore) -> None:
    async def lives() -> bool:
        return await direct.alive() == {"shard-0": "here"}

    async with direct.announce("shard-0", "here"):
        assert await lives()
        server.remove(f"{PREFIX}/alive/shard-0")
        assert not await lives()
        await until(lives)


async def test_who_leads_and_who_is_announced_waits_for_etcd(server: EtcdServer, direct: TopologyStore) -> None:
    await direct.compare_and_set(at(1))
    server.kill()

    async def both() -> None:
        async with direct.lead("office"), direct.announce("shard-0", "here"):
            assert await direct.alive() == {"shard-0": "here"}

    waiting = asyncio.ensure_future(both())
    await asyncio.sleep(1)
    assert not waiting.done()
    server.start()
    await asyncio.wait_for(waiting, 20)


# --- Damage -----------------------------------------------------------------------------------------------------------


async def test_damage_is_named_and_not_replaced(server: EtcdServer, direct: TopologyStore) -> None:
    await direct.compare_and_set(at(1))
    async with aclosing(direct.watch()) as later:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
        server.put(f"{PREFIX}/topology", b"{")
        with pytest.raises(CorruptError, match=f"{PREFIX}/topology"):
            await asyncio.wait_for(anext(later), 10)
    for call in (direct.read(), direct.compare_and_set(at(2)), direct.compare_and_set(at(1))):
        with pytest.raises(CorruptError, match=f"{PREFIX}/topology"):
            await call
    server.remove(f"{PREFIX}/topology")
    await direct.compare_and_set(at(1))
    assert await direct.read() == at(1)


# --- Who may --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "ca")


@pytest.fixture
def guarded(tmp_path: Path, authority: Authority) -> Iterator[EtcdServer]:
    """TLS, client certificates and passwords."""
    it = EtcdServer(tmp_path / "etcd", Tls(authority.path, authority.issue("server")))
    try:
        it.start().ask_for_passwords("topk", "the password", PREFIX)
        (tmp_path / "password").write_text("the password\n")
        yield it
    finally:
        it.kill()


def access_of(authority: Authority, tmp_path: Path, **changes: str) -> StoreAccess:
    pair = authority.issue("client")
    given = {"ca": str(authority.path), "cert": str(pair.cert), "key": str(pair.key), "user": "topk"}
    return StoreAccess(**(given | {"password_file": str(tmp_path / "password")} | changes))  # type: ignore[arg-type]


async def test_with_certificate_and_password_everything_works_also_after_a_restart(
    guarded: EtcdServer, authority: Authority, tmp_path: Path
) -> None:
    store = open_store(guarded.url(PREFIX), access_of(authority, tmp_path))
    await store.compare_and_set(at(1))
    async with aclosing(store.watch()) as later:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
        async with store.lead("office") as leadership, store.announce("shard-0", "here"):
            guarded.kill()
            guarded.start()  # it has forgotten all logins
            await until(lambda: _answers(store))
            await store.compare_and_set(at(2))
            assert (await asyncio.wait_for(anext(later), 20)).epoch == 2
            assert await store.alive() == {"shard-0": "here"}
            assert not leadership.lost.is_set()
    await store.close()


async def test_a_certificate_that_is_replaced_is_shown_from_then_on(
    guarded: EtcdServer, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(etcd_client, "CALL_SECONDS", 1.0)
    store = open_store(guarded.url(PREFIX), access_of(authority, tmp_path))
    await store.compare_and_set(at(1))
    assert isinstance(store, etcd.EtcdTopologyStore)
    async with aclosing(store.watch()) as later, store.lead("office") as leadership:
        assert (await asyncio.wait_for(anext(later), 10)).epoch == 1
        for epoch in (2, 3):
            following = asyncio.ensure_future(anext(later))
            before = store._client._members.first.channel
            authority.issue("client")  # into the same files
            await until(lambda: _answers(store))
            assert store._client._members.first.channel is not before
            await until(
                lambda: _is_empty(store._client._members._closing)
            )  # the old connection is gone, and its watch with it
            await store.compare_and_set(at(epoch))
            assert (await asyncio.wait_for(following, 20)).epoch == epoch
        assert not leadership.lost.is_set()
    await store.close()


async def _is_empty(tasks: set[asyncio.Task[None]]) -> bool:
    return not tasks


async def test_who_is_refused_is_told_what_to_check(guarded: EtcdServer, authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("another password\n")
    refused = [
        (PREFIX, access_of(authority, tmp_path, password_file=str(tmp_path / "wrong")), "invalid user ID or password"),
        (PREFIX, access_of(authority, tmp_path, user="", password_file=""), "refuses .*--etcd-user"),
        ("others", access_of(authority, tmp_path), "permission denied"),
    ]
    for prefix, access, message in refused:
        store = open_store(guarded.url(prefix), access)
        with pytest.raises(SettingError, match=message) as caught:
            await store.read()
        assert "another password" not in str(caught.value)
        with pytest.raises(SettingError, match=message):
            async with asyncio.timeout(10), aclosing(store.watch()) as later:
                await anext(later)
        with pytest.raises(SettingError, match=message):
            async with asyncio.timeout(10), store.announce("shard-0", "here"):
                pass
        await store.close()
    for access in (access_of(authority, tmp_path, cert="", key=""), StoreAccess()):
        store = open_store(guarded.url(PREFIX), access)
        with pytest.raises(UnavailableError, match=guarded.address):
            await store.read()
        await store.close()


async def test_a_user_where_etcd_knows_none_is_a_mistake(server: EtcdServer, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("the password\n")
    store = open_store(server.url(PREFIX), StoreAccess(user="topk", password_file=str(tmp_path / "password")))
    with pytest.raises(SettingError, match="authentication is not enabled"):
        await store.read()
    await store.close()


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("etcd://127.0.0.1:2379", "prefix"),
        ("etcd://127.0.0.1:2379/", "prefix"),
        ("etcd:///topk", "'' is no address"),
        ("etcd://127.0.0.1/topk", "'127.0.0.1' is no address"),
        ("etcd://127.0.0.1:2379,:2379/topk", "':2379' is no address"),
        ("etcd://127.0.0.1:99999/topk", "99999"),
        ("etcd://topk:secret@127.0.0.1:2379/topk", "--etcd-user"),
    ],
)
def test_urls_that_name_nothing_are_refused(url: str, message: str) -> None:
    with pytest.raises(TopologyError, match=message) as caught:
        open_store(url)
    assert "secret" not in str(caught.value)


def test_the_secret_goes_to_no_other_machine_in_plaintext() -> None:
    with pytest.raises(SettingError, match=r"10\.0\.0\.1:2379 .*--etcd-ca"):
        open_store("etcd://127.0.0.1:2379,10.0.0.1:2379/topk")
    open_store("etcd://10.0.0.1:2379/topk", StoreAccess(plaintext=True))


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff"])
def test_a_password_file_that_holds_none_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingError, match=f"--etcd-password-file {path}"):
        open_store("etcd://127.0.0.1:2379/topk", StoreAccess(user="topk", password_file=str(path)))


def test_without_the_extra_it_is_named() -> None:
    script = (
        "import sys; sys.modules['aetcd'] = None; from topk_grpc.topology import open_store; open_store('etcd://a:1/b')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "TopologyError: --topology is 'etcd://a:1/b', and the package aetcd is missing" in done.stderr
    assert "pip install 'topk-grpc[etcd]'" in done.stderr
