"""What an attempt hears from its workers, and the order in which it counts."""

import asyncio
from collections import deque

from coordinator.convert import FirstToken, News, Output
from kvrelay.types import FinishReason


class Inbox:
    """What one attempt has heard and not yet handled. Holds at most its tokens and its end."""

    def __init__(self) -> None:
        self._news: deque[News] = deque()
        self._arrived = asyncio.Event()

    def put(self, news: News) -> None:
        self._news.append(news)
        self._arrived.set()

    def pop(self) -> News | None:
        return self._news.popleft() if self._news else None

    async def get(self) -> News:
        while not self._news:
            self._arrived.clear()
            await self._arrived.wait()
        return self._news.popleft()


class Order:
    """Puts tokens of one attempt in order of position: no gap, no repeat.

    The first token comes from the prefill worker and once more from the decode worker,
    whichever is faster.
    """

    def __init__(self, next_position: int) -> None:
        self._next = next_position
        self._early: dict[int, tuple[int, FinishReason | None]] = {}

    def accept(self, news: FirstToken | Output) -> tuple[tuple[int, ...], FinishReason | None]:
        """The tokens that are now due, and the finish reason if the last is among them."""
        for position, token_id, finish in _positions(news):
            if position >= self._next:
                self._early[position] = (token_id, finish)
        due: list[int] = []
        finish = None
        while finish is None and self._next in self._early:
            token_id, finish = self._early.pop(self._next)
            due.append(token_id)
            self._next += 1
        return tuple(due), finish


def _positions(news: FirstToken | Output) -> list[tuple[int, int, FinishReason | None]]:
    if isinstance(news, FirstToken):
        return [(0, news.token_id, news.finish)]
    last = len(news.token_ids) - 1
    return [
        (news.position + i, token_id, news.finish if i == last else None)
        for i, token_id in enumerate(news.token_ids)
    ]
