"""A whole deployment of real processes, for tests: started by `kvrelay up`, hurt, and ended.

Ending it proves that nothing stays behind: every block is free or cached, `kvrelay up` drains
with status 0, and no process, shared memory or descriptor is left.
"""

import asyncio
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvrelay.client import Client, Member, Pool

READY_WITHIN_S = 90.0
"""Generous: torch is imported by every worker, and test machines are slow and shared."""

CALM_WITHIN_S = 20.0
ENDED_WITHIN_S = 45.0

_LOOK_EVERY_S = 0.05
"""Nothing announces a change of another process's pool; it can only be looked at."""

_MARK = "TEST_DEPLOYMENT"


@dataclass(slots=True)
class Deployment:
    """A running `kvrelay up` and a connection to its coordinator.

    A test may end `process` itself; then only what is left behind is looked at.
    """

    process: asyncio.subprocess.Process
    grpc: str
    http: str
    num_prefill: int
    num_decode: int
    log_dir: Path
    client: Client
    ready_s: float
    """From the start of `kvrelay up` to its ready line."""

    async def pool(self) -> Pool:
        return await self.client.pool(timeout_s=10.0)

    async def worker(self, worker_id: str) -> Member:
        """The member of that name, as it is now."""
        members = {m.identity.worker_id: m for m in (await self.pool()).members}
        return members[worker_id]

    async def signal(self, worker_id: str, number: signal.Signals) -> int:
        """Send a worker a signal, SIGKILL or SIGSTOP for one; returns its process id."""
        pid = (await self.worker(worker_id)).identity.pid
        os.kill(pid, number)
        return pid

    @property
    def coordinator_pid(self) -> int:
        """Process id of the coordinator, which is no member of its pool."""
        children = psutil.Process(self.process.pid).children()
        return next(child.pid for child in children if "coordinator" in child.cmdline())

    async def until(
        self, holds: Callable[[Pool], bool], *, within_s: float = CALM_WITHIN_S
    ) -> Pool:
        """The pool, once the condition holds of it."""
        return await until(self.client, holds, within_s=within_s)

    async def until_idle(self, *, within_s: float = CALM_WITHIN_S) -> Pool:
        """The pool, once nothing runs and every block is free or cached."""
        return await until_idle(self.client, within_s=within_s)

    async def until_restarted(self, worker_id: str, *, old_pid: int) -> Member:
        """The worker in its next life, after its old process died."""

        def is_back(pool: Pool) -> bool:
            return any(
                m.identity.worker_id == worker_id and m.identity.pid != old_pid
                for m in pool.members
            )

        await self.until(is_back, within_s=READY_WITHIN_S)
        return await self.worker(worker_id)

    def logs(self) -> str:
        """What all processes have said."""
        files = sorted(self.log_dir.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text()}" for file in files)


async def until(client: Client, holds: Callable[[Pool], bool], *, within_s: float) -> Pool:
    """The pool, once the condition holds of it."""
    pool: Pool | None = None
    try:
        async with asyncio.timeout(within_s):
            while True:
                pool = await client.pool(timeout_s=10.0)
                if holds(pool):
                    return pool
                await asyncio.sleep(_LOOK_EVERY_S)
    except TimeoutError:
        raise AssertionError(f"not within {within_s} s; the pool is {pool}") from None


async def until_idle(client: Client, *, within_s: float = CALM_WITHIN_S) -> Pool:
    """The pool, once nothing runs and every block is free or cached.

    Only loads that were sent since the call count: an older one may be from before the
    request whose end is waited for.
    """
    asked_at_s = time.monotonic()

    def is_idle_by_now(pool: Pool) -> bool:
        elapsed_ms = (time.monotonic() - asked_at_s) * 1e3
        return is_idle(pool) and all(m.load_age_ms < elapsed_ms for m in pool.members)

    return await until(client, is_idle_by_now, within_s=within_s)


def is_idle(pool: Pool) -> bool:
    """Whether no request is under way and no worker holds anything for one."""
    return pool.active_requests == 0 and all(
        m.load.held_blocks
        == m.load.running_sequences
        == m.load.waiting_sequences
        == m.load.handoff_holds
        == m.load.queued_prompt_tokens
        == 0
        and m.load.free_blocks + m.load.cached_blocks == m.identity.num_blocks
        for m in pool.members
    )


@asynccontextmanager
async def deployment(
    model: Path | str,
    *,
    log_dir: Path,
    num_prefill: int = 1,
    num_decode: int = 1,
    flags: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Deployment]:
    """Start one, hand it over ready, and end it.

    Args:
        model: name or directory.
        log_dir: where the processes' logs go; shown when the deployment does not come up.
        flags: more arguments of `kvrelay up`.
        env: more environment, e.g. `KVRELAY_COORDINATOR_LOG_LEVEL`.
    """
    mark = secrets.token_hex(8)
    memory_before = shared_memory()
    began_at_s = time.monotonic()
    process = await _spawn(
        *("--model", str(model), "--prefill", str(num_prefill), "--decode", str(num_decode)),
        *("--log-dir", str(log_dir), *flags),
        env={**os.environ, **(env or {}), _MARK: mark},
    )
    try:
        grpc, http = await _ready(process, log_dir)
        ready_s = time.monotonic() - began_at_s
        async with Client(grpc) as client:
            it = Deployment(process, grpc, http, num_prefill, num_decode, log_dir, client, ready_s)
            await it.pool()  # connects, so that no test opens what another one closes
            yield it
            if process.returncode is None:
                await it.until_idle()
        if process.returncode is None:
            await _end(process, log_dir)
        _wait_for_no(mark)
        assert shared_memory() <= memory_before, "shared memory was left behind"
    finally:
        await _destroy(process, mark)


async def _spawn(*arguments: str, env: Mapping[str, str]) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrelay.cli.app", "up", "--grpc-port", "0", "--http-port", "0"),
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,
        env=dict(env),
    )


async def _ready(process: asyncio.subprocess.Process, log_dir: Path) -> tuple[str, str]:
    """The addresses of the one line it prints."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(READY_WITHIN_S):
            line = (await process.stdout.readline()).decode()
    except TimeoutError:
        line = ""
    assert line.startswith("ready "), f"not ready: {line!r}\n{_tails(log_dir)}"
    said = dict(word.split("=") for word in line.split()[1:])
    return said["grpc"], said["http"]


async def _end(process: asyncio.subprocess.Process, log_dir: Path) -> None:
    """Ask it to drain; it must end well by itself and have printed nothing more."""
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(ENDED_WITHIN_S):
        assert process.stdout is not None
        rest = await process.stdout.read()
        status = await process.wait()
    assert status == 0, f"kvrelay up ended with status {status}\n{_tails(log_dir)}"
    assert rest == b"", f"kvrelay up printed more than its ready line: {rest!r}"


async def _destroy(process: asyncio.subprocess.Process, mark: str) -> None:
    """Whatever went wrong, nothing of the test outlives it."""
    if process.returncode is None:
        process.kill()
        await process.wait()
    for left in _marked(mark):
        left.kill()
    assert process.stdout is not None
    await process.stdout.read()


def _wait_for_no(mark: str) -> None:
    """Processes of the deployment that were killed may need a moment, but then none is left."""
    _, left = psutil.wait_procs(_marked(mark), timeout=CALM_WITHIN_S)
    assert not left, f"processes were left behind: {left}"


def _marked(mark: str) -> list[psutil.Process]:
    """Processes of this deployment, by the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def shared_memory() -> set[str]:
    """Segments of ours, or of torch's, that have a name."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in names if name.startswith(("kvrelay", "torch_", "psm_"))}


def _tails(log_dir: Path, num_lines: int = 15) -> str:
    return "\n".join(
        f"--- {file.name}\n" + "\n".join(file.read_text().splitlines()[-num_lines:])
        for file in sorted(log_dir.glob("*.log"))
    )
