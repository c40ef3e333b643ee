"""A step-batched session: instructions come in, one merged item per attempt waits to go out.

A stream that is read slowly never grows a queue of steps: what an attempt has to say is
merged into what it had not said yet. So an outbox is bounded by the attempts of its
session, and a caller that wakes up late is told everything in one message.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Request = TypeVar("Request")


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try of one request."""

    request_id: str
    number: int

    @property
    def seq_id(self) -> str:
        """Its name on the engine."""
        return f"{self.request_id}/{self.number}"


class Outbox(Generic[Item]):
    """What one stream has still to say. Used from one event loop."""

    def __init__(self, merge: Callable[[Item, Item], Item]) -> None:
        self._merge = merge
        self._waiting: dict[Attempt, Item] = {}  # in the order they began to wait
        self._is_closed = False
        self._changed = asyncio.Event()

    def put(self, attempt: Attempt, item: Item) -> None:
        """Say `item`, merged with what the attempt has not said yet."""
        before = self._waiting.get(attempt)
        self._waiting[attempt] = item if before is None else self._merge(before, item)
        self._changed.set()

    def drop(self, attempt: Attempt) -> None:
        """Nobody wants to hear of this attempt any more."""
        self._waiting.pop(attempt, None)

    def close(self) -> None:
        """Nothing more will be put; what waits is still taken. Safe to repeat."""
        self._is_closed = True
        self._changed.set()

    async def take(self) -> list[Item]:
        """Everything that waits, at least one item; empty only once closed and told all."""
        while not self._waiting and not self._is_closed:
            self._changed.clear()
            await self._changed.wait()
        items = list(self._waiting.values())
        self._waiting.clear()
        return items


class Session(Generic[Item]):
    """One coordinator's stream: its attempts here, and what it has still to be told."""

    def __init__(self, merge: Callable[[Item, Item], Item]) -> None:
        self.outbox = Outbox(merge)
        self.attempts: set[Attempt] = set()

    def end(self, attempt: Attempt) -> None:
        """Nothing runs for this attempt any more. Safe to repeat."""
        self.attempts.discard(attempt)


async def converse(
    requests: AsyncIterator[Request], outbox: Outbox[Item], handle: Callable[[Request], None]
) -> AsyncGenerator[list[Item], None]:
    """Handles instructions as they come and yields what the outbox has, until a side ends.

    Raises what `handle` raises, after everything that waited has been yielded.
    """
    reader = asyncio.create_task(_read(requests, outbox, handle))
    try:
        while items := await outbox.take():
            yield items
        if reader.done():
            reader.result()
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)


async def _read(
    requests: AsyncIterator[Request], outbox: Outbox[Item], handle: Callable[[Request], None]
) -> None:
    try:
        async for request in requests:
            handle(request)
    finally:
        outbox.close()
