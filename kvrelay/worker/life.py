"""The life of either worker process.

    1. load the model; nothing listens before that, so an address that answers can compute
    2. listen, join the pool, tell whoever started us; serve until the first signal
    3. refuse new work, let sessions end, at most `drain_s`; then stop everything and exit 0

An engine or a bug that leaves state nobody understands ends the process at once, exit 70.
"""

import asyncio
import secrets
import signal
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import structlog

from kvrelay import process
from kvrelay.config import SettingsError, exit_when_refused, load_settings
from kvrelay.errors import Incompatible, InvalidRequest
from kvrelay.obs import logging
from kvrelay.rpc.membership import Membership
from kvrelay.rpc.server import RpcServer
from kvrelay.types import Role, WorkerLoad
from kvrelay.worker.parts import Name, WorkerParts
from kvrelay.worker.settings import WorkerSettings

log = structlog.get_logger(__name__)

Settings = TypeVar("Settings", bound=WorkerSettings)


def run(
    role: Role,
    settings_type: type[Settings],
    serve: Callable[[Settings, Name], Coroutine[Any, Any, None]],
    argv: Sequence[str],
) -> None:
    """Be a worker until told to stop. Exits 2 where settings or model cannot be."""
    _die_of_signals()
    settings = load_settings(settings_type, service=role.value, argv=argv)
    epoch = secrets.token_hex(8)
    name = Name(role=role, worker_id=settings.worker_id or f"{role.value}-{epoch}", epoch=epoch)
    logging.configure(
        level=settings.log_level,
        fmt=settings.log_format,
        service=role.value,
        worker_id=name.worker_id,
    )
    with exit_when_refused(role.value):
        asyncio.run(serve(settings, name))


class WorkerService(Protocol):
    """What `serve` needs of either service."""

    def load(self) -> WorkerLoad: ...
    def begin_drain(self) -> None: ...
    async def drained(self) -> None: ...


async def serve(parts: WorkerParts, service: WorkerService, server: RpcServer) -> None:
    """Listen, be a member of the pool, and drain at the first signal.

    Raises:
        SettingsError: the pool serves something else.
    """
    settings = parts.settings
    stop = process.stop_signal()
    process.settle()
    bound = await server.start()
    identity = parts.identity_at(settings.advertised(bound))

    def load() -> WorkerLoad:
        now = service.load()
        parts.metrics.observe_load(now)
        return now

    membership = Membership(
        identity=identity,
        coordinator=settings.coordinator,
        load=load,
        clock=parts.clock,
        tls=settings.tls,
        on_key=parts.desk.take_key,
    )
    joining = asyncio.create_task(membership.run())
    server.set_serving(True)
    log.info("worker.listening", grpc=identity.address, epoch=identity.epoch)
    process.tell_ready(settings.ready_fd, {"grpc": identity.address})
    try:
        await _until_refused(stop, joining)
        log.info("worker.draining", drain_s=settings.drain_s)
        server.set_serving(False)
        service.begin_drain()
        membership.announce()
        with suppress(TimeoutError):
            async with asyncio.timeout(settings.drain_s):
                await service.drained()
        # The pool forgets us last, when the ends of our sessions have been sent.
        await server.drain(1.0)
        await membership.leave()
    finally:
        joining.cancel()
        await asyncio.gather(joining, return_exceptions=True)
        await server.stop()
        await service.drained()
        log.info("worker.stopped")


def _die_of_signals() -> None:
    """Until `serve` drains on them there is nothing to save, and nobody wants a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


async def _until_refused(stop: asyncio.Event, joining: "asyncio.Task[None]") -> None:
    """Wait for the signal. A membership ends by itself only when the pool refuses us."""
    try:
        await process.until(stop, [joining])
    except (Incompatible, InvalidRequest) as error:
        raise SettingsError(f"refused by the pool: {error}") from error
