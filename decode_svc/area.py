"""A stretch of memory that several landings share, each for a moment.

Whoever finds no room waits for it, first come, first served. Nobody waits while holding a part,
so it always comes.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class LandingArea:
    """`num_bytes` from `offset` on. Used from one event loop."""

    def __init__(self, *, offset: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._offset = offset
        self._taken: dict[int, int] = {}  # offset to end, of parts in use
        self._turn = asyncio.Lock()  # which is first come, first served
        self._freed = asyncio.Event()

    @property
    def num_taken_bytes(self) -> int:
        return sum(end - offset for offset, end in self._taken.items())

    @asynccontextmanager
    async def part(self, num_bytes: int) -> AsyncIterator[int]:
        """The offset of `num_bytes` that nobody else uses meanwhile."""
        assert num_bytes <= self.num_bytes, (num_bytes, self.num_bytes)
        offset = await self._take(num_bytes)
        try:
            yield offset
        finally:
            del self._taken[offset]
            self._freed.set()

    async def _take(self, num_bytes: int) -> int:
        async with self._turn:
            while (offset := self._find(num_bytes)) is None:
                self._freed.clear()
                await self._freed.wait()
            self._taken[offset] = offset + num_bytes
            return offset

    def _find(self, num_bytes: int) -> int | None:
        start = self._offset
        for offset in sorted(self._taken):
            if offset - start >= num_bytes:
                return start
            start = self._taken[offset]
        return start if self._offset + self.num_bytes - start >= num_bytes else None
