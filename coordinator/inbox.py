"""What a request hears from its workers, and the order in which it counts."""

import asyncio
from collections import deque
from collections.abc import Sequence

from coordinator.convert import FirstToken, Lost, Moved, News, Output
from coordinator.turns import Turns
from kvrelay.types import FinishReason

Said = FirstToken | Output
"""News that brings tokens."""

Ended = Lost | Moved
"""News that an attempt says no more."""


class Inbox:
    """What one request has heard and not yet handled. Holds at most the tokens and the ends of
    its attempts.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self._news: deque[News] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._is_urgent = False

    def put(self, news: News) -> None:
        is_first = not self._news
        self._news.append(news)
        if is_first and self._waiter is not None:
            self._wake(self._waiter)

    async def get(self, *, is_urgent: bool) -> Ended | Sequence[Said]:
        """What has been heard, at least one thing: all that was said before an end, or the end.

        Args:
            is_urgent: the first thing, as soon as it is here; not all, when it is our turn.
        """
        if not (is_urgent and self._news):
            await self._wait(is_urgent=is_urgent)
        return self._take(1 if is_urgent else len(self._news))

    async def _wait(self, *, is_urgent: bool) -> None:
        self._is_urgent = is_urgent
        waiter = self._waiter = asyncio.get_running_loop().create_future()
        try:
            if self._news:
                self._wake(waiter)
            await waiter
        finally:
            self._waiter = None

    def _wake(self, waiter: "asyncio.Future[None]") -> None:
        if not self._is_urgent:
            self._turns.queue(waiter)
        elif not waiter.done():
            waiter.set_result(None)

    def _take(self, limit: int) -> Ended | Sequence[Said]:
        said: list[Said] = []
        for _ in range(limit):
            news = self._news.popleft()
            if isinstance(news, (Output, FirstToken)):
                said.append(news)
            elif not said:
                return news
            else:
                self._news.appendleft(news)
                break
        return said


class Order:
    """Puts tokens in order of position: no gap, no repeat.

    The first token comes from the prefill worker and once more from the decode worker, and when a
    sequence moves its last tokens come from the worker that it leaves and once more from the other,
    whichever is faster.
    """

    def __init__(self, next_position: int) -> None:
        self._next = next_position
        self._early: dict[int, tuple[int, FinishReason | None]] = {}

    def accept(self, news: Said) -> tuple[Sequence[int], FinishReason | None]:
        """The tokens that are now due, and the finish reason if the last is among them."""
        if isinstance(news, Output) and news.position == self._next and not self._early:
            self._next += len(news.token_ids)
            return news.token_ids, news.finish
        return self._sort(news)

    def _sort(self, news: Said) -> tuple[Sequence[int], FinishReason | None]:
        for position, token_id, finish in _positions(news):
            if position >= self._next:
                self._early[position] = (token_id, finish)
        due: list[int] = []
        finish = None
        while finish is None and self._next in self._early:
            token_id, finish = self._early.pop(self._next)
            due.append(token_id)
            self._next += 1
        return due, finish


def _positions(news: Said) -> list[tuple[int, int, FinishReason | None]]:
    if isinstance(news, FirstToken):
        return [(0, news.token_id, news.finish)]
    last = len(news.token_ids) - 1
    return [
        (news.position + i, token_id, news.finish if i == last else None)
        for i, token_id in enumerate(news.token_ids)
    ]
