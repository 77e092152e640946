"""The bare relay: the way of the bytes without anything done to them.

    generator → relay process → 2 sink processes, and answers back

The same two gRPC hops as the real system's, over the same library and event loop: each message is cut in two
halves, one for each sink; when both have answered the generator is. Nothing is parsed, hashed, split by song,
stored or counted. So its rate is what the transport would allow, and the real system's share of it says what the
work on the plays costs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc
import uvloop

from benchmarks.generator import CHANNEL_OPTIONS

METHOD: Final = "/benchmarks.Relay/Pass"
_SERVICE: Final = "benchmarks.Relay"
_ANSWER: Final = b"\x08\x01"
_SERVER_OPTIONS: Final = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
)

Context = grpc.aio.ServicerContext[Any, Any]


async def sink(requests: AsyncIterator[bytes], context: Context) -> None:
    """Answers each message."""
    async for _ in requests:
        await context.write(_ANSWER)


class Relay:
    """Cuts each message in as many parts as there are sinks.

    Args:
        sinks: their addresses.
    """

    def __init__(self, sinks: list[str]) -> None:
        self._channels = [grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) for address in sinks]

    async def serve(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Serves a stream."""
        methods: list[grpc.aio.StreamStreamMultiCallable[bytes, bytes]] = [
            channel.stream_stream(METHOD) for channel in self._channels
        ]
        calls = [method() for method in methods]

        async def forward() -> None:
            async for message in requests:
                size = -(-len(message) // len(calls))
                for index, call in enumerate(calls):
                    await call.write(message[index * size : (index + 1) * size])
            for call in calls:
                await call.done_writing()

        async def answer() -> None:
            while True:
                answers = [await call.read() for call in calls]
                if any(each is grpc.aio.EOF for each in answers):
                    return
                await context.write(_ANSWER)

        await asyncio.gather(forward(), answer())


async def _serve(sinks: list[str]) -> None:
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        Relay(sinks).serve if sinks else sink
    )
    server.add_registered_method_handlers(_SERVICE, {"Pass": handler})
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    print(f"127.0.0.1:{port}", flush=True)
    await stop.wait()
    await server.stop(1)


def main() -> None:
    """Serves until SIGTERM; the first line on standard output is the address."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sinks", nargs="*", help="addresses to pass messages on to; none: be a sink")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, contextlib.suppress(KeyboardInterrupt):
        runner.run(_serve(arguments.sinks))


if __name__ == "__main__":
    main()
