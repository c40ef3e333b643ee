"""A request's attempts, as its session keeps them: the one that runs, and the one to go on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.convert import Lost, News, Work
from coordinator.moves import Move, MoveOutcome
from coordinator.router import Placement
from coordinator.workers import Attempt


@dataclass(slots=True, eq=False)
class Run:
    """One attempt, from its dispatch to its end."""

    work: Work
    placement: Placement
    attempt: Attempt
    number: int = field(init=False)
    is_over: bool = False
    """Whether its decode worker has forgotten it, so that nobody need tell it to."""

    def __post_init__(self) -> None:
        self.number = self.work.attempt

    @property
    def decode_worker(self) -> str:
        return self.placement.decode.worker_id


class Succession:
    """A move under way: the attempt that is to go on. Somebody is told once how it came out."""

    def __init__(
        self,
        move: Move,
        *,
        put: Callable[[News], None],
        on_lost: Callable[[Lost], None],
        on_end: Callable[[MoveOutcome], None],
    ) -> None:
        self.move = move
        self.run: Run
        self.outcome: MoveOutcome | None = None
        self._put = put
        self._on_lost = on_lost
        self._on_end = on_end

    def hear(self, news: News) -> None:
        """What the new worker says, as it comes. Its first word decides, and at once: the caller
        may be slow, and look at it much later.
        """
        if self.outcome is None and isinstance(news, Lost):
            self._on_lost(news)
            return
        self.end(MoveOutcome.MOVED)
        self._put(news)

    def end(self, outcome: MoveOutcome) -> None:
        """It came out so. Safe to repeat; the first outcome stands."""
        if self.outcome is None:
            self.outcome = outcome
            self._on_end(outcome)
