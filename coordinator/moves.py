"""Which running requests move from one decode worker to another, when, and where to.

Pure: loads and instants are passed in. There are two reasons to move. A worker that drains hands
over all it runs, so that nobody has to compute a token again when it goes. A worker on which
sequences wait for room hands over one while another worker has ample room, so that a long answer is
not preempted again and again next to an empty worker. Moving costs a copy of the sequence's KV and
a gap of a few steps; whoever cannot move goes on where it is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from coordinator.registry import Member
from kvrelay.types import Role, TransportOffer


class MoveReason(Enum):
    """Why a request moves."""

    DRAIN = "drain"
    RELIEF = "relief"


class MoveOutcome(Enum):
    """What became of a move."""

    MOVED = "moved"
    FAILED = "failed"
    """It goes on where it was, or, if that worker was lost meanwhile, is placed again."""

    OVERTAKEN = "overtaken"
    """The request ended meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveRules:
    """What the operator chose, and what keeps requests from moving to and fro."""

    relief: bool = True
    max_under_way: int = 8
    """Drain: moves off one worker at a time. Relief moves one."""

    crowded: float = 0.9
    """A worker at least so full, on which somebody waits, may be relieved..."""

    ample: float = 0.5
    """...by one that would be at most so full with what it takes over."""

    min_left: int = 32
    """Relief: a request with fewer tokens left to generate is soon over where it is."""

    lately_s: float = 1.0
    """Relief: a request that gave no token for so long probably waits itself, and cannot move."""

    max_relieved: int = 2
    """Moves for relief of one request."""

    max_failed: int = 8
    """Failed moves of one request; after these it stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Movable:
    """A request that runs on a decode worker, and does not move yet."""

    request_id: str
    source: Member
    num_tokens: int
    """Of prompt and output so far."""

    num_slots: int
    """Tokens whose KV it may come to need."""

    last_token_at_s: float
    num_relieved: int
    num_failed: int

    @property
    def num_left(self) -> int:
        """Tokens that it may still generate."""
        return self.num_slots + 1 - self.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One request, from one decode worker to another."""

    request_id: str
    source: Member
    target: Member
    offer: TransportOffer
    """How the target pulls."""

    reason: MoveReason
    num_blocks: int
    """Of the target's, that it takes there now."""


@dataclass(frozen=True, slots=True)
class _Settled:
    """A move that is over, of which its target's load does not tell yet."""

    move: Move
    outcome: MoveOutcome
    at_s: float


class MovePlanner:
    """Decides on moves, and keeps those that are under way.

    Args:
        common_offer: how its second argument would pull from its first, or None if it cannot.
    """

    def __init__(
        self, rules: MoveRules, common_offer: Callable[[Member, Member], TransportOffer | None]
    ) -> None:
        self._rules = rules
        self._common_offer = common_offer
        self._under_way: dict[str, Move] = {}  # by request_id
        self._settled: list[_Settled] = []

    def plan(
        self, members: Sequence[Member], movables: Iterable[Movable], now_s: float
    ) -> list[Move]:
        """The moves to begin now; each is under way from here on, until `ended` is told.

        `movables` is looked at only if somebody is to be moved from.
        """
        decodes = [m for m in members if m.identity.role is Role.DECODE]
        self._settled = [s for s in self._settled if _is_news(s, decodes)]
        sources = [(m, reason) for m in decodes if (reason := self._reason_to_leave(m))]
        targets = [m for m in decodes if m.takes_work]
        if not sources or not targets:
            return []
        by_source: dict[Member, list[Movable]] = {source: [] for source, _ in sources}
        for movable in movables:
            is_new = movable.request_id not in self._under_way
            if is_new and movable.source in by_source and self._may_try(movable):
                by_source[movable.source].append(movable)
        moves: list[Move] = []
        for source, reason in sources:
            moves += self._moves_off(source, reason, by_source[source], targets, now_s)
        return moves

    def ended(self, move: Move, outcome: MoveOutcome, now_s: float) -> None:
        """A move is over; its target's next load is the first to tell of it."""
        del self._under_way[move.request_id]
        self._settled.append(_Settled(move, outcome, now_s))

    def _reason_to_leave(self, member: Member) -> MoveReason | None:
        if not member.is_linked:
            return None
        if member.load.is_draining:
            return MoveReason.DRAIN
        num_waiting = member.load.waiting_sequences + member.load.waiting_handoffs
        is_crowded = num_waiting > 0 and self._fill(member) >= self._rules.crowded
        return MoveReason.RELIEF if self._rules.relief and is_crowded else None

    def _may_try(self, movable: Movable) -> bool:
        return movable.num_failed < self._rules.max_failed

    def _moves_off(
        self,
        source: Member,
        reason: MoveReason,
        movables: Sequence[Movable],
        targets: Sequence[Member],
        now_s: float,
    ) -> Iterator[Move]:
        candidates: Sequence[Movable]
        if reason is MoveReason.DRAIN:
            # Those that would hold the worker up longest go first.
            candidates = sorted(movables, key=lambda m: (-m.num_left, m.request_id))
            limit = self._rules.max_under_way
        else:
            candidates = self._relievable(source, movables, now_s)
            limit = 1
        limit -= sum(move.source is source for move in self._under_way.values())
        for movable in candidates:
            if limit <= 0:
                return
            move = self._move(movable, reason, targets)
            if move is not None:
                self._under_way[move.request_id] = move
                limit -= 1
                yield move

    def _relievable(
        self, source: Member, movables: Sequence[Movable], now_s: float
    ) -> Sequence[Movable]:
        """Who may move for relief, best first: much left to generate, and little to copy.

        Nobody, until the source's load tells of the last one that left: it may be enough.
        """
        if any(s.move.source is source and s.at_s >= source.heard_at_s for s in self._settled):
            return []
        rules = self._rules
        fit = [
            m
            for m in movables
            if m.num_relieved < rules.max_relieved
            and m.num_left >= rules.min_left
            and now_s - m.last_token_at_s <= rules.lately_s
        ]
        return sorted(fit, key=lambda m: (m.num_tokens - m.num_left, m.request_id))

    def _move(self, movable: Movable, reason: MoveReason, targets: Sequence[Member]) -> Move | None:
        """Where it goes: to whoever is emptiest with it, one of the source's KV dtype first."""
        limit = self._rules.ample if reason is MoveReason.RELIEF else 1.0
        found: list[tuple[tuple[bool, float, str], Move]] = []
        for target in targets:
            offer = self._common_offer(movable.source, target)
            num_blocks = _num_blocks(movable, target)
            fill = self._fill(target, num_blocks=num_blocks, num_sequences=1)
            if (
                offer is None
                or target is movable.source
                or fill > limit
                or target.num_slots < movable.num_slots
                or self._free_blocks(target) < num_blocks
                or self._has_just_failed(movable, target)
            ):
                continue
            move = Move(
                request_id=movable.request_id,
                source=movable.source,
                target=target,
                offer=offer,
                reason=reason,
                num_blocks=num_blocks,
            )
            is_other = target.kv_dtype != movable.source.kv_dtype
            found.append(((is_other, fill, target.worker_id), move))
        return min(found, key=lambda it: it[0])[1] if found else None

    def _has_just_failed(self, movable: Movable, target: Member) -> bool:
        """Whether the same was tried, and the target was not heard since."""
        return any(
            settled.outcome is MoveOutcome.FAILED
            and settled.move.target is target
            and settled.move.request_id == movable.request_id
            for settled in self._settled
        )

    def _fill(self, member: Member, *, num_blocks: int = 0, num_sequences: int = 0) -> float:
        """How full a worker is, by sequences or by blocks, whichever is more, with so many more."""
        load = member.load
        sequences = max(len(member.placed), load.running_sequences + load.waiting_sequences)
        # A request that was told to move there is among the placed, but not one of this plan.
        sequences += num_sequences + sum(
            not any(request_id == move.request_id for request_id, _ in member.placed)
            for move in self._under_way.values()
            if move.target is member
        )
        blocks = load.held_blocks + num_blocks + self._promised_blocks(member)
        return max(
            sequences / member.identity.max_sequences,
            blocks / member.identity.num_blocks,
        )

    def _free_blocks(self, member: Member) -> int:
        """Blocks that nobody needs soon: each sequence there may want another any moment."""
        load = member.load
        there = load.free_blocks + load.cached_blocks
        return there - self._promised_blocks(member) - len(member.placed)

    def _promised_blocks(self, member: Member) -> int:
        """Of moves that the worker's load does not tell of yet."""
        moves = [*self._under_way.values()]
        moves += [s.move for s in self._settled if s.outcome is MoveOutcome.MOVED]
        return sum(move.num_blocks for move in moves if move.target is member)


def _is_news(settled: _Settled, members: Sequence[Member]) -> bool:
    """Whether one of the two workers has not told since how it is."""
    both = (settled.move.source, settled.move.target)
    return any(m in both and m.heard_at_s <= settled.at_s for m in members)


def _num_blocks(movable: Movable, target: Member) -> int:
    """Of the target's, for what there is and for what follows soon."""
    layout = target.identity.fingerprint.layout
    return layout.num_blocks_for(movable.num_tokens) + 1
