"""Moves running requests off workers that drain, or on which others wait; decides nothing.

It looks whenever the pool changed, a heartbeat included, and whenever a move is over. What is to
move, and where to, is decided in `coordinator.moves`; a session carries its own move out.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping

from coordinator.moves import Move, MoveOutcome, MovePlanner, MoveReason
from coordinator.pool import Pool
from coordinator.session import Session
from kvrelay.clock import Clock


class Mover:
    """Carries plans to sessions while `run` runs. Used from one event loop.

    Args:
        sessions: those of callers, by request.
        on_end: is told of each move, once.
    """

    def __init__(
        self,
        *,
        planner: MovePlanner,
        pool: Pool,
        sessions: Mapping[str, Session],
        clock: Clock,
        on_end: Callable[[MoveReason, MoveOutcome], None],
    ) -> None:
        self._planner = planner
        self._pool = pool
        self._sessions = sessions
        self._clock = clock
        self._on_end = on_end
        self._is_running = False

    async def run(self) -> None:
        """Move requests until cancelled. What is under way then goes on by itself."""
        self._is_running = True
        try:
            while True:
                self._look()
                await self._pool.wait_change()
        finally:
            self._is_running = False

    def _look(self) -> None:
        if not self._is_running:
            return
        movables = (it for session in self._sessions.values() if (it := session.movable))
        for move in self._planner.plan(self._pool.members(), movables, self._clock.now()):
            session = self._sessions[move.request_id]
            session.move(move, on_end=functools.partial(self._ended, move))

    def _ended(self, move: Move, outcome: MoveOutcome) -> None:
        self._planner.ended(move, outcome, self._clock.now())
        self._on_end(move.reason, outcome)
        # Whoever tells us is in the midst of something; there may be room for the next move now.
        asyncio.get_running_loop().call_soon(self._look)
