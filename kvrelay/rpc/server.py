"""A gRPC server as every service runs it: health, reflection, limits, statuses, policy, drain."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from kvrelay.config import SettingsError, TlsFiles, is_loopback, split_address
from kvrelay.rpc import auth, handlers
from kvrelay.rpc.channel import KEEPALIVE_S, SHARED_OPTIONS
from kvrelay.rpc.health import HealthServicer
from kvrelay.rpc.status import StatusInterceptor

MAX_STREAMS_PER_CONNECTION = 1024

_SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *SHARED_OPTIONS,
    ("grpc.so_reuseport", 0),  # or a taken port would be shared in silence
    ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
    # Peers ping at KEEPALIVE_S; what comes at twice that rate is still no attack.
    ("grpc.http2.min_ping_interval_without_data_ms", int(KEEPALIVE_S * 500)),
)

_CLEANUP_S = 5.0
"""Bounds the wait for the `finally` of methods that were cancelled."""


@dataclass(frozen=True, slots=True)
class Service:
    """One service of a server."""

    adder: Callable[[Any, Any], None]
    """The generated `add_..._to_server`."""

    servicer: object
    name: str
    """Full name, e.g. `kvrelay.v1.PoolService`."""


class RpcServer:
    """Serves `services` at `listen` from `start` until `drain` or `stop`.

    Raises:
        SettingsError: `listen` can be reached from elsewhere, and there is neither `tls` nor
            `insecure`; or a method has no row in `policy`.
    """

    def __init__(
        self,
        *,
        listen: str,
        tls: TlsFiles | None,
        insecure: bool,
        services: Sequence[Service],
        policy: auth.Policy = auth.POLICY,
    ) -> None:
        host, _ = split_address(listen)
        if not (tls or insecure or is_loopback(host)):
            raise SettingsError(
                f"listen = {listen} can be reached from other machines: set the three tls files, "
                "or insecure (--insecure) to serve it without TLS"
            )
        self._listen = listen
        self._tls = tls
        self._policy = policy
        self._health = HealthServicer([s.name for s in services])
        health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        self._services = (
            *services,
            Service(health_pb2_grpc.add_HealthServicer_to_server, self._health, health_name),
        )
        self._names = (*(s.name for s in self._services), _REFLECTION_NAME)
        self._calls = _CallTracker()
        self._server: grpc.aio.Server | None = None
        _check_policy(self._names, policy)

    async def start(self) -> str:
        """Listen, not serving yet by health; the real HOST:PORT.

        Raises:
            SettingsError: the address cannot be bound, or a TLS file not be read.
        """
        assert self._server is None, "started twice"
        guards = [auth.AuthInterceptor(self._policy)] if self._tls else []
        server = grpc.aio.server(
            interceptors=[self._calls, StatusInterceptor(), *guards], options=_SERVER_OPTIONS
        )
        for service in self._services:
            service.adder(service.servicer, server)
        reflection.enable_server_reflection(self._names, server)
        port = self._bind(server)
        await server.start()
        self._server = server
        return f"{self._listen.rpartition(':')[0]}:{port}"

    def set_serving(self, is_serving: bool) -> None:
        """What health says from now on, of the process and of each service."""
        self._health.set_serving(is_serving)

    async def drain(self, grace_s: float) -> None:
        """Take no new call, let those under way end within `grace_s`, then stop.

        A worker whose holds are still to be pulled first refuses new work by itself, with
        `set_serving(False)`: pulls and releases are new calls too.
        """
        self._health.close()
        if self._server is not None:
            await self._server.stop(grace_s)
            await self._calls.wait_ended(_CLEANUP_S)

    async def stop(self) -> None:
        """Cancel what is under way and wait until its methods have cleaned up."""
        await self.drain(0.0)

    def _bind(self, server: grpc.aio.Server) -> int:
        try:
            if self._tls is None:
                return server.add_insecure_port(self._listen)
            return server.add_secure_port(self._listen, auth.server_credentials(self._tls))
        except RuntimeError as error:
            raise SettingsError(
                f"listen = {self._listen} cannot be bound; is the port taken?"
            ) from error


class _CallTracker(grpc.aio.ServerInterceptor):
    """Knows the tasks of calls under way, as the server's own stop does not wait for them."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        return handlers.wrap(handler, self._around) if handler else None

    @asynccontextmanager
    async def _around(self, context: handlers.Context) -> AsyncIterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        yield

    async def wait_ended(self, timeout_s: float) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)


_REFLECTION_NAME: str = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name


def _check_policy(service_names: Sequence[str], policy: auth.Policy) -> None:
    for name in service_names:
        for method in descriptor_pool.Default().FindServiceByName(name).methods:
            path = f"/{name}/{method.name}"
            if path not in policy:
                raise SettingsError(f"{path} has no row in the policy of kvrelay.rpc.auth")
