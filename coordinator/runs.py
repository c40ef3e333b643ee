"""A request's attempts, as its session keeps them: the one that runs, and the one to go on."""

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator.convert import Lost, News, Work
from coordinator.moves import Move, MoveOutcome
from coordinator.router import Placement
from coordinator.workers import Attempt


class MoveWatch:
    """Hears a worker to which a request is to move, and tells once how that came out.

    Its first word decides, and at once: the caller may be slow, and be handed it much later.

    Args:
        put: takes all that it says...
        on_lost: ...but that it cannot take over, while there is another who goes on.
    """

    def __init__(
        self,
        move: Move,
        *,
        put: Callable[[News], None],
        on_lost: Callable[[Lost], None],
        on_end: Callable[[MoveOutcome], None],
    ) -> None:
        self.move = move
        self.is_alone = False
        """Whether nobody else goes on with the request any more."""

        self._put = put
        self._on_lost = on_lost
        self._on_end: Callable[[MoveOutcome], None] | None = on_end

    def hear(self, news: News) -> None:
        is_lost = isinstance(news, Lost)
        is_first = self._on_end is not None
        self.end(MoveOutcome.FAILED if is_lost else MoveOutcome.MOVED)
        if isinstance(news, Lost) and is_first and not self.is_alone:
            self._on_lost(news)
        else:
            self._put(news)

    def end(self, outcome: MoveOutcome) -> None:
        """It came out so. Safe to repeat; the first outcome stands."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(outcome)


@dataclass(slots=True, eq=False)
class Run:
    """One attempt, from its dispatch to its end."""

    work: Work
    placement: Placement
    attempt: Attempt
    watch: MoveWatch | None = None
    """If it goes on from another attempt."""

    number: int = field(init=False)
    is_prefilled: bool = False
    """Whether its prefill worker has done its part, but for the KV's release."""

    is_over: bool = False
    """Whether its decode worker has forgotten it, so that nobody need tell it to."""

    def __post_init__(self) -> None:
        self.number = self.work.attempt

    @property
    def decode_worker(self) -> str:
        return self.placement.decode.worker_id

    def close(self) -> None:
        """Both sides forget it."""
        self.attempt.close(decode_is_over=self.is_over)
        if self.watch is not None:
            self.watch.end(MoveOutcome.OVERTAKEN)
