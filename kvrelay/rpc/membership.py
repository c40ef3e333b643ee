"""A worker's place in the pool: joins, says how it is, and joins again for ever.

1. Send the identity and wait for the welcome, which brings the key of tickets.
2. Send the load at the interval the welcome told, and at once when `announce` is called.
3. When the stream ends, wait a little, longer each time, and start over.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

import grpc
import structlog

from kvrelay.clock import Clock
from kvrelay.config import TlsFiles
from kvrelay.errors import Incompatible, InvalidRequest, PeerUnavailable, ServingError
from kvrelay.handoff.ticket import KEY_NUM_BYTES
from kvrelay.rpc import convert
from kvrelay.rpc.channel import open_channel
from kvrelay.rpc.status import from_grpc
from kvrelay.types import WorkerIdentity, WorkerLoad
from kvrelay.v1 import pool_pb2, pool_pb2_grpc

log = structlog.get_logger(__name__)

MIN_BACKOFF_S = 0.1
MAX_BACKOFF_S = 2.0
WELCOME_TIMEOUT_S = 10.0
LEAVE_TIMEOUT_S = 1.0
MIN_INTERVAL_S = 0.05

if TYPE_CHECKING:
    _Call = grpc.aio.StreamStreamCall[pool_pb2.JoinRequest, pool_pb2.JoinResponse]


class Membership:
    """Keeps one worker in one coordinator's pool while `run` runs."""

    def __init__(
        self,
        *,
        identity: WorkerIdentity,
        coordinator: str,
        load: Callable[[], WorkerLoad],
        clock: Clock,
        tls: TlsFiles | None = None,
        random: Random | None = None,
        on_key: Callable[[bytes], None] | None = None,
    ) -> None:
        """`on_key` gets the key of each membership before the coordinator hears that we have it;
        who holds nothing for others needs none.
        """
        self._identity = identity
        self._coordinator = coordinator
        self._load = load
        self._clock = clock
        self._tls = tls
        self._random = random or Random()
        self._on_key = on_key
        self._backoff_s = MIN_BACKOFF_S
        self._is_member = False
        self._is_leaving = False
        self._poked = asyncio.Event()
        self._ended = asyncio.Event()
        self._ended.set()
        self._last_problem = ""

    @property
    def is_member(self) -> bool:
        """Whether the coordinator has welcomed us and the stream lives."""
        return self._is_member

    def announce(self) -> None:
        """Send the load now, e.g. because it says that we drain."""
        self._poked.set()

    async def leave(self) -> None:
        """End the membership; `run` returns."""
        self._is_leaving = True
        self._poked.set()
        await self._ended.wait()

    async def run(self) -> None:
        """Be a member until `leave`, through every restart of the coordinator.

        Raises:
            Incompatible: the pool serves something else, or the coordinator speaks another version;
                asking again would not change that.
            InvalidRequest: the coordinator finds our identity malformed.
        """
        self._ended.clear()
        try:
            async with open_channel(self._coordinator, tls=self._tls) as channel:
                # Who drains and was let go does not come back for more.
                while not (self._is_leaving or self._load().is_draining):
                    await self._join_logged(pool_pb2_grpc.PoolServiceStub(channel))
        finally:
            self._ended.set()

    async def _join_logged(self, stub: "pool_pb2_grpc.PoolServiceAsyncStub") -> None:
        """One membership from beginning to end, and the wait before the next."""
        started_at_s = self._clock.now()
        try:
            await self._join(stub)
        except (Incompatible, InvalidRequest) as error:
            log.error("pool.refused", problem=str(error), **error.details)
            raise
        except ServingError as error:
            # Once per cause: a coordinator that is away for an hour is one event. To part while
            # we drain is no event at all.
            is_parting = self._is_leaving or self._load().is_draining
            if str(error) != self._last_problem and not is_parting:
                self._last_problem = str(error)
                log.warning(
                    "pool.not_joined",
                    coordinator=self._coordinator,
                    reason=error.reason,
                    problem=str(error),
                    after_s=round(self._clock.now() - started_at_s, 3),
                )
        finally:
            self._is_member = False
        if not (self._is_leaving or self._load().is_draining):
            await self._back_off()

    async def _join(self, stub: "pool_pb2_grpc.PoolServiceAsyncStub") -> None:
        call = stub.Join()
        try:
            interval_s = await self._enter(call)
            self._is_member = True
            self._backoff_s = MIN_BACKOFF_S
            self._last_problem = ""
            log.info("pool.joined", coordinator=self._coordinator, interval_s=interval_s)
            await self._stay(call, interval_s)
        except grpc.aio.AioRpcError as error:
            raise from_grpc(error) from error
        finally:
            call.cancel()

    async def _enter(self, call: "_Call") -> float:
        """Send the identity; the interval at which loads are wanted."""
        identity = convert.identity_to_wire(self._identity)
        try:
            async with asyncio.timeout(WELCOME_TIMEOUT_S):
                await self._write(call, pool_pb2.JoinRequest(identity=identity))
                welcome = await call.read()
        except TimeoutError:
            raise PeerUnavailable(f"no welcome within {WELCOME_TIMEOUT_S:g} s") from None
        if not isinstance(welcome, pool_pb2.JoinResponse):
            raise PeerUnavailable("the coordinator ended the stream without a welcome")
        if len(welcome.ticket_key) != KEY_NUM_BYTES:
            raise Incompatible(
                f"the coordinator's ticket key has {len(welcome.ticket_key)} bytes, "
                f"not {KEY_NUM_BYTES}"
            )
        if self._on_key is not None:
            self._on_key(welcome.ticket_key)
        return max(MIN_INTERVAL_S, welcome.heartbeat_interval_ms / 1000)

    async def _stay(self, call: "_Call", interval_s: float) -> None:
        """Send loads until the stream ends or we leave."""
        ended = asyncio.create_task(_until_end(call))
        try:
            while not (ended.done() or self._is_leaving):
                self._poked.clear()  # before the load is taken, so no change goes unsent
                load = convert.load_to_wire(self._load())
                await self._write(call, pool_pb2.JoinRequest(load=load))
                await self._wait_poked(interval_s, ended)
            if self._is_leaving and not ended.done():
                await call.done_writing()
                await asyncio.wait({ended}, timeout=LEAVE_TIMEOUT_S)
                return
            ended.result()
            raise PeerUnavailable("the coordinator ended the membership")
        finally:
            ended.cancel()
            await asyncio.gather(ended, return_exceptions=True)

    async def _write(self, call: "_Call", message: pool_pb2.JoinRequest) -> None:
        # A call that has ended says why to whoever reads it.
        with suppress(asyncio.InvalidStateError):
            await call.write(message)

    async def _back_off(self) -> None:
        self._poked.clear()
        delay_s = self._backoff_s * self._random.uniform(0.5, 1.0)
        self._backoff_s = min(MAX_BACKOFF_S, self._backoff_s * 2)
        await self._wait_poked(delay_s)

    async def _wait_poked(self, timeout_s: float, *others: "asyncio.Task[None]") -> None:
        """Until `announce` or `leave`, one of `others`, or the time is over."""
        poked = asyncio.create_task(self._poked.wait())
        try:
            await asyncio.wait(
                {poked, *others}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            poked.cancel()
            await asyncio.gather(poked, return_exceptions=True)


async def _until_end(call: "_Call") -> None:
    """Read on; what a coordinator may say one day to members of later versions is skipped."""
    while await call.read() is not grpc.aio.EOF:
        pass
