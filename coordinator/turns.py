"""Who may go on now: a few callers in each turn of the event loop, in the order they asked.

A step of a worker brings news for all its callers at once. If all of them went on at once, the
loop would write to every caller before it read the next step, however far behind it was. A few
to a turn, and the loop reads what has come in between: while it keeps up, each caller is handed
each token by itself, and when it does not, a caller whose turn comes late is handed in one
message what one message can hold. So the less time there is, the less each token costs.
"""

import asyncio
from collections import deque

CALLERS_PER_TURN = 4
"""Fewer would cost more turns while nothing is late, and save no message when much is."""


class Turns:
    """Has those who wait go on, fairly. Used from one event loop."""

    def __init__(self, *, callers_per_turn: int = CALLERS_PER_TURN) -> None:
        assert callers_per_turn > 0
        self._callers_per_turn = callers_per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_due = False

    def queue(self, waiter: "asyncio.Future[None]") -> None:
        """Finish `waiter` when its turn comes, unless somebody cancels it before."""
        self._waiting.append(waiter)
        if not self._is_due:
            self._is_due = True
            waiter.get_loop().call_soon(self._turn)

    def _turn(self) -> None:
        waiting = self._waiting
        num_left = self._callers_per_turn
        while waiting and num_left:
            waiter = waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                num_left -= 1
        self._is_due = bool(waiting)
        if waiting:
            waiting[0].get_loop().call_soon(self._turn)
