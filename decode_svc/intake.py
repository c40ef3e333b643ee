"""Which block to fetch next, and when everything is in: the life of one handoff at its puller.

Announcements, the grant and landed bytes arrive in any order; this says what may be done
now. Blocks of our own are wanted only once there are bytes to put into them. A block is
fetched once, verified once, and nothing is joined before all of them are and the holder
has granted the release. No I/O: the service acts, and tells what became of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.engine.request import Granted
from kvrelay.errors import HandoffLost, KvCorrupt
from kvrelay.transfer.base import BlockCopy
from kvrelay.types import BlockId


class IntakeState(Enum):
    """Where a handoff is, seen from its puller. The last two are final."""

    OPENING = auto()
    """The holder has not announced a block yet."""

    ANNOUNCED = auto()
    """There are bytes to fetch, and no room for them yet."""

    GRANTED = auto()
    """There is room; what is announced is being fetched, more is to come."""

    LANDING = auto()
    """Everything is announced; what is missing is being fetched."""

    VERIFYING = auto()
    """Every byte has landed; the last digests are being computed."""

    RELEASING = auto()
    """Every byte is verified; the holder is asked whether its hold lasted."""

    JOINED = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """A block as its holder announced it."""

    block_id: BlockId
    generation: int
    digest: int


@dataclass(frozen=True, slots=True)
class Opened:
    """How large the handoff is."""

    num_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class SourceRun:
    """Blocks that follow those announced before."""

    first_index: int
    blocks: tuple[SourceBlock, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The holder's last word."""

    first_token_id: int
    num_tokens: int
    digest: bytes


Announcement = Opened | SourceRun | Completion


class Intake:
    """One handoff on its way in. Every violation by the holder raises and changes nothing."""

    def __init__(
        self, handoff_id: str, *, num_tokens: int, num_blocks: int, max_batch: int
    ) -> None:
        assert num_blocks > 0
        assert max_batch > 0
        self.handoff_id = handoff_id
        self.announced: list[SourceBlock] = []
        self.completion: Completion | None = None
        self._num_tokens = num_tokens
        self._num_blocks = num_blocks
        self._max_batch = max_batch
        self._is_opened = False
        self._grant: Granted | None = None
        self._next_index = 0  # of the next block to fetch
        self._landed: set[int] = set()
        self._verified: set[int] = set()
        self._is_bound = False
        self._end: IntakeState | None = None

    @property
    def state(self) -> IntakeState:
        if self._end is not None:
            return self._end
        if not self.announced:
            return IntakeState.OPENING
        if self._grant is None:
            return IntakeState.ANNOUNCED
        if self.completion is None:
            return IntakeState.GRANTED
        if len(self._landed) < self._num_missing:
            return IntakeState.LANDING
        if len(self._verified) < self._num_missing or not self._is_bound:
            return IntakeState.VERIFYING
        return IntakeState.RELEASING

    @property
    def num_landed(self) -> int:
        """Blocks fetched so far."""
        return len(self._landed)

    @property
    def generations(self) -> tuple[int, ...]:
        return tuple(block.generation for block in self.announced)

    @property
    def digests(self) -> tuple[int, ...]:
        return tuple(block.digest for block in self.announced)

    # What the holder says

    def heard(self, announcement: Announcement) -> None:
        """Raises KvCorrupt: it does not follow what was announced before."""
        match announcement:
            case Opened():
                self.opened(announcement.num_tokens, announcement.num_blocks)
            case SourceRun():
                self.announce(announcement.first_index, announcement.blocks)
            case Completion():
                self.complete(announcement)

    def opened(self, num_tokens: int, num_blocks: int) -> None:
        """Raises KvCorrupt: it holds something else than our prompt."""
        if self._is_opened:
            raise KvCorrupt(f"handoff {self.handoff_id} was opened twice")
        if (num_tokens, num_blocks) != (self._num_tokens, self._num_blocks):
            raise KvCorrupt(
                f"handoff of {num_tokens} tokens in {num_blocks} blocks, "
                f"prompt of {self._num_tokens} tokens in {self._num_blocks} blocks",
                handoff_id=self.handoff_id,
            )
        self._is_opened = True

    def announce(self, first_index: int, blocks: Sequence[SourceBlock]) -> None:
        """Raises KvCorrupt: the run does not follow the one before it."""
        known, limit = len(self.announced), self._num_blocks
        is_next = self._is_opened and self.completion is None and first_index == known
        if not is_next or not blocks or known + len(blocks) > limit:
            raise KvCorrupt(
                f"{len(blocks)} blocks announced from {first_index}, {known} of {limit} known",
                handoff_id=self.handoff_id,
            )
        self.announced += blocks

    def complete(self, completion: Completion) -> None:
        """Raises KvCorrupt: blocks are missing, or it is another prompt's."""
        known, limit = len(self.announced), self._num_blocks
        if self.completion is not None or known != limit:
            raise KvCorrupt(
                f"handoff completed with {known} of {limit} blocks", handoff_id=self.handoff_id
            )
        if completion.num_tokens != self._num_tokens:
            raise KvCorrupt(
                f"handoff of {completion.num_tokens} tokens, prompt of {self._num_tokens}",
                handoff_id=self.handoff_id,
            )
        self.completion = completion

    # What happens here

    @property
    def wants_grant(self) -> bool:
        """Whether there are bytes for which we have no blocks."""
        return bool(self.announced) and self._grant is None and self._end is None

    def granted(self, grant: Granted) -> None:
        """The engine gave blocks. The first `num_cached_blocks` need no bytes."""
        assert self._grant is None, "granted twice"
        assert len(grant.block_table) >= self._num_blocks, len(grant.block_table)
        self._grant = grant
        self._next_index = min(grant.num_cached_blocks, self._num_blocks)

    def next_batch(self) -> tuple[BlockCopy, ...]:
        """Announced blocks to fetch now, at most `max_batch`; each is given out once."""
        if self._grant is None or self._end is not None:
            return ()
        start = self._next_index
        end = min(len(self.announced), start + self._max_batch)
        self._next_index = max(start, end)
        return tuple(
            BlockCopy(
                index=i,
                source=self.announced[i].block_id,
                source_generation=self.announced[i].generation,
                target=self._grant.block_table[i],
            )
            for i in range(start, end)
        )

    def landed(self, batch: Sequence[BlockCopy]) -> None:
        """The bytes of a batch are here, unverified."""
        indexes = {copy.index for copy in batch}
        assert not indexes & self._landed, "landed twice"
        assert max(indexes) < self._next_index, "landed unasked"
        self._landed |= indexes

    def verify(self, batch: Sequence[BlockCopy], digests: Sequence[int]) -> None:
        """Compare what landed with what was announced. Raises KvCorrupt."""
        indexes = [copy.index for copy in batch]
        assert set(indexes) <= self._landed, "verified before it landed"
        wrong = sum(
            self.announced[i].digest != digest for i, digest in zip(indexes, digests, strict=True)
        )
        if wrong:
            raise KvCorrupt(
                f"{wrong} of {len(batch)} blocks differ from their digests",
                handoff_id=self.handoff_id,
                num_wrong_blocks=wrong,
            )
        self._verified |= set(indexes)

    def verify_handoff(self, digest: bytes) -> None:
        """Compare what the bytes are bound to with our own prompt. Raises KvCorrupt."""
        assert self.completion is not None
        if digest != self.completion.digest:
            raise KvCorrupt(
                f"handoff {self.handoff_id} is not of this prompt", handoff_id=self.handoff_id
            )
        self._is_bound = True

    def joined(self) -> None:
        """The holder said OK: the only way in."""
        assert self.state is IntakeState.RELEASING, self.state
        self._end = IntakeState.JOINED

    def failed(self) -> None:
        """Nothing of this will be used. Safe to repeat, but not after `joined`."""
        assert self._end is not IntakeState.JOINED
        self._end = IntakeState.FAILED

    def require_complete(self) -> None:
        """The holder's stream ended: raises HandoffLost unless it had said everything."""
        if self.completion is None:
            raise HandoffLost(
                f"handoff ended with {len(self.announced)} of {self._num_blocks} blocks announced",
                handoff_id=self.handoff_id,
            )

    @property
    def _num_missing(self) -> int:
        """Blocks that had to be fetched, once a grant is there."""
        assert self._grant is not None
        return self._num_blocks - min(self._grant.num_cached_blocks, self._num_blocks)
