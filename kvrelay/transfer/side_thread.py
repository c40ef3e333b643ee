"""Threads for calls that may never return, and what to do while nobody knows whether they will.

A call into a device's library cannot be interrupted. It is made in a daemon thread, so that the
process can end whatever becomes of the call, and whoever waits for it waits with a deadline.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class SideThread:
    """Makes calls one after the other, in the order they were asked for, until `close`."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def call(self, function: Callable[[], T]) -> "asyncio.Future[T]":
        """Its outcome. Cancelling that has an effect only on a call that has not begun."""
        done: Future[T] = Future()
        self._calls.put(lambda: _settle_with(done, function))
        return asyncio.wrap_future(done)

    def close(self) -> None:
        """The thread ends after the calls it has; nobody waits for that."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # an idle thread keeps nothing alive


async def ended(work: "asyncio.Future[T]", *, within_s: float) -> bool:
    """Wait for the end of `work`, however often we are cancelled meanwhile; whether it came.

    A cancellation that this outlasted is due afterwards: see `raise_if_cancelled`.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + within_s
    while not work.done() and (left_s := until - loop.time()) > 0:
        with suppress(asyncio.CancelledError):
            await asyncio.wait([work], timeout=left_s)
    return work.done()


def raise_if_cancelled() -> None:
    """Let a cancellation that `ended` held up take its course."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _settle_with(done: "Future[T]", function: Callable[[], T]) -> None:
    if not done.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # not handled here: handed to whoever waits
        done.set_exception(error)
    else:
        done.set_result(result)
