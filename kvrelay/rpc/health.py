"""`grpc.health.v1` whose state is set without waiting and whose watchers all hear of it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.errors import NotFound
from kvrelay.rpc.handlers import Context


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no stubs
    """One state for the process, under its own name "" and under each service's.

    Not serving until told so; after `close` never again, and watchers are let go.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset({"", *names})
        self._is_serving = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def set_serving(self, is_serving: bool) -> None:
        self._is_serving = is_serving and not self._is_closed
        self._wake_watchers()

    def close(self) -> None:
        self._is_serving, self._is_closed = False, True
        self._wake_watchers()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._names:
            raise NotFound("no such service here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                yield health_pb2.HealthCheckResponse(status=status)
                told = status
            if self._is_closed:
                return
            await changed.wait()

    def _status(self, name: str) -> Any:  # a ServingStatus
        if name not in self._names:
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._is_serving:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING

    def _wake_watchers(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
