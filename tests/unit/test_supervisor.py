"""The supervisor, with small real processes in place of services."""

import asyncio
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvrelay.clock import MonotonicClock
from kvrelay.supervise import launch
from kvrelay.supervise.backoff import Backoff
from kvrelay.supervise.child import Address, Child
from kvrelay.supervise.keeper import MAX_FAILED_STARTS, Event, Keeper, ProcessFailed
from kvrelay.supervise.logs import LogFile

WITHIN_S = 20.0

READY = 'import os,sys; os.write(int(sys.argv[-1]), b\'{"grpc": "h:1", "http": "h:2"}\\n\');'
SERVE = READY + "import signal; signal.pause()"
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + READY + "signal.pause()"


@dataclass
class Watcher:
    """Collects events and lets a test wait for the next of a kind."""

    events: list[Event] = field(default_factory=list)
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    def take(self, event: Event) -> None:
        self.events.append(event)
        self._changed = asyncio.get_running_loop().create_task(self._notify())

    async def _notify(self) -> None:
        async with self._news:
            self._news.notify_all()

    def count(self, kind: str) -> int:
        return sum(event.kind == kind for event in self.events)

    async def until(self, kind: str, count: int = 1) -> None:
        async with asyncio.timeout(WITHIN_S), self._news:
            await self._news.wait_for(lambda: self.count(kind) >= count)


@asynccontextmanager
async def keeping(
    tmp_path: Path, script: str | Callable[[], str], watcher: Watcher
) -> AsyncIterator[Keeper]:
    keeper = Keeper(
        name="thing",
        argv=lambda: ("-c", script if isinstance(script, str) else script()),
        log=LogFile(tmp_path / "thing.log"),
        backoff=Backoff(jitter=lambda: 0.0, first_s=0.01),
        clock=MonotonicClock(),
        on_event=watcher.take,
    )
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.kill()
        await keeper.stop(timeout_s=WITHIN_S)


def test_delays_double_up_to_a_limit():
    """
    Each death without uptime doubles the delay until it stays at the most.
    """
    backoff = Backoff(jitter=lambda: 1.0, first_s=0.2, most_s=5.0)

    delays = [backoff.died(uptime_s=0.0) for _ in range(8)]

    assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0])


def test_uptime_forgives_deaths():
    """
    A process that lived long enough starts again as fast as at first.
    """
    backoff = Backoff(jitter=lambda: 1.0, first_s=0.2, forgive_s=10.0)
    for _ in range(3):
        backoff.died(uptime_s=0.0)

    assert backoff.died(uptime_s=15.0) == pytest.approx(0.8)
    assert backoff.died(uptime_s=100.0) == pytest.approx(0.2)


def test_jitter_takes_at_most_half_of_a_delay():
    """
    Processes that die together do not start together, and none waits less than half.
    """
    assert Backoff(jitter=lambda: 0.0, first_s=1.0).died(uptime_s=0.0) == pytest.approx(0.5)


async def test_a_process_says_where_it_listens(tmp_path):
    """
    The line on the ready descriptor becomes the address.
    """
    async with keeping(tmp_path, SERVE, Watcher()) as keeper:
        async with asyncio.timeout(WITHIN_S):
            assert await keeper.listening() == Address("h:1", "h:2")


async def test_a_killed_process_is_started_again(tmp_path):
    """
    After SIGKILL there is a new process that listens, and the death was reported.
    """
    watcher = Watcher()
    async with keeping(tmp_path, SERVE, watcher) as keeper:
        await watcher.until("listening")
        keeper.trust()
        first = keeper.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await watcher.until("listening", 2)

        assert keeper.pid not in (None, first)
        assert "SIGKILL" in next(e.text for e in watcher.events if e.kind == "died")


async def test_bad_settings_are_not_tried_twice(tmp_path):
    """
    Exit status 2 before the first success fails for good, with the last words.
    """
    script = "print('KVRELAY_X is not a setting', flush=True); raise SystemExit(2)"
    watcher = Watcher()
    async with keeping(tmp_path, script, watcher) as keeper:
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(ProcessFailed, match="thing exited with status 2") as failure:
                await keeper.listening()

        assert failure.value.tail == ("KVRELAY_X is not a setting",)
        assert watcher.count("starting") == 1


async def test_a_process_that_never_comes_up_is_given_up(tmp_path):
    """
    The number of starts before readiness is bounded.
    """
    watcher = Watcher()
    async with keeping(tmp_path, READY + "raise SystemExit(1)", watcher) as keeper:
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(ProcessFailed, match="exited with status 1 before it was ready"):
                await keeper.failed()

        assert watcher.count("starting") == MAX_FAILED_STARTS


async def test_a_trusted_process_is_never_given_up(tmp_path):
    """
    Once everything served, any number of deaths leads to another start.
    """
    watcher = Watcher()
    async with keeping(tmp_path, "raise SystemExit(2)", watcher) as keeper:
        keeper.trust()
        await watcher.until("starting", MAX_FAILED_STARTS + 1)


async def test_a_restart_asks_for_its_arguments_again(tmp_path):
    """
    What was learned from the first life can be kept in the second.
    """
    watcher, lives = Watcher(), []

    def script() -> str:
        lives.append(len(lives))
        return f"print('life {lives[-1]}', flush=True); raise SystemExit(1)"

    async with keeping(tmp_path, script, watcher):
        await watcher.until("said", 2)

    said = [event.text for event in watcher.events if event.kind == "said"]
    assert said[:2] == ["life 0", "life 1"]


async def test_stopping_a_willing_process_is_clean(tmp_path):
    """
    A process that ends on SIGTERM was not killed.
    """
    async with keeping(tmp_path, SERVE, Watcher()) as keeper:
        await keeper.listening()

        assert await keeper.stop(timeout_s=WITHIN_S)
        assert keeper.pid is None


async def test_stopping_a_deaf_process_kills_it(tmp_path):
    """
    Past the limit the process is killed, and the caller is told.
    """
    async with keeping(tmp_path, DEAF, Watcher()) as keeper:
        await keeper.listening()

        assert not await keeper.stop(timeout_s=0.1)
        assert keeper.pid is None


async def test_endless_lines_do_not_fill_memory(tmp_path):
    """
    Output without newlines, and output that is not text, is taken in pieces.
    """
    script = (
        "import sys; w = sys.stdout.buffer.write; w(b'x' * 300_000 + b'\\n\\xff\\xfe\\nend\\n');"
        "sys.stdout.flush(); raise SystemExit(2)"
    )
    watcher = Watcher()
    async with keeping(tmp_path, script, watcher) as keeper:
        with pytest.raises(ProcessFailed):
            await keeper.failed()

    said = [event.text for event in watcher.events if event.kind == "said"]
    assert sum(map(len, said[:-2])) == 300_000
    assert max(map(len, said)) <= 2 * 64 * 1024
    assert said[-1] == "end"


async def test_a_process_that_cannot_be_started_is_tried_again(tmp_path, monkeypatch):
    """
    Want of memory or descriptors passes, and then the process is wanted still.
    """
    watcher = Watcher()
    spawn, problems = Child.spawn, [OSError(errno.EAGAIN, "no more processes")]

    async def scarce(argv, *, env):
        if problems:
            raise problems.pop()
        return await spawn(argv, env=env)

    monkeypatch.setattr(Child, "spawn", scarce)
    async with keeping(tmp_path, SERVE, watcher) as keeper:
        assert await keeper.listening() == Address(grpc="h:1", http="h:2")
        assert "could not be started: no more processes" in next(
            event.text for event in watcher.events if event.kind == "died"
        )


def test_a_process_dies_with_its_parent():
    """
    When the supervisor is killed outright, the kernel kills what it started.
    """
    child = "import os; print(os.getpid(), flush=True); import signal; signal.pause()"
    parent = (
        "import os, subprocess, sys\n"
        f"launch = [sys.executable, {launch.__file__!r}, str(os.getpid())]\n"
        f"subprocess.run([*launch, sys.executable, '-c', {child!r}])\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pidfd = os.pidfd_open(int(process.stdout.readline()))
        try:
            process.kill()
            ended, _, _ = select.select([pidfd], [], [], WITHIN_S)
        finally:
            os.close(pidfd)

    assert ended
