"""A whole deployment on this machine, from the first process to the last.

1. The coordinator's ports are reserved, so that its address is known before it listens.
2. All processes start at once; the workers join as soon as both sides are there.
3. It is ready when the coordinator serves, that is, when a canary crossed the pool.
4. Whatever dies is started again under its name; the coordinator keeps its addresses.
5. Draining: the coordinator first, so that it finishes its streams, then the workers.
"""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvrelay.client import Client, Pool
from kvrelay.clock import Clock
from kvrelay.errors import PeerUnavailable, ServingError
from kvrelay.supervise.backoff import Backoff
from kvrelay.supervise.child import Address
from kvrelay.supervise.keeper import Event, Keeper
from kvrelay.supervise.logs import LogFile
from kvrelay.supervise.ports import ReservedPort
from kvrelay.supervise.topology import Topology

_Result = TypeVar("_Result")

_GRACE_S = 3.0
"""Beyond its own drain limit, before a process is killed."""

_QUICKLY_S = 0.5
"""A number for people is worth no longer wait."""

_WORKER_DRAIN_S = 10.0
"""Workers have nothing left to do once the coordinator is gone."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A deployment that answers."""

    address: Address
    num_prefill: int
    num_decode: int

    def __str__(self) -> str:
        pools = f"prefill={self.num_prefill} decode={self.num_decode}"
        return f"ready grpc={self.address.grpc} http={self.address.http} {pools}"


class Deployment:
    """Owns the processes: after `drain` none is left, whatever happened before."""

    def __init__(
        self,
        topology: Topology,
        *,
        listen: str,
        http_listen: str,
        log_dir: Path,
        clock: Clock,
        jitter: Callable[[], float],
        on_event: Callable[[Event], None],
    ) -> None:
        self._topology = topology
        self._listen = listen
        self._http_listen = http_listen
        self._log_dir = log_dir
        self._clock = clock
        self._jitter = jitter
        self._on_event = on_event
        self._workers: list[Keeper] = []
        self._reserved: list[ReservedPort] = []
        self._coordinator = self._keeper("coordinator", self._coordinator_argv)

    async def start(self) -> Ready:
        """Start everything and wait until it serves.

        Raises:
            PortTaken: nothing was started.
            ProcessFailed: a process could not be brought up; `drain` ends the others.
        """
        self._listen = self._reserve(self._listen, "--grpc-port")
        self._http_listen = self._reserve(self._http_listen, "--http-port")
        self._coordinator.start()
        for role, i in self._topology.workers:
            self._start_worker(role, i)
        address, pool = await self._unless_failed(self._serving())
        for keeper in (self._coordinator, *self._workers):
            keeper.trust()
        roles = [member.identity.role.value for member in pool.members]
        return Ready(address, roles.count("prefill"), roles.count("decode"))

    async def drain(self) -> bool:
        """Let it finish what it has and end it; False if something had to be killed."""
        drain_s = self._topology.drain_s
        was_clean = await self._coordinator.stop(timeout_s=drain_s + _GRACE_S)
        limit_s = min(drain_s, _WORKER_DRAIN_S) + _GRACE_S
        stops = [keeper.stop(timeout_s=limit_s) for keeper in self._workers]
        are_clean = await asyncio.gather(*stops)
        for reserved in self._reserved:
            reserved.close()
        return all([was_clean, *are_clean])

    async def active_requests(self) -> int | None:
        """How many requests are running; None if that cannot be told quickly."""
        if self._coordinator.pid is None or self._listen.endswith(":0"):
            return None
        try:
            async with Client(self._listen) as client:
                return (await client.pool(timeout_s=_QUICKLY_S)).active_requests
        except ServingError:
            return None

    def kill(self) -> None:
        """End every process at once; a `drain` under way then returns soon."""
        for keeper in (self._coordinator, *self._workers):
            keeper.kill()

    async def _serving(self) -> tuple[Address, Pool]:
        """Where the coordinator listens, and the pool, once it serves."""
        address = await self._coordinator.listening()
        return address, await _serving(address.grpc)

    def _reserve(self, address: str, flag: str) -> str:
        """The address with a real port, which is ours until `drain`."""
        port = ReservedPort(address, flag=flag)
        self._reserved.append(port)
        return port.address

    def _start_worker(self, role: str, index: int) -> None:
        argv = self._topology.worker(role, index, coordinator=self._listen)
        keeper = self._keeper(f"{role}-{index}", lambda: argv)
        self._workers.append(keeper)
        keeper.start()

    def _coordinator_argv(self) -> tuple[str, ...]:
        return self._topology.coordinator(listen=self._listen, http_listen=self._http_listen)

    def _keeper(self, name: str, argv: Callable[[], tuple[str, ...]]) -> Keeper:
        return Keeper(
            name=name,
            argv=argv,
            log=LogFile(self._log_dir / f"{name}.log"),
            backoff=Backoff(jitter=self._jitter),
            clock=self._clock,
            on_event=self._on_event,
        )

    async def _unless_failed(self, work: Coroutine[None, None, _Result]) -> _Result:
        """The result of `work`, or the failure of the first process that gives up."""
        keepers = (self._coordinator, *self._workers)
        tasks = {asyncio.create_task(keeper.failed()) for keeper in keepers}
        task = asyncio.create_task(work)
        try:
            done, _ = await asyncio.wait({task, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            for failed in done - {task}:
                failed.result()
            return task.result()
        finally:
            for each in (task, *tasks):
                each.cancel()
            await asyncio.gather(task, *tasks, return_exceptions=True)


async def _serving(target: str) -> Pool:
    """The pool, once the coordinator serves; it may die and come back meanwhile."""
    while True:
        async with Client(target) as client, aclosing(client.watch_serving()) as states:
            try:
                async for is_serving in states:
                    if is_serving:
                        return await client.pool()
            except PeerUnavailable:
                continue  # the next watch waits for the connection
