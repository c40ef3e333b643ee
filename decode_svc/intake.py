"""Which block to fetch next, and when everything is in: the life of one handoff at its puller.

Announcements, digests, the grant and landed bytes arrive in any order; this says what may be
done now. Blocks of our own are wanted only once there are bytes to put into them. A block is
fetched once, verified once, and nothing is joined before all of them are and the holder has
granted the release. No I/O: the service acts, and tells what became of it.

Indexes are those of wire blocks, which have the holder's size; see `kvrelay.kv.wire`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.engine.request import Granted
from kvrelay.errors import HandoffLost, Incompatible, KvCorrupt
from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout
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

    LANDED = auto()
    """Every byte is here; digests and the holder's last word are to be compared."""

    VERIFIED = auto()
    """Only the fence is between these bytes and their use."""

    JOINED = auto()
    FAILED = auto()


@dataclass(frozen=True, slots=True)
class SourceBlock:
    """A block as its holder announced it."""

    block_id: BlockId
    generation: int
    offset_bytes: int
    """In the memory that the holder registered, in the form that it is moved in."""


@dataclass(frozen=True, slots=True)
class Opened:
    """How large the handoff is so far, and in which form it comes."""

    num_tokens: int
    num_blocks: int
    wire_layout: KvLayout
    is_running: bool


@dataclass(frozen=True, slots=True)
class SourceRun:
    """Blocks that follow those announced before."""

    first_index: int
    blocks: tuple[SourceBlock, ...]


@dataclass(frozen=True, slots=True)
class DigestRun:
    """Digests that follow those told before."""

    first_index: int
    digests: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The holder's last word."""

    output_ids: tuple[int, ...]
    num_tokens: int
    digest: bytes


Announcement = Opened | SourceRun | DigestRun | Completion


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a handoff must be to be ours."""

    num_prompt: int
    emitted_ids: tuple[int, ...]
    """Generated tokens that the caller has."""

    is_running: bool
    """Whether it is a running sequence that moves, rather than a prompt."""

    limit_tokens: int
    """Most tokens whose KV we take."""

    layout: KvLayout
    """Our own blocks'."""

    wire_dtype: str
    """What we asked for; `auto`: whatever loses nothing that we would keep."""


class Intake:
    """One handoff on its way in. Every violation by the holder raises and changes nothing."""

    def __init__(self, handoff_id: str, expected: Expected, *, max_batch_bytes: int) -> None:
        self.handoff_id = handoff_id
        self.announced: list[SourceBlock] = []
        self.digests: list[int] = []
        self.opening: Opened | None = None
        self.completion: Completion | None = None
        self._expected = expected
        self._max_batch_bytes = max_batch_bytes
        self._grant: Granted | None = None
        self._first_index = 0  # of the first block to fetch
        self._next_index = 0  # of the next one
        self._landed: set[int] = set()
        self._measured: dict[int, int] = {}  # digests of what landed and was not yet compared
        self._num_verified = 0
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
        if not self.is_announced:
            return IntakeState.GRANTED
        if len(self._landed) < self._num_missing:
            return IntakeState.LANDING
        if self._num_verified < self._num_missing or not self._is_bound:
            return IntakeState.LANDED
        return IntakeState.VERIFIED

    @property
    def is_announced(self) -> bool:
        """Whether there will be no more blocks."""
        if self.completion is not None:
            return True
        opening = self.opening
        return (
            opening is not None
            and not opening.is_running
            and len(self.announced) == opening.num_blocks
        )

    @property
    def wire_layout(self) -> KvLayout:
        assert self.opening is not None
        return self.opening.wire_layout

    @property
    def is_as_kept(self) -> bool:
        """Whether bytes come as we keep them."""
        return self.wire_layout == self._expected.layout

    @property
    def num_landed(self) -> int:
        """Blocks fetched so far."""
        return len(self._landed)

    @property
    def num_landed_bytes(self) -> int:
        return self.num_landed * self.wire_layout.block_num_bytes if self.opening else 0

    @property
    def generations(self) -> tuple[int, ...]:
        return tuple(block.generation for block in self.announced)

    # What the holder says

    def heard(self, announcement: Announcement) -> None:
        """Raises KvCorrupt: it does not follow what was announced before, or is not ours."""
        match announcement:
            case Opened():
                self.opened(announcement)
            case SourceRun():
                self.announce(announcement.first_index, announcement.blocks)
            case DigestRun():
                self.digested(announcement.first_index, announcement.digests)
            case Completion():
                self.complete(announcement)

    def opened(self, opened: Opened) -> None:
        """Raises KvCorrupt: it holds something else than our request.

        Raises:
            Incompatible: its blocks cannot be ours.
        """
        if self.opening is not None:
            raise KvCorrupt(f"handoff {self.handoff_id} was opened twice")
        expected = self._expected
        self._require_layout(opened.wire_layout)
        least, most = expected.num_prompt, expected.num_prompt
        if expected.is_running:
            most = expected.limit_tokens
        wanted_blocks = opened.wire_layout.num_blocks_for(opened.num_tokens)
        if expected.is_running and opened.num_tokens > most:
            raise HandoffLost(
                f"it has {opened.num_tokens} tokens by now, and there is room for {most}",
                handoff_id=self.handoff_id,
            )
        is_ours = (
            opened.is_running == expected.is_running
            and least <= opened.num_tokens <= most
            and opened.num_blocks == wanted_blocks
        )
        if not is_ours:
            raise KvCorrupt(
                f"handoff of {opened.num_tokens} tokens in {opened.num_blocks} blocks, "
                f"expected {least} to {most} tokens",
                handoff_id=self.handoff_id,
            )
        self.opening = opened

    def announce(self, first_index: int, blocks: Sequence[SourceBlock]) -> None:
        """Raises KvCorrupt: the run does not follow the one before it."""
        known, limit = len(self.announced), self._most_blocks
        is_next = self.opening is not None and self.completion is None and first_index == known
        if not is_next or not blocks or known + len(blocks) > limit:
            raise KvCorrupt(
                f"{len(blocks)} blocks announced from {first_index}, {known} of {limit} known",
                handoff_id=self.handoff_id,
            )
        self.announced += blocks

    def digested(self, first_index: int, digests: Sequence[int]) -> None:
        """Raises KvCorrupt: they do not follow those before, or are not those of what landed."""
        known, limit = len(self.digests), len(self.announced)
        if first_index != known or not digests or known + len(digests) > limit:
            raise KvCorrupt(
                f"{len(digests)} digests from {first_index}, {known} known of {limit} blocks",
                handoff_id=self.handoff_id,
            )
        self.digests += digests
        self._compare()

    def complete(self, completion: Completion) -> None:
        """Raises KvCorrupt: something is missing, or it is another request's."""
        expected, known = self._expected, len(self.announced)
        num_tokens, output_ids = completion.num_tokens, completion.output_ids
        is_whole = (
            self.completion is None
            and self.opening is not None
            and known == self.wire_layout.num_blocks_for(num_tokens) == len(self.digests)
        )
        if not is_whole:
            raise KvCorrupt(
                f"handoff of {num_tokens} tokens completed with {known} blocks and "
                f"{len(self.digests)} digests",
                handoff_id=self.handoff_id,
            )
        if expected.is_running:
            emitted = expected.emitted_ids
            is_ours = (
                num_tokens <= expected.limit_tokens
                and len(output_ids) == num_tokens - expected.num_prompt + 1
                and output_ids[: len(emitted)] == emitted
            )
        else:
            is_ours = num_tokens == expected.num_prompt and len(output_ids) == 1
        if not is_ours:
            raise KvCorrupt(
                f"handoff of {num_tokens} tokens, {len(output_ids)} of them generated, "
                f"is not of a prompt of {expected.num_prompt}",
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
        own = self._expected.layout
        assert len(grant.block_table) >= own.num_blocks_for(self._expected.num_prompt)
        self._grant = grant
        wire, is_all_here = self.wire_layout, self.first_token == self._most_tokens
        self._first_index = (
            self._most_blocks if is_all_here else self.first_token // wire.block_size
        )
        self._next_index = self._first_index

    @property
    def first_token(self) -> int:
        """The first whose KV has to come."""
        assert self._grant is not None
        cached = self._grant.num_cached_blocks * self._expected.layout.block_size
        return min(cached, self._expected.num_prompt)

    @property
    def block_table(self) -> tuple[BlockId, ...]:
        assert self._grant is not None
        return self._grant.block_table

    @property
    def num_tokens(self) -> int:
        """Whose KV is announced, a partly filled last block for what it is known to hold."""
        assert self.opening is not None
        if self.completion is not None:
            return self.completion.num_tokens
        return min(len(self.announced) * self.wire_layout.block_size, self._most_tokens)

    @property
    def has_batch(self) -> bool:
        """Whether there is something to fetch that was not given out."""
        can_fetch = self._grant is not None and self._end is None
        return can_fetch and self._next_index < len(self.announced)

    def next_batch(self) -> tuple[int, ...]:
        """Indexes of announced blocks to fetch now, in order; each is given out once."""
        if not self.has_batch:
            return ()
        most = max(1, self._max_batch_bytes // self.wire_layout.block_num_bytes)
        first = self._next_index
        self._next_index = min(len(self.announced), first + most)
        return tuple(range(first, self._next_index))

    def landed(self, batch: Sequence[int]) -> None:
        """The bytes of a batch are here, unverified."""
        assert not self._landed.intersection(batch), "landed twice"
        assert max(batch) < self._next_index, "landed unasked"
        self._landed.update(batch)

    def measured(self, batch: Sequence[int], digests: Sequence[int]) -> None:
        """The digests of what landed. Raises KvCorrupt: they are not those announced."""
        assert self._landed.issuperset(batch), "measured before it landed"
        self._measured.update(zip(batch, digests, strict=True))
        self._compare()

    def verify_handoff(self, digest: bytes) -> None:
        """Compare what the bytes are bound to with our own request. Raises KvCorrupt."""
        assert self.completion is not None
        if digest != self.completion.digest:
            raise KvCorrupt(
                f"handoff {self.handoff_id} is not of this request", handoff_id=self.handoff_id
            )
        self._is_bound = True

    def joined(self) -> None:
        """The holder said OK: the only way in."""
        assert self.state is IntakeState.VERIFIED, self.state
        self._end = IntakeState.JOINED

    def failed(self) -> None:
        """Nothing of this will be used. Safe to repeat, but not after `joined`."""
        assert self._end is not IntakeState.JOINED
        self._end = IntakeState.FAILED

    def require_complete(self) -> None:
        """The holder's stream ended: raises HandoffLost unless it had said everything."""
        if self.completion is None:
            raise HandoffLost(
                f"handoff ended with {len(self.announced)} blocks announced and no last word",
                handoff_id=self.handoff_id,
            )

    def _compare(self) -> None:
        known = len(self.digests)
        comparable = [index for index in self._measured if index < known]
        wrong = sum(self.digests[index] != self._measured.pop(index) for index in comparable)
        if wrong:
            raise KvCorrupt(
                f"{wrong} of {len(comparable)} blocks differ from their digests",
                handoff_id=self.handoff_id,
                num_wrong_blocks=wrong,
            )
        self._num_verified += len(comparable)

    def _require_layout(self, wire: KvLayout) -> None:
        own, asked = self._expected.layout, self._expected.wire_dtype
        shapes = [(it.num_layers, it.num_kv_heads, it.head_dim) for it in (wire, own)]
        if shapes[0] != shapes[1]:
            raise Incompatible(f"blocks of {shapes[0]} (layers, heads, dim), ours {shapes[1]}")
        is_float32 = {it.dtype == "float32" for it in (wire, own)}
        if len(is_float32) > 1:
            raise Incompatible(f"KV of {wire.dtype}, ours is {own.dtype}")
        if asked != "auto" and DTYPE_NUM_BYTES[wire.dtype] > DTYPE_NUM_BYTES[asked]:
            raise HandoffLost(
                f"the holder sends {wire.dtype} and does not pack to {asked}: see its `packs_to`; "
                "wire_dtype = auto takes what it has"
            )

    @property
    def _most_tokens(self) -> int:
        expected = self._expected
        return expected.limit_tokens if expected.is_running else expected.num_prompt

    @property
    def _most_blocks(self) -> int:
        return self.wire_layout.num_blocks_for(self._most_tokens) if self.opening else 0

    @property
    def _num_missing(self) -> int:
        """Blocks that had to be fetched, once a grant is there and all are announced."""
        return max(0, len(self.announced) - self._first_index)
