"""Health: grpc.health.v1 with the services `liveness`, `readiness` and "" (the server as a whole, as ready as it is).

Probes of a kubelet carry no credentials and must be answered while the main port is busy or asks for some: the same
health can be served alone on a port of its own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio

from topk_grpc import metrics

LIVENESS: Final = "liveness"
READINESS: Final = "readiness"
OVERALL: Final = ""

_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING

if TYPE_CHECKING:

    class _Base:
        async def Check(self, request: Any, context: Any) -> Any: ...  # noqa: N802
        async def Watch(self, request: Any, context: Any) -> None: ...  # noqa: N802
        async def set(self, service: str, status: Any) -> None: ...

else:
    _Base = aio.HealthServicer


class _Servicer(_Base):
    """The stock servicer, whose watches end when the server does: else each would hold up the stop until it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.closing = asyncio.Event()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802
        tasks = [asyncio.ensure_future(super().Watch(request, context)), asyncio.ensure_future(self.closing.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


class Health:
    """What a server says of itself. Live from the start, ready when told.

    Belongs to the event loop it was made in.
    """

    def __init__(self) -> None:
        self._servicer = _Servicer()
        self._ready = False

    @property
    def ready(self) -> bool:
        """What `set` said last."""
        return self._ready

    async def register(self, *servers: grpc.aio.Server) -> None:
        """Adds the health service to servers that have not started yet."""
        await self._servicer.set(LIVENESS, _SERVING)
        await self.set(ready=self._ready)
        for server in servers:
            health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def set(self, *, ready: bool) -> None:
        """Says whether the server wants calls."""
        self._ready = ready
        metrics.READY.set(ready)
        for service in (READINESS, OVERALL):
            await self._servicer.set(service, _SERVING if ready else _NOT_SERVING)

    async def close(self) -> None:
        """Not ready any more, and ends all watches; liveness stays until the server is gone."""
        await self.set(ready=False)
        self._servicer.closing.set()
