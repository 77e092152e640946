"""Real servers on the loopback: handlers, errors, health, reflection, ports, streams."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from topk_grpc import errors
from topk_grpc.pb.topk.v1 import topk_service_pb2 as pb
from topk_grpc.pb.topk.v1 import topk_service_pb2_grpc as pb_grpc
from topk_grpc.pb.topk.v1.play_pb2 import PlayBatch
from topk_grpc.rpc import status
from topk_grpc.rpc.channels import open_channel, target_of
from topk_grpc.rpc.server import (
    Health,
    add_raw_handlers,
    add_reflection,
    bind,
    create_server,
    graceful_stop,
    parse,
    start_health_server,
)
from topk_grpc.rpc.streams import messages

SERVICE = "topk.v1.TopKService"
GARBAGE = b"\xff\xff\xff"


# The stubs take methods that nobody writes, or that raw handlers replace, for abstract.
Generated: Any = pb_grpc.TopKServiceServicer


class Servicer(Generated):  # type: ignore[misc]
    """GetTopK raises what `fail` holds; ListCharts and others are not written."""

    def __init__(self) -> None:
        self.fail: BaseException | None = None
        self.drain = asyncio.Event()
        self.left = asyncio.Event()

    async def GetTopK(self, request: pb.GetTopKRequest, context: Any) -> pb.GetTopKResponse:
        if self.fail is not None:
            raise self.fail
        return pb.GetTopKResponse()

    async def record(self, raw: bytes, context: Any) -> bytes:
        request = parse(pb.RecordPlaysRequest, raw)
        return pb.RecordPlaysResponse(sequence=request.batch.sequence).SerializeToString()

    async def stream(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        try:
            async with aclosing(messages(requests, self.drain)) as source:
                async for raw in source:
                    request = parse(pb.StreamPlaysRequest, raw)
                    yield pb.StreamPlaysResponse(sequence=request.batch.sequence).SerializeToString()
            # What is owed after the end.
            yield pb.StreamPlaysResponse(sequence=99).SerializeToString()
        finally:
            self.left.set()


class Running:
    def __init__(self, server: grpc.aio.Server, servicer: Servicer, health: Health, address: str) -> None:
        self.server, self.servicer, self.health, self.address = server, servicer, health, address
        self.channel = open_channel(address)
        self.stub: Any = pb_grpc.TopKServiceStub(self.channel)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    server = create_server(1 << 16)
    servicer, health = Servicer(), Health()
    pb_grpc.add_TopKServiceServicer_to_server(servicer, server)
    add_raw_handlers(
        server, SERVICE, stream_stream={"StreamPlays": servicer.stream}, unary_unary={"RecordPlays": servicer.record}
    )
    add_reflection(server, [SERVICE])
    await health.register(server)
    address = await bind(server, "127.0.0.1:0")
    await server.start()
    it = Running(server, servicer, health, address)
    yield it
    await it.channel.close()
    await graceful_stop([server], health, 1)


async def fails(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(call, 20)
    return caught.value


# --- Handlers ---------------------------------------------------------------------------------------------------------


async def test_raw_unary_handler_replaces_the_generated_one(running: Running) -> None:
    answer = await running.stub.RecordPlays(pb.RecordPlaysRequest(batch=PlayBatch(sequence=7)))
    assert answer.sequence == 7


async def test_raw_stream_handler_replaces_the_generated_one(running: Running) -> None:
    call = running.stub.StreamPlays()
    await call.write(pb.StreamPlaysRequest(batch=PlayBatch(sequence=5)))
    assert (await call.read()).sequence == 5
    await call.done_writing()
    assert (await call.read()).sequence == 99
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


async def test_generated_handlers_go_on_beside_raw_ones(running: Running) -> None:
    assert await running.stub.GetTopK(pb.GetTopKRequest()) == pb.GetTopKResponse()


async def test_unwritten_method_is_unimplemented(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    error = await fails(running.stub.ListCharts(pb.ListChartsRequest()))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("method", ["GetTopK", "RecordPlays"])
async def test_garbage_is_an_invalid_argument(running: Running, method: str) -> None:
    call: Any = running.channel.unary_unary(f"/{SERVICE}/{method}")
    error = await fails(call(GARBAGE))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(status.from_rpc_error(error), errors.InvalidArgumentError)


async def test_garbage_on_a_stream_ends_it_and_leaves_the_server_alive(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    call: Any = running.channel.stream_stream(f"/{SERVICE}/StreamPlays")()
    await call.write(GARBAGE)
    error = await fails(call.read())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    await asyncio.wait_for(running.servicer.left.wait(), 20)
    assert not caplog.records
    assert await running.stub.GetTopK(pb.GetTopKRequest()) == pb.GetTopKResponse()


async def test_a_message_over_the_limit_is_refused_by_name(running: Running) -> None:
    too_large = pb.RecordPlaysRequest(batch=PlayBatch(producer_id="x" * 70_000))
    assert (await fails(running.stub.RecordPlays(too_large))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    call = running.stub.StreamPlays()
    await call.write(pb.StreamPlaysRequest(batch=too_large.batch))
    error = await fails(call.read())
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not status.is_retriable(error)


async def test_errors_of_handlers_carry_reason_and_retry(running: Running) -> None:
    running.servicer.fail = errors.ResourceExhaustedError("the scan queue is full: 64 wait; ask again later")
    error = await fails(running.stub.GetTopK(pb.GetTopKRequest()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status.retry_after_ms(error) == 1000
    back = status.from_rpc_error(error)
    assert type(back) is errors.ResourceExhaustedError
    assert str(back) == str(running.servicer.fail)


async def test_long_foreign_words_survive_the_trailers(running: Running) -> None:
    running.servicer.fail = errors.InvalidArgumentError("жёлтый 🎵 " * 1000)
    error = await fails(running.stub.GetTopK(pb.GetTopKRequest()))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert type(status.from_rpc_error(error)) is errors.InvalidArgumentError
    assert str(status.from_rpc_error(error)).startswith("жёлтый 🎵 жёлтый")


async def test_unknown_errors_are_internal_and_logged_by_id(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    running.servicer.fail = ZeroDivisionError("a fault of ours")
    with caplog.at_level(logging.ERROR):
        error = await fails(running.stub.GetTopK(pb.GetTopKRequest()))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "fault" not in (error.details() or "")
    (record,) = [record for record in caplog.records if record.getMessage() == "handler_failed"]
    fields = record.__dict__["topk_fields"]
    assert fields["error_id"] in (error.details() or "")
    assert fields["method"] == f"/{SERVICE}/GetTopK"
    assert record.exc_info


async def test_unavailable_calls_are_tried_again_by_the_channel(running: Running) -> None:
    class Flaky(Exception):  # noqa: N818
        pass

    calls = 0

    async def handler(raw: bytes, context: Any) -> bytes:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise Flaky from errors.UnavailableError("not yet")
        return b""

    server = create_server(1 << 16)
    pb_grpc.add_TopKServiceServicer_to_server(Servicer(), server)
    add_raw_handlers(server, SERVICE, unary_unary={"GetTopK": handler})
    address = await bind(server, "127.0.0.1:0")
    await server.start()
    try:
        async with open_channel(["127.0.0.1:1", address]) as channel:
            stub: Any = pb_grpc.TopKServiceStub(channel)
            assert await stub.GetTopK(pb.GetTopKRequest()) == pb.GetTopKResponse()
    finally:
        await server.stop(0)
    assert calls == 3


# --- Draining ---------------------------------------------------------------------------------------------------------


async def test_a_drained_stream_sends_what_it_owes_and_ends_with_ok(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    call = running.stub.StreamPlays()
    await call.write(pb.StreamPlaysRequest(batch=PlayBatch(sequence=1)))
    assert (await call.read()).sequence == 1
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    running.servicer.drain.set()
    loop = asyncio.get_running_loop()
    started = loop.time()
    await asyncio.gather(graceful_stop([running.server], running.health, 30), call.read())
    assert loop.time() - started < 10, "the stop waited for a stream or a watch"
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK
    assert not caplog.records


async def test_an_urgent_stop_cuts_what_is_under_way(running: Running) -> None:
    call = running.stub.StreamPlays()
    await call.write(pb.StreamPlaysRequest(batch=PlayBatch(sequence=1)))
    assert (await call.read()).sequence == 1
    urgent = asyncio.Event()
    urgent.set()
    await asyncio.wait_for(graceful_stop([running.server], running.health, 60, urgent), 20)
    assert (await fails(call.read())).code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


async def test_a_client_that_leaves_ends_the_handler_quietly(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    call = running.stub.StreamPlays()
    await call.write(pb.StreamPlaysRequest(batch=PlayBatch(sequence=1)))
    assert (await call.read()).sequence == 1
    call.cancel()
    await asyncio.wait_for(running.servicer.left.wait(), 20)
    assert not caplog.records


# --- Health and reflection --------------------------------------------------------------------------------------------


async def health_of(channel: grpc.aio.Channel, service: str) -> int:
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def test_health_tells_liveness_from_readiness(running: Running) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert await health_of(running.channel, "liveness") == serving
    assert await health_of(running.channel, "readiness") == not_serving
    assert await health_of(running.channel, "") == not_serving
    await running.health.set(ready=True)
    assert running.health.ready
    assert await health_of(running.channel, "readiness") == serving
    assert await health_of(running.channel, "") == serving
    assert (await fails(health_of(running.channel, "nobody"))).code() is grpc.StatusCode.NOT_FOUND


async def test_health_is_served_alone_on_a_port_of_its_own(running: Running) -> None:
    await running.health.set(ready=True)
    server, address = await start_health_server(running.health, running.address, 0)
    try:
        async with open_channel(address) as channel:
            assert await health_of(channel, "readiness") == health_pb2.HealthCheckResponse.SERVING
            stub: Any = pb_grpc.TopKServiceStub(channel)
            assert (await fails(stub.GetTopK(pb.GetTopKRequest()))).code() is grpc.StatusCode.UNIMPLEMENTED
    finally:
        await server.stop(0)


async def test_watches_of_health_see_changes(running: Running) -> None:
    watch = health_pb2_grpc.HealthStub(running.channel).Watch(health_pb2.HealthCheckRequest(service="readiness"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await running.health.set(ready=True)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_reflection_lists_the_services(running: Running) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(running.channel)
    call = stub.ServerReflectionInfo()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    names = {service.name for service in (await call.read()).list_services_response.service}
    assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE))
    assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


# --- Ports ------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def idle() -> AsyncIterator[grpc.aio.Server]:
    server = create_server(1 << 16)
    yield server
    await server.stop(0)


async def test_a_port_in_use_is_an_error_at_once(running: Running, idle: grpc.aio.Server) -> None:
    port = running.address.rpartition(":")[2]
    for address in (running.address, f"localhost:{port}", f"0.0.0.0:{port}"):
        with pytest.raises(errors.AddressInUseError, match=rf"(?s)port {port} .*--listen"):
            await bind(idle, address)


async def test_a_port_that_was_given_back_is_free_at_once(idle: grpc.aio.Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:" + str(listener.getsockname()[1])
        with socket.create_connection(listener.getsockname()) as caller:
            listener.accept()[0].close()  # this end closes first: the port is left in TIME_WAIT
            assert caller.recv(1) == b""
    assert await bind(idle, address) == address


@pytest.mark.parametrize(
    "address",
    ["", "garbage", "127.0.0.1", "127.0.0.1:", ":50050", "127.0.0.1:99999", "127.0.0.1:-1", "::1:80", "127.0.0.1:x"],
)
async def test_malformed_addresses_are_named(idle: grpc.aio.Server, address: str) -> None:
    with pytest.raises(errors.SettingError, match="--listen"):
        await bind(idle, address)


@pytest.mark.parametrize("address", ["192.0.2.1:5000", "host.invalid:5000", "host.invalid:0"])
async def test_addresses_of_other_machines_are_named(idle: grpc.aio.Server, address: str) -> None:
    with pytest.raises(errors.SettingError, match=r"192\.0\.2\.1|host\.invalid"):
        await bind(idle, address)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("127.0.0.1:50050", "127.0.0.1:50050"),
        ("dns:///gateways:50050", "dns:///gateways:50050"),
        (["127.0.0.1:1"], "127.0.0.1:1"),
        (["127.0.0.1:1", "127.0.0.2:2", "127.0.0.1:1"], "ipv4:127.0.0.1:1,127.0.0.2:2"),
        (["[::1]:1", "[::2]:2"], "ipv6:[::1]:1,[::2]:2"),
        (["localhost:1", "127.0.0.2:2"], "ipv4:127.0.0.1:1,127.0.0.2:2"),
    ],
)
def test_targets(target: str | list[str], expected: str) -> None:
    assert target_of(target) == expected


@pytest.mark.parametrize("target", ["", [], ["127.0.0.1:1", "[::1]:2"], ["127.0.0.1", "127.0.0.2"]])
def test_targets_that_name_nothing(target: str | list[str]) -> None:
    with pytest.raises(errors.SettingError):
        target_of(target)


async def test_round_robin_over_a_list() -> None:
    seen: list[int] = []

    def handler_of(number: int) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def handler(raw: bytes, context: Any) -> bytes:
            seen.append(number)
            return b""

        return handler

    servers = [create_server(1 << 16) for _ in range(2)]
    addresses = []
    for number, server in enumerate(servers):
        pb_grpc.add_TopKServiceServicer_to_server(Servicer(), server)
        add_raw_handlers(server, SERVICE, unary_unary={"GetTopK": handler_of(number)})
        addresses.append(await bind(server, "127.0.0.1:0"))
        await server.start()
    try:
        async with open_channel(addresses) as channel:
            stub: Any = pb_grpc.TopKServiceStub(channel)
            deadline = asyncio.get_running_loop().time() + 20
            while set(seen) != {0, 1}:  # the second connection may come up later
                assert asyncio.get_running_loop().time() < deadline
                await stub.GetTopK(pb.GetTopKRequest())
    finally:
        await asyncio.gather(*(server.stop(0) for server in servers))


def test_service_config_is_json_that_grpc_takes() -> None:
    from topk_grpc.rpc.channels import SERVICE_CONFIG

    described = {
        (service.full_name, method.name)
        for service in pb.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    (config,) = json.loads(json.dumps(SERVICE_CONFIG))["methodConfig"]
    named = {(name["service"], name["method"]) for name in config["name"]}
    assert {each for each in described if each[1] not in {"StreamPlays", "WatchTopK"}} <= named
