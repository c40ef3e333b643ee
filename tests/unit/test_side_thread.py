"""Calls that may never return, and waiting for them."""

import asyncio
import threading

import pytest

from kvrelay.transfer.side_thread import SideThread, ended, raise_if_cancelled


async def test_calls_are_made_in_order_in_one_thread():
    """And their outcomes come back, errors too."""
    thread, names = SideThread("kv-side"), []

    def call(number):
        names.append((number, threading.current_thread().name))
        return 1 // number

    outcomes = [thread.call(lambda number=number: call(number)) for number in (1, 0, 2)]
    thread.close()
    await asyncio.wait(outcomes)
    assert names == [(1, "kv-side"), (0, "kv-side"), (2, "kv-side")]
    assert isinstance(outcomes[1].exception(), ZeroDivisionError)
    assert [outcomes[0].result(), outcomes[2].result()] == [1, 0]


async def test_a_call_that_hangs_is_waited_for_only_so_long():
    """The thread stays behind, and does not keep the process."""
    thread, gate = SideThread("kv-side"), threading.Event()
    hanging = thread.call(gate.wait)
    thread.close()
    assert not await ended(hanging, within_s=0.02)
    assert all(t.daemon for t in threading.enumerate() if t.name == "kv-side")
    gate.set()
    assert await ended(hanging, within_s=5)


async def test_cancelling_does_not_shorten_the_wait():
    """It is due afterwards."""
    thread, gate = SideThread("kv-side"), threading.Event()
    hanging = thread.call(gate.wait)
    thread.close()

    async def wait():
        assert await ended(hanging, within_s=5)
        raise_if_cancelled()

    waiting = asyncio.create_task(wait())
    for _ in range(3):
        await asyncio.sleep(0)
        waiting.cancel()
    await asyncio.sleep(0)
    assert not waiting.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert hanging.result()


async def test_without_a_cancellation_nothing_is_due():
    """So what follows is what followed anyway."""
    raise_if_cancelled()
