"""A system under measurement as processes: started, waited for, weighed, ended to the last one."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from kvrelay.bench import http
from kvrelay.bench.peers.install import PeerFailed
from kvrelay.supervise import launch

STOP_S = 40.0
"""From SIGTERM to SIGKILL: above the time that `kvrelay up` gives itself."""

_ASK_EVERY_S = 0.05
_ANSWER_S = 2.0
_LAST_LINES = 4


@dataclass(frozen=True, slots=True)
class Pid:
    """A process that no later one is taken for."""

    number: int
    began: str


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a tree of processes. What they share counts once in `pss_num_bytes`."""

    rss_num_bytes: int
    pss_num_bytes: int


@asynccontextmanager
async def running(
    argv: tuple[str, ...], *, env: Mapping[str, str], log: Path, has_word: bool
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program and all it starts; none is left afterwards. The kernel ends it if we die.

    What it writes goes to `log`, but for stdout if it `has_word` for us there.
    """
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", launch.__file__, str(os.getpid())),
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if has_word else output,
            stderr=output,
            # A terminal's Ctrl-C is ours to pass on. No session of its own: Linux shares cores by
            # session, and our own clock would wait behind whatever is measured.
            process_group=0,
            env={**os.environ, **env},
        )
    try:
        yield process
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    tree = tree_of(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOP_S):
            await _gone(process.pid)
    left = [pid for pid in tree if _began(pid.number) == pid.began]
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid.number, signal.SIGKILL)
    for pid in left:  # the next system wants their memory
        await _gone(pid.number)
    await process.wait()


async def _gone(number: int) -> None:
    """Wait for its end. `Process.wait` would also wait for whoever inherited its stdout."""
    try:
        fd = os.pidfd_open(number)
    except ProcessLookupError:
        return
    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def line_of(process: asyncio.subprocess.Process, *, within_s: float, log: Path) -> str:
    """The first line it prints.

    Raises:
        PeerFailed: it ended or said nothing in time.
    """
    assert process.stdout is not None
    try:
        async with asyncio.timeout(within_s):
            line = (await process.stdout.readline()).decode(errors="replace").strip()
    except TimeoutError:
        raise PeerFailed(f"not ready within {within_s:g} s; the log: {log}") from None
    if not line:
        raise _died(await process.wait(), log)
    return line


async def answers(
    process: asyncio.subprocess.Process, address: str, *, within_s: float, log: Path
) -> None:
    """Wait until `GET /health` is a 200. A foreign server says it in no other way.

    Raises:
        PeerFailed: it ended or did not answer in time.
    """
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        if await _is_healthy(address):
            return
        with contextlib.suppress(TimeoutError):
            raise _died(await asyncio.wait_for(process.wait(), _ASK_EVERY_S), log)
    raise PeerFailed(f"not ready within {within_s:g} s; the log: {log}")


async def _is_healthy(address: str) -> bool:
    try:
        async with asyncio.timeout(_ANSWER_S), http.exchange(address, "GET", "/health") as response:
            return response.status == 200
    except (OSError, http.HttpError):
        return False


def _died(status: int, log: Path) -> PeerFailed:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = " | ".join(lines[-_LAST_LINES:]) or "nothing was said"
    return PeerFailed(f"ended with status {status} before it was ready: {said}; the log: {log}")


def tree_of(root: int) -> list[Pid]:
    """A process and all below it that run now, the root first."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        number = todo.pop(0)
        if began := _began(number):
            found.append(Pid(number, began))
        todo += children.get(number, [])
    return found


def memory_of(tree: Iterable[Pid]) -> Memory:
    """What they hold now."""
    rss = pss = 0
    for pid in tree:
        for line in _read(f"/proc/{pid.number}/smaps_rollup").splitlines():
            name, _, value = line.partition(":")
            if name == "Rss":
                rss += int(value.split()[0]) * 1024
            elif name == "Pss":
                pss += int(value.split()[0]) * 1024
    return Memory(rss, pss)


def confine(tree: Iterable[Pid], named: str, core: int) -> int:
    """Put all threads of those processes whose command line has `named` on one core; how many."""
    confined = 0
    for pid in tree:
        if named not in _read(f"/proc/{pid.number}/cmdline").split("\0"):
            continue
        for thread in os.listdir(f"/proc/{pid.number}/task"):
            os.sched_setaffinity(int(thread), {core})
        confined += 1
    return confined


def _began(number: int) -> str:
    fields = _stat(number)
    return fields[19] if fields and fields[0] != "Z" else ""


def _stat(number: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none if there is no such process."""
    return _read(f"/proc/{number}/stat").rpartition(")")[2].split()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
