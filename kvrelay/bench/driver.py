"""The load generator: sends requests and notes when what came.

Closed loop: some clients, each of which asks again when its answer has ended. A slow server is
asked less. Open loop: requests go out when they are due, whatever became of those before. Every
latency counts from when a request was due, so neither a slow server nor a slow generator can
make the waiting disappear ("coordinated omission").
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Protocol

from kvrelay.bench.base import Arrived, Ask, Ended, Failed, Record, Source
from kvrelay.bench.workload import Item
from kvrelay.clock import Clock

DEADLINE_PASSED = "DEADLINE_PASSED"
STREAM_CUT = "STREAM_CUT"
"""The stream ended as if all were well, but never said that the answer was whole."""


class Timeline(Protocol):
    """Time that can be waited for."""

    def now(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None: ...


class RealTime:
    """The time of a clock that runs by itself."""

    def __init__(self, clock: Clock) -> None:
        self.now = clock.now

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - self.now()))


class Driver:
    """Carries out one run against `source`.

    Args:
        source: the way to the server.
        timeline: by which everything is timed.
        make_ask: makes the request of an item, given its number in the run.
        on_record: told of each request as it ends.
        timeout_s: how long one request may take before it is given up and counted as failed.
    """

    def __init__(
        self,
        source: Source,
        timeline: Timeline,
        *,
        make_ask: Callable[[int, Item], Ask],
        on_record: Callable[[Record], None],
        timeout_s: float,
    ) -> None:
        self._source = source
        self._timeline = timeline
        self._make_ask = make_ask
        self._on_record = on_record
        self._timeout_s = timeout_s
        self._began_at_s = timeline.now()
        self._records: list[Record] = []

    async def open_loop(self, items: Sequence[Item]) -> list[Record]:
        """Send each item when it is due. Returns when all have ended."""
        self._began_at_s = self._timeline.now()
        async with asyncio.TaskGroup() as group:
            for index, item in enumerate(items):
                ask = self._make_ask(index, item)  # before it is due, or it would be late
                await self._timeline.sleep_until(self._began_at_s + item.at_s)
                group.create_task(self._one(index, ask, scheduled_s=item.at_s))
                await asyncio.sleep(0)  # it goes out before the next is made
        return self._in_order()

    async def closed_loop(
        self, items: Iterator[Item], *, num_clients: int, duration_s: float = float("inf")
    ) -> list[Record]:
        """Send all items by so many clients; none starts another after `duration_s`."""
        self._began_at_s = self._timeline.now()
        numbered = enumerate(items)

        async def client() -> None:
            while self._elapsed_s() < duration_s and (following := next(numbered, None)):
                index, item = following
                ask = self._make_ask(index, item)
                await self._one(index, ask, scheduled_s=self._elapsed_s())

        async with asyncio.TaskGroup() as group:
            for _ in range(num_clients):
                group.create_task(client())
        return self._in_order()

    def _elapsed_s(self) -> float:
        return self._timeline.now() - self._began_at_s

    def _in_order(self) -> list[Record]:
        return sorted(self._records, key=lambda record: record.index)

    async def _one(self, index: int, ask: Ask, *, scheduled_s: float) -> None:
        sent_s = self._elapsed_s()
        token_at_s: list[float] = []
        ended, error = Ended(output_tokens=None), ""
        try:
            async with asyncio.timeout(self._timeout_s):
                ended = await self._listen(ask, token_at_s)
        except Failed as failure:
            error = failure.reason
        except TimeoutError:
            error = DEADLINE_PASSED
        told = ended.output_tokens
        record = Record(
            index=index,
            scheduled_s=scheduled_s,
            sent_s=sent_s,
            ended_s=self._elapsed_s(),
            prompt_tokens=len(ask.token_ids),
            max_tokens=ask.max_tokens,
            token_at_s=tuple(token_at_s),
            output_tokens=len(token_at_s) if told is None else told,
            cached_prompt_tokens=ended.cached_prompt_tokens,
            handoff=ended.handoff,
            attempts=ended.attempts,
            error=error,
        )
        self._records.append(record)
        self._on_record(record)

    async def _listen(self, ask: Ask, token_at_s: list[float]) -> Ended:
        ended = None
        async with aclosing(self._source.ask(ask)) as events:
            async for event in events:
                if isinstance(event, Arrived):
                    token_at_s += [self._elapsed_s()] * event.num_tokens
                else:
                    ended = event
        if ended is None:
            raise Failed(STREAM_CUT)
        return ended
