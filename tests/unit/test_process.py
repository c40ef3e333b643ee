"""What every service process does about its start and its end."""

import asyncio
import json
import os
import signal

import pytest

from kvrelay import process


async def test_the_first_signal_ends_the_wait():
    """Tasks that go on are left to their owner."""
    stop = process.stop_signal()
    goes_on = asyncio.create_task(asyncio.Event().wait())
    os.kill(os.getpid(), signal.SIGTERM)
    await process.until(stop, [goes_on])

    assert stop.is_set()
    assert not goes_on.done()
    goes_on.cancel()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)


async def test_a_task_that_failed_ends_the_wait_with_its_error():
    """None of them should end by itself."""

    async def fail() -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        await process.until(asyncio.Event(), [asyncio.create_task(fail())])


def test_whoever_waits_is_told_one_line_of_json():
    """The descriptor is closed afterwards; -1 is nobody."""
    reader, writer = os.pipe()
    process.tell_ready(writer, {"grpc": "127.0.0.1:1"})
    process.tell_ready(-1, {"grpc": "127.0.0.1:1"})
    with os.fdopen(reader) as pipe:
        assert json.loads(pipe.read()) == {"grpc": "127.0.0.1:1"}
