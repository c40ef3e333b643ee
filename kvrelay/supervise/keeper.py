"""Keeps processes alive: starts them, starts them again, and ends them when asked."""

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from kvrelay.clock import Clock
from kvrelay.supervise.backoff import Backoff
from kvrelay.supervise.child import Address, Child
from kvrelay.supervise.logs import LogFile

BAD_SETTINGS = 2
"""Exit status of a process that would fail again just so."""

MAX_FAILED_STARTS = 4


class ProcessFailed(Exception):
    """A process could not be brought up. `tail` is what it said last."""

    def __init__(self, name: str, problem: str, tail: tuple[str, ...]) -> None:
        super().__init__(f"{name} {problem}")
        self.name = name
        self.tail = tail


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a process: `starting`, `listening`, `died` or `said`."""

    name: str
    kind: str
    text: str = ""


@dataclass(slots=True, eq=False)
class Keeper:
    """One process, through all its lives.

    `argv` is asked for at every start, so that a port that was once chosen can be kept.
    Until `trust()`, a process that cannot stay up fails for good; afterwards it is started
    again for ever.
    """

    name: str
    argv: Callable[[], tuple[str, ...]]
    log: LogFile
    backoff: Backoff
    clock: Clock
    on_event: Callable[[Event], None]
    _child: Child | None = None
    _is_trusted: bool = False
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _address: asyncio.Future[Address] | None = None
    _task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that runs now, if one does."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Begin keeping it. Needs a running loop."""
        self._address = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.name}")
        self._task.add_done_callback(self._give_up)

    async def listening(self) -> Address:
        """Where it listens, as of its first life that got so far.

        Raises:
            ProcessFailed: it could not be brought up.
        """
        assert self._address is not None, "not started"
        return await asyncio.shield(self._address)

    async def failed(self) -> None:
        """Wait until it has failed for good, and raise that.

        Raises:
            ProcessFailed: it could not be brought up.
        """
        assert self._task is not None, "not started"
        await asyncio.shield(self._task)
        await asyncio.Event().wait()  # it was stopped, which is no failure

    def trust(self) -> None:
        """It has served: whatever happens from now on, start it again."""
        self._is_trusted = True

    async def stop(self, *, timeout_s: float) -> bool:
        """Ask it to drain and wait; False if it had to be killed."""
        if self._task is None:
            return True
        self._stopping.set()
        if self._child is not None:
            self._child.signal(signal.SIGTERM)
        done, _ = await asyncio.wait({self._task}, timeout=timeout_s)
        if not done:
            self.kill()
            await asyncio.wait({self._task})
        self.log.close()
        return bool(done)

    def kill(self) -> None:
        """End it at once; `stop` then returns soon."""
        self._stopping.set()
        if self._child is not None:
            self._child.signal(signal.SIGKILL)

    async def _keep(self) -> None:
        num_deaths = 0
        while not self._stopping.is_set():
            self.on_event(Event(self.name, "starting"))
            started_at_s = self.clock.now()
            try:
                status = await self._live()
                problem = _describe(status)
            except OSError as error:  # no memory, process or descriptor left to start it with
                status, problem = None, f"could not be started: {error.strerror}"
            if self._stopping.is_set():
                return
            num_deaths += 1
            hopeless = status == BAD_SETTINGS or num_deaths >= MAX_FAILED_STARTS
            if hopeless and not self._is_trusted:
                raise ProcessFailed(self.name, f"{problem} before it was ready", self._said())
            delay_s = self.backoff.died(uptime_s=self.clock.now() - started_at_s)
            self.on_event(Event(self.name, "died", f"{problem}; starting again in {delay_s:.1f} s"))
            await self._wait_to_stop(delay_s)

    async def _live(self) -> int:
        """One life, to its exit status."""
        self._child = await Child.spawn(self.argv(), env=os.environ)
        try:
            if self._stopping.is_set():  # asked while it was being started: it has nothing yet
                self._child.signal(signal.SIGKILL)
            return await self._child.live(on_line=self._hear, on_ready=self._listens)
        finally:
            self._child.signal(signal.SIGKILL)
            self._child = None

    def _listens(self, address: Address) -> None:
        assert self._address is not None
        if not self._address.done():
            self._address.set_result(address)
        self.on_event(Event(self.name, "listening", address.grpc))

    def _hear(self, line: str) -> None:
        self.log.write(line)
        self.on_event(Event(self.name, "said", line))

    def _said(self) -> tuple[str, ...]:
        return tuple(self.log.tail)

    async def _wait_to_stop(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._stopping.wait()
        except TimeoutError:
            return

    def _give_up(self, task: asyncio.Task[None]) -> None:
        """Whoever waits for an address learns that there will be none."""
        assert self._address is not None
        error = None if task.cancelled() else task.exception()
        if self._address.done():
            return
        if error is None:
            self._address.cancel()
        else:
            self._address.set_exception(error)
            self._address.exception()  # seen, even if nobody waits


def _describe(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
