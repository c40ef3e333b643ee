"""How a service process says that it is up, waits for its end, and breaks off.

Torch-free: the coordinator lives by it too.
"""

import asyncio
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import structlog

log = structlog.get_logger(__name__)

EXIT_BROKEN = 70


def stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


async def until(stop: asyncio.Event, tasks: Collection[asyncio.Task[Any]]) -> None:
    """Wait for the signal, or for a task that ended though none should: what it raised is raised.

    The tasks go on; they remain the caller's to end.
    """
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopped.cancel()
    for task in done - {stopped}:
        task.result()


def settle() -> None:
    """What is there when serving begins stays for good, so the collector need not look at it again.

    With torch loaded, one full collection stops every thread of a worker for some 100 ms.
    """
    gc.collect()
    gc.freeze()


def tell_ready(ready_fd: int, addresses: Mapping[str, str]) -> None:
    """One JSON line to whoever started us and waits for it; -1 means that nobody does."""
    if ready_fd >= 0:
        with os.fdopen(ready_fd, "w") as pipe:
            pipe.write(json.dumps(dict(addresses)) + "\n")


def crash(error: BaseException) -> NoReturn:
    """End the process now, whatever thread we are in: no state of it can be trusted."""
    log.critical("process.broken", error=type(error).__name__, exit_status=EXIT_BROKEN)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(EXIT_BROKEN)
