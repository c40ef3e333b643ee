"""Who may read which blocks, and until when: the life of a hold, decided without doing it.

A hold ends once. Released: its puller proved that it has everything, and was told OK.
Lapsed: anything else. The fence is that one bit: a puller that is refused drops what it
read, so a block may be reused the moment its hold lapsed, even while a puller that reads
our memory directly is still copying it. What such a copy holds is never used.

Held are the KV of a prompt, which a prefill worker gives away, or that of a running sequence,
which moves: it runs on until its puller freezes it, and again if the hold lapses.

Timers only escalate. A hold with a puller connected has no time limit here; one that
nobody is connected to is given up after `hold_s`, and counted.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from kvrelay.errors import HandoffLost, InvalidRequest, PermissionDenied, QueueFull
from kvrelay.types import BlockId


class HoldState(Enum):
    """Where a hold is. The last three are final."""

    EXPECTED = auto()
    """Somebody wants to pull it; nobody has begun it yet."""

    COMPUTING = auto()
    """More KV is to come."""

    COMPLETE = auto()
    """All of it is there, and the sequence computes no more."""

    RELEASED = auto()
    LAPSED = auto()
    FINISHED = auto()
    """The request ended here: nothing is held, and nothing was lost either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldLimits:
    """What bounds the holds of one worker."""

    hold_s: float
    """A complete hold without a connected puller lapses after this."""

    unclaimed_hold_s: float
    """A pull may wait this long for its hold to begin."""

    max_expected: int
    """Pulls that may wait at once for their holds to begin."""

    max_remembered: int
    """Ended holds whose outcome can still be told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PullTerms:
    """How a puller wants its blocks; the same whenever it connects."""

    wire_dtype: str
    """KV dtype that it would like to move."""

    digest_kind: str
    limit_tokens: int
    """Most tokens whose KV it has room for; 0: no limit."""


@dataclass(frozen=True, slots=True)
class AnnouncedBlock:
    """A block whose content will not change for as long as the hold lasts."""

    block_id: BlockId
    generation: int


@dataclass(slots=True, eq=False)
class Hold:
    """The KV of one sequence on its way out. Mutated by `Holds` only."""

    handoff_id: str
    state: HoldState = HoldState.EXPECTED
    puller_id: str = ""
    seq_id: str = ""
    prompt_ids: tuple[int, ...] = ()
    """Forgotten when the hold ends."""

    is_running: bool = False
    """Whether the sequence generates here, so that there may be more KV at the end."""

    terms: PullTerms | None = None
    """None until its puller has connected."""

    num_tokens: int = 0
    """Whose KV is held, or will be; of a running sequence, so far."""

    num_blocks: int = 0
    block_table: tuple[BlockId, ...] = ()
    num_ready: int = 0
    """Leading blocks whose content is final."""

    announced: list[AnnouncedBlock] = field(default_factory=list)
    """Forgotten when the hold ends."""

    digests: list[int] = field(default_factory=list)
    """Of the first announced blocks. Forgotten when the hold ends."""

    released_generations: tuple[int, ...] = ()
    """What a release that is repeated must say again."""

    output_ids: tuple[int, ...] = ()
    """All tokens generated here, once it is complete."""

    num_pulls: int = 0
    """Pullers connected now."""

    idle_since_s: float = 0.0
    """Since when nobody has been connected; means something only while `num_pulls` is 0."""

    @property
    def is_alive(self) -> bool:
        return self.state in (HoldState.COMPUTING, HoldState.COMPLETE)

    @property
    def undigested(self) -> list[AnnouncedBlock]:
        return self.announced[len(self.digests) :]

    @property
    def is_told(self) -> bool:
        """Whether a puller can know all there is to know."""
        return self.state is HoldState.COMPLETE and len(self.digests) == self.num_blocks

    @property
    def ready_unannounced(self) -> tuple[BlockId, ...]:
        return self.block_table[len(self.announced) : self.num_ready]

    def require_alive(self) -> None:
        """Raises HandoffLost unless every block still has its content."""
        if not self.is_alive:
            raise HandoffLost(
                f"handoff {self.handoff_id} is {self.state.name.lower()}",
                handoff_id=self.handoff_id,
            )

    def require_puller(self, puller_id: str) -> None:
        if puller_id != self.puller_id:
            raise PermissionDenied(
                f"handoff {self.handoff_id} is held for another worker than {puller_id}",
                handoff_id=self.handoff_id,
                puller_id=puller_id,
            )


class Holds:
    """Every hold of one worker; pure: instants are passed in, blocks are only names.

    Whoever ends a hold here must tell the engine to give its blocks back.
    """

    def __init__(self, *, block_size: int, limits: HoldLimits) -> None:
        self._block_size = block_size
        self._limits = limits
        self._holds: dict[str, Hold] = {}
        self._ended: OrderedDict[str, Hold] = OrderedDict()
        self.num_released = 0

    @property
    def num_waiting_for_release(self) -> int:
        return sum(hold.state is HoldState.COMPLETE for hold in self._holds.values())

    @property
    def is_empty(self) -> bool:
        return not self._holds

    # The holder's side

    def begin(
        self,
        handoff_id: str,
        *,
        puller_id: str,
        seq_id: str,
        prompt_ids: tuple[int, ...],
        is_running: bool = False,
    ) -> Hold:
        """A prompt was submitted, or a sequence that runs is to move.

        Raises:
            InvalidRequest: the id names a hold already; ids are minted once.
        """
        hold = self._begin(handoff_id)
        hold.puller_id = puller_id
        hold.seq_id = seq_id
        hold.prompt_ids = prompt_ids
        hold.is_running = is_running
        hold.num_tokens = len(prompt_ids)
        hold.num_blocks = -(-len(prompt_ids) // self._block_size)
        return hold

    def advance(self, hold: Hold, block_table: tuple[BlockId, ...], num_computed: int) -> None:
        """`num_computed` tokens have their KV. A partly filled block is not final yet."""
        assert hold.state is HoldState.COMPUTING, hold.state
        if hold.is_running:
            assert block_table[: hold.num_ready] == hold.block_table[: hold.num_ready], "moved"
            hold.num_tokens = num_computed
            hold.num_blocks = -(-num_computed // self._block_size)
        else:
            assert not hold.block_table or hold.block_table == block_table, "a held block moved"
            assert len(block_table) == hold.num_blocks, (len(block_table), hold.num_blocks)
        hold.block_table = block_table[: hold.num_blocks]
        hold.num_ready = max(hold.num_ready, num_computed // self._block_size)

    def complete(self, hold: Hold, output_ids: tuple[int, ...], now_s: float) -> None:
        """All KV is in place, and every token that was generated here is known."""
        assert hold.state is HoldState.COMPUTING, hold.state
        assert output_ids
        hold.state = HoldState.COMPLETE
        hold.output_ids = output_ids
        hold.num_ready = hold.num_blocks
        hold.idle_since_s = now_s

    def announce(self, hold: Hold, blocks: Sequence[AnnouncedBlock]) -> None:
        """The next ready blocks, as they will be told to whoever pulls."""
        start = len(hold.announced)
        hold.require_alive()
        assert start + len(blocks) <= hold.num_ready, (start, len(blocks), hold.num_ready)
        assert [b.block_id for b in blocks] == list(
            hold.block_table[start : start + len(blocks)]
        ), "announced out of order"
        hold.announced += blocks

    def digested(self, hold: Hold, digests: Sequence[int]) -> None:
        """Digests of the next announced blocks."""
        hold.require_alive()
        assert len(hold.digests) + len(digests) <= len(hold.announced)
        hold.digests += digests

    def lapse(self, hold: Hold) -> None:
        """The hold ends without its puller's proof: cancelled, or given up."""
        assert hold.is_alive, hold.state
        hold.state = HoldState.LAPSED
        self._end(hold)

    def finish(self, hold: Hold) -> None:
        """The request is over: nobody needs the KV."""
        assert hold.is_alive, hold.state
        hold.state = HoldState.FINISHED
        self._end(hold)

    # The puller's side

    def connect(self, handoff_id: str, puller_id: str, terms: PullTerms, now_s: float) -> Hold:
        """Somebody wants to pull. Every return is paired with one `disconnect`.

        A finished hold may still be connected to: its puller is about to be called off by
        whoever was told of the finish, and must not report a loss first.

        Raises:
            HandoffLost: it ended.
            PermissionDenied: it is held for another worker.
            QueueFull: too many pulls wait for holds that were not begun.
            InvalidRequest: it was pulled on other terms before.
        """
        hold = self._holds.get(handoff_id) or self._ended.get(handoff_id)
        if hold is None:
            hold = self._expect(handoff_id, now_s)
        elif hold.state is HoldState.EXPECTED:
            self._refuse_crowd()
        else:
            hold.require_puller(puller_id)
            if hold.state is not HoldState.FINISHED:
                hold.require_alive()
        if hold.terms not in (None, terms):
            raise InvalidRequest("handoff_id", "pulled on other terms", handoff_id=handoff_id)
        hold.terms = terms
        hold.num_pulls += 1
        return hold

    def disconnect(self, hold: Hold, now_s: float) -> None:
        """A puller left. Leaves the hold as it is, unless nothing but that pull was there."""
        assert hold.num_pulls > 0
        hold.num_pulls -= 1
        hold.idle_since_s = now_s
        if hold.num_pulls == 0 and hold.state is HoldState.EXPECTED:
            del self._holds[hold.handoff_id]

    def was_begun(self, handoff_id: str) -> bool:
        """Whether a hold of that name is alive, or ended and is remembered."""
        return handoff_id in self._ended or self.alive(handoff_id) is not None

    def require_not_over(self, handoff_id: str) -> None:
        """Raises HandoffLost if a hold of that name is known to have ended."""
        ended = self._ended.get(handoff_id)
        if ended is not None:
            ended.require_alive()

    def alive(self, handoff_id: str) -> Hold | None:
        """The hold, if it was begun and has not ended."""
        hold = self._holds.get(handoff_id)
        return hold if hold is not None and hold.is_alive else None

    def find(self, handoff_id: str, puller_id: str) -> Hold:
        """A living hold, for its puller.

        Raises:
            HandoffLost: it is unknown or ended.
            PermissionDenied: it is held for another worker.
        """
        hold = self._holds.get(handoff_id) or self._ended.get(handoff_id)
        if hold is None:
            raise HandoffLost(f"handoff {handoff_id} is unknown", handoff_id=handoff_id)
        hold.require_puller(puller_id)
        hold.require_alive()
        return hold

    def release(
        self,
        handoff_id: str,
        puller_id: str,
        *,
        generations: Sequence[int],
        current: Callable[[Sequence[BlockId]], Sequence[int]],
    ) -> Hold | None:
        """The fence: end a hold that never lapsed. None if that was granted before.

        `generations` are what the puller was told of each block, `current` says what
        blocks' generations are now.

        Raises:
            HandoffLost: drop the bytes. The hold, if there is one, stays as it is.
            PermissionDenied: it is held for another worker.
        """
        ended = self._ended.get(handoff_id)
        if ended is not None and ended.state is HoldState.RELEASED:
            ended.require_puller(puller_id)
            _require_equal(handoff_id, "told", generations, ended.released_generations)
            return None
        hold = self.find(handoff_id, puller_id)
        if not hold.is_told:
            raise HandoffLost(
                f"handoff {handoff_id} is still being computed", handoff_id=handoff_id
            )
        told = [block.generation for block in hold.announced]
        _require_equal(handoff_id, "told", generations, told)
        # The engine keeps the blocks of a living hold, so this can only fail by our own bug;
        # then a refusal costs one prefill, and silence would cost a wrong token.
        _require_equal(handoff_id, "now", generations, current(hold.block_table))
        hold.state = HoldState.RELEASED
        hold.released_generations = tuple(generations)
        self.num_released += 1
        self._end(hold)
        return hold

    # Time

    def next_due_s(self) -> float | None:
        """The earliest instant at which `lapse_overdue` may have something to do."""
        return min(
            (due for hold in self._holds.values() if (due := self._due_s(hold)) is not None),
            default=None,
        )

    def lapse_overdue(self, now_s: float) -> list[Hold]:
        """Give up what nobody came for in time."""
        overdue = [
            hold
            for hold in self._holds.values()
            if (due := self._due_s(hold)) is not None and due <= now_s
        ]
        for hold in overdue:
            if hold.state is HoldState.EXPECTED:
                # Not remembered: the prompt may still be submitted, and its puller come again.
                hold.state = HoldState.LAPSED
                del self._holds[hold.handoff_id]
            else:
                self.lapse(hold)
        return overdue

    def check(self) -> None:
        """Prove that every hold is in the table of its state."""
        expected = [hold for hold in self._holds.values() if not hold.is_alive]
        assert all(hold.state is HoldState.EXPECTED for hold in expected)
        assert not any(hold.is_alive for hold in self._ended.values())
        assert not self._holds.keys() & self._ended.keys()
        assert len(self._ended) <= self._limits.max_remembered
        assert self._num_expected_pulls() <= self._limits.max_expected
        for hold in self._holds.values():
            assert len(hold.digests) <= len(hold.announced), hold.handoff_id
            assert len(hold.announced) <= hold.num_ready <= hold.num_blocks, hold.handoff_id

    def _due_s(self, hold: Hold) -> float | None:
        if hold.state is HoldState.EXPECTED:
            return hold.idle_since_s + self._limits.unclaimed_hold_s
        if hold.state is HoldState.COMPLETE and hold.num_pulls == 0:
            return hold.idle_since_s + self._limits.hold_s
        return None

    def _expect(self, handoff_id: str, now_s: float) -> Hold:
        self._refuse_crowd()
        hold = self._holds[handoff_id] = Hold(handoff_id, idle_since_s=now_s)
        return hold

    def _begin(self, handoff_id: str) -> Hold:
        """A hold that computes, expected by somebody or new."""
        hold = self._holds.get(handoff_id)
        if handoff_id in self._ended or (hold and hold.state is not HoldState.EXPECTED):
            raise InvalidRequest("handoff_id", "used before", handoff_id=handoff_id)
        if hold is None:
            hold = self._holds[handoff_id] = Hold(handoff_id)
        hold.state = HoldState.COMPUTING
        return hold

    def _refuse_crowd(self) -> None:
        queued, limit = self._num_expected_pulls(), self._limits.max_expected
        if queued >= limit:
            raise QueueFull(what="pulls of holds not begun", queued=queued, limit=limit)

    def _num_expected_pulls(self) -> int:
        return sum(
            hold.num_pulls for hold in self._holds.values() if hold.state is HoldState.EXPECTED
        )

    def _end(self, hold: Hold) -> None:
        del self._holds[hold.handoff_id]
        self._ended[hold.handoff_id] = hold
        hold.prompt_ids = ()
        hold.announced = []
        hold.digests = []
        if len(self._ended) > self._limits.max_remembered:
            self._ended.popitem(last=False)


def _require_equal(handoff_id: str, what: str, theirs: Sequence[int], ours: Sequence[int]) -> None:
    if list(theirs) == list(ours):
        return
    num_different = sum(a != b for a, b in zip(theirs, ours, strict=False))
    num_different += abs(len(theirs) - len(ours))
    raise HandoffLost(
        f"handoff {handoff_id}: {num_different} of {len(ours)} generations are not those {what}",
        handoff_id=handoff_id,
        num_different=num_different,
    )
