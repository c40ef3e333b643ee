"""What holds for every test: whoever takes, gives back.

After each test no task, thread, file descriptor, child process or shared memory is left that
was not there before, and in every engine of this process every block is free or cached.
"""

import asyncio
import functools
import gc
import os
import threading
import time
from pathlib import Path

import psutil
import pytest

import kvrelay  # noqa: F401 - before anything imports gRPC, whose C core it quietens

pytest_plugins = ["pytester"]

SETTLE_S = 5.0
"""gRPC closes sockets, and kernels reap processes, a moment after they are told to."""

LASTING = ("_poll_wrapper", "grpc", "asyncio_", "tqdm_monitor")
"""Names of threads that outlive a test: grpcio's and tqdm's, one for a whole process, and those
of an event loop's own executor, which end with the loop."""


def open_files() -> set[str]:
    """What this process holds open, by descriptor and target. Event queues do not count: event
    loops and gRPC keep theirs in caches of their own, made when first needed.
    """
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue
        if not target.startswith("anon_inode:"):
            found.add(f"{entry} {target}")
    return found


def threads() -> set[str]:
    return {
        f"{t.name} {t.ident}"
        for t in threading.enumerate()
        if t.is_alive() and not any(name in t.name for name in LASTING)
    }


def children() -> set[str]:
    return {f"process {child.pid}" for child in psutil.Process().children(recursive=True)}


def shared_memory() -> set[str]:
    return {str(path) for path in Path("/dev/shm").glob("*kvrelay*")}


LOOKS = (open_files, threads, children, shared_memory)


@pytest.fixture(autouse=True)
def nothing_is_left(request, monkeypatch):
    """Fail the test that leaves something behind, and say what."""
    engines = _watch_engines(monkeypatch)
    before = [look() for look in LOOKS]
    yield
    _require_blocks_given_back(engines)
    engines.clear()
    left = _left(before)
    until = time.monotonic() + SETTLE_S
    while left and time.monotonic() < until:
        gc.collect()
        time.sleep(0.02)
        left = _left(before)
    assert not left, f"left behind: {sorted(left)}"


def _left(before) -> set[str]:
    return set().union(*(look() - was for look, was in zip(LOOKS, before, strict=True)))


def _watch_engines(monkeypatch) -> list:
    """All engines that the test makes, also those it forgets."""
    from kvrelay.engine.engine import Engine

    engines: list[Engine] = []
    make = Engine.__init__

    @functools.wraps(make)
    def watched(self, *args, **kwargs):
        make(self, *args, **kwargs)
        engines.append(self)

    monkeypatch.setattr(Engine, "__init__", watched)
    return engines


def _require_blocks_given_back(engines) -> None:
    for engine in engines:
        engine.check()
        held = engine.load().blocks.held
        assert held == 0, f"{held} blocks still held"


def pytest_itemcollected(item):
    """Have every async test end without a task of its own still running."""
    if asyncio.iscoroutinefunction(getattr(item, "obj", None)):
        item.obj = _without_tasks_left(item.obj)


def _without_tasks_left(test):
    @functools.wraps(test)
    async def checked(*args, **kwargs):
        before = asyncio.all_tasks()
        await test(*args, **kwargs)
        tasks = {t for t in asyncio.all_tasks() - before if not t.done()}
        if tasks:
            await asyncio.wait(tasks, timeout=SETTLE_S)
        names = [t.get_name() + " " + repr(t.get_coro()) for t in tasks if not t.done()]
        assert not names, f"tasks left running: {names}"

    return checked


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The directory of the default model; pulled if it is not there."""
    from kvrelay.store.pull import ensure

    return ensure("smollm2-135m-instruct")
