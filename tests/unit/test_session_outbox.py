"""What a session stream has still to say, and what it does when a side ends."""

import asyncio
from contextlib import aclosing

import pytest

from kvrelay.errors import InvalidRequest
from kvrelay.rpc.session import Attempt, Outbox, converse

A, B = Attempt("a", 1), Attempt("b", 1)


def outbox() -> Outbox[str]:
    return Outbox(lambda before, after: before + after)


async def test_what_was_not_taken_is_merged_per_attempt():
    """However many steps pass, one item per attempt waits, in the order they began to."""
    box = outbox()
    for piece in "xyz":
        box.put(B, piece)
        box.put(A, piece.upper())

    assert await box.take() == ["xyz", "XYZ"]


async def test_take_waits_until_there_is_something():
    """It wakes for a put, and for the end."""
    box = outbox()
    taking = asyncio.create_task(box.take())
    await asyncio.sleep(0)
    assert not taking.done()

    box.put(A, "x")

    assert await taking == ["x"]
    box.close()
    assert await box.take() == []


async def test_dropped_attempts_are_not_told():
    """A cancelled attempt's news is of no interest to anybody."""
    box = outbox()
    box.put(A, "x")
    box.put(B, "y")
    box.drop(A)

    assert await box.take() == ["y"]


async def test_what_waits_is_told_after_the_close():
    """Closing ends the stream after the last item, not before."""
    box = outbox()
    box.put(A, "x")
    box.close()

    assert await box.take() == ["x"]
    assert await box.take() == []


async def requests(*items, error: Exception | None = None):
    for item in items:
        yield item
    if error is not None:
        raise error


async def test_a_conversation_ends_when_the_requests_do():
    """Everything that was put by then is yielded."""
    box = outbox()
    told = [items async for items in converse(requests("x", "y"), box, lambda r: box.put(A, r))]

    assert told == [["xy"]]


async def test_what_the_handler_raises_ends_the_conversation():
    """After everything that waited has been yielded."""
    box = outbox()

    def handle(request: str) -> None:
        if request == "bad":
            raise InvalidRequest("field", "bad")
        box.put(A, request)

    async with aclosing(converse(requests("x", "bad"), box, handle)) as told:
        assert await anext(told) == ["x"]
        with pytest.raises(InvalidRequest):
            await anext(told)


async def test_closing_the_conversation_stops_reading():
    """No task is left that would read on."""
    box = outbox()
    closed = asyncio.Event()

    async def endless():
        try:
            yield "x"
            await asyncio.Event().wait()
        finally:
            closed.set()

    async with aclosing(converse(endless(), box, lambda r: box.put(A, r))) as told:
        assert await anext(told) == ["x"]

    assert closed.is_set()
