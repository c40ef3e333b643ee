"""The processes of a control-plane measurement: started on chosen cores, watched, stopped."""

import asyncio
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.errors import PeerUnavailable
from kvrelay.supervise.child import Address, Child

MAX_LOG_LINES = 200
START_S = 30.0


@dataclass(frozen=True, slots=True)
class Running:
    """A process of the measurement and its gRPC address."""

    pid: int
    address: str


@asynccontextmanager
async def running(
    name: str, argv: tuple[str, ...], cores: set[int] | None = None
) -> AsyncIterator[Running]:
    """A process, from when it is ready until it is told to stop."""
    lines: deque[str] = deque(maxlen=MAX_LOG_LINES)
    ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
    with pinned(cores):
        child = await Child.spawn(argv, env=_environment())
    living = asyncio.create_task(child.live(on_line=lines.append, on_ready=ready.set_result))
    either: set[asyncio.Future[Any]] = {living, ready}
    try:
        await asyncio.wait(either, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            raise PeerUnavailable(f"the {name} did not start: {' / '.join(list(lines)[-5:])}")
        yield Running(child.pid, ready.result().grpc)
    finally:
        child.signal(signal.SIGTERM)
        await living


def _environment() -> Mapping[str, str]:
    """Ours, less the settings of any deployment: what is measured is what is said here."""
    return {k: v for k, v in os.environ.items() if not k.startswith("KVRELAY_COORDINATOR_")}


def choose_cores() -> tuple[int | None, set[int] | None]:
    """The coordinator's core and everybody else's; none where they cannot be chosen."""
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    first, *others = sorted(os.sched_getaffinity(0))
    return first, set(others) or {first}


@contextmanager
def pinned(cores: set[int] | None) -> Iterator[None]:
    """Run on `cores`, and have processes that are started meanwhile inherit them."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def cpu_s(pid: int) -> float | None:
    """CPU time of a process, all its threads; None where the kernel does not tell."""
    if sys.platform != "linux":
        return None
    # The name of the program, in brackets, may hold anything, brackets too.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
