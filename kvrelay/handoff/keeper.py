"""Keeps KV until it was pulled: tells `Holds` what happened, carries out what follows from it.

    1. a submit begins a hold, each chunk advances it, the first token completes it; of a running
       sequence each step advances it, and it completes when its puller has frozen it
    2. whoever pulls is told of blocks as they are finished, and then of their digests, so that
       bytes move meanwhile
    3. `Release` ends the hold if it never lapsed
    4. a cancel, a lost session or time passing lapses it

A puller that maps our memory may still be copying a block when its hold lapses and the
engine reuses the block. That is safe, and needs no quarantine here: we never write for
somebody else, and the puller's `Release` will be refused, so the copy is dropped.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from functools import partial

import structlog

from kvrelay.clock import Clock
from kvrelay.engine.engine import Engine
from kvrelay.engine.request import ChunkDone
from kvrelay.errors import HandoffLost, InvalidRequest, QuiescenceLost
from kvrelay.handoff.announcement import (
    Announcement,
    BlockRun,
    Completed,
    DigestRun,
    Opened,
    WireBlock,
)
from kvrelay.handoff.holds import AnnouncedBlock, Hold, HoldLimits, Holds, HoldState, PullTerms
from kvrelay.handoff.packer import Packer
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.kv.staging import StagingPlan
from kvrelay.obs.metrics import WorkerMetrics
from kvrelay.transfer.digest import DigestKind, handoff_digest, range_digests
from kvrelay.transfer.frames import frames_of

INLINE_NUM_BYTES = 8 << 20
"""Of what is digested at once, in a third of a millisecond, so that blocks and digests are one
message: a thread that is asked to do it waits for longer, and so does a second message."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Kept:
    """What a hold needs here besides its policy."""

    on_end: Callable[[HoldState], None]
    changed: asyncio.Event
    digesting: "asyncio.Future[list[int]] | None" = None

    last_word: Completed | None = None


class HoldKeeper:
    """Owns the holds of this worker. Used from the event loop only.

    `on_end` of a hold is called exactly once, when nothing is held any more; it gives the
    sequence back to the engine, or lets it run on.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        cache: KvCache,
        staging: StagingPlan,
        limits: HoldLimits,
        metrics: WorkerMetrics,
        clock: Clock,
    ) -> None:
        self.holds = Holds(block_size=cache.layout.block_size, limits=limits)
        self.cache = cache
        self.limits = limits
        self._packer = Packer(cache, staging)
        self._engine = engine
        self._metrics = metrics
        self._clock = clock
        self._kept: dict[Hold, _Kept] = {}  # of living holds, and of those pulled now
        self._timer: asyncio.TimerHandle | None = None

    # For the session

    def begin(
        self,
        handoff_id: str,
        *,
        puller_id: str,
        seq_id: str,
        prompt_ids: tuple[int, ...],
        on_end: Callable[[HoldState], None],
        is_running: bool = False,
    ) -> Hold:
        """See `Holds.begin`. `on_end` is called once, when nothing is held any more."""
        hold = self.holds.begin(
            handoff_id,
            puller_id=puller_id,
            seq_id=seq_id,
            prompt_ids=prompt_ids,
            is_running=is_running,
        )
        self._keep(hold).on_end = on_end
        self._changed(hold)
        return hold

    def refuse(self, handoff_id: str, *, puller_id: str) -> None:
        """There is nothing to hold under that name, and will not be: its puller hears so at once.
        A name that was begun before is left as it is.
        """
        if self.holds.was_begun(handoff_id):
            return
        self.lapse(
            self.begin(handoff_id, puller_id=puller_id, seq_id="", prompt_ids=(), on_end=_nothing)
        )

    def advance(self, hold: Hold, chunk: ChunkDone) -> None:
        if hold.state is HoldState.COMPUTING:
            self.holds.advance(hold, chunk.block_table, chunk.num_computed)
            self._changed(hold)

    def complete(self, hold: Hold, output_ids: tuple[int, ...]) -> None:
        if hold.state is HoldState.COMPUTING:
            self.holds.complete(hold, output_ids, self._clock.now())
            self._changed(hold)

    def finish(self, hold: Hold) -> None:
        """The request ended here: hold nothing."""
        if hold.is_alive:
            self.holds.finish(hold)
            self._end(hold)

    def lapse(self, hold: Hold) -> None:
        """Nobody wants it any more. Ended holds are left as they are."""
        if hold.is_alive:
            self.holds.lapse(hold)
            self._end(hold)

    # For the puller

    async def announcements(
        self, handoff_id: str, puller_id: str, terms: PullTerms
    ) -> AsyncGenerator[Announcement, None]:
        """What a puller is told, then silence until the hold ends.

        The stream is how we see that the puller still lives: it stays open after its last
        message, until the hold was released.

        Raises:
            HandoffLost: the hold lapsed, or never began in time.
            PermissionDenied, QueueFull, InvalidRequest: see `Holds.connect`.
        """
        hold = self.holds.connect(handoff_id, puller_id, terms, self._clock.now())
        kept = self._keep(hold)
        try:
            self._arm()
            while hold.state is HoldState.EXPECTED:
                await kept.changed.wait()
            if hold.state is not HoldState.FINISHED:
                hold.require_alive()
            hold.require_puller(puller_id)
            if hold.is_running:
                self._engine.limit(hold.seq_id, terms.limit_tokens)
            opened = Opened(
                hold.num_tokens, hold.num_blocks, self._packer.wire_layout(terms), hold.is_running
            )
            yield Announcement(opened=opened)
            async with aclosing(self._progress(hold, kept, terms)) as events:
                async for event in events:
                    yield event
        finally:
            self.holds.disconnect(hold, self._clock.now())
            self._changed(hold)  # a release may wait for what nobody digests any more
            self._forget_if_gone(hold)
            self._arm()

    async def _progress(
        self, hold: Hold, kept: _Kept, terms: PullTerms
    ) -> AsyncGenerator[Announcement, None]:
        layout = self._packer.wire_layout(terms)
        announced, digests = hold.announced, hold.digests  # an ended hold forgets them
        num_sent = num_digests_sent = 0
        is_complete_sent = False
        while not (hold.state is HoldState.RELEASED and is_complete_sent):
            changed = kept.changed
            if hold.state is HoldState.FINISHED:
                await self._outlast_finish(hold)
            if hold.state is not HoldState.RELEASED:
                hold.require_alive()
            if hold.is_alive and hold.ready_unannounced:
                await self._announce(hold, layout, terms)
            self._have_digested(hold, kept, layout, terms)
            news = Announcement(
                blocks=self._blocks(announced, num_sent, layout),
                digests=_digests(digests, num_digests_sent),
                completed=None if is_complete_sent else kept.last_word,
            )
            num_sent, num_digests_sent = len(announced), len(digests)
            is_complete_sent = is_complete_sent or news.completed is not None
            if news:
                yield news
            elif changed is kept.changed:
                await changed.wait()

    def _blocks(
        self, announced: Sequence[AnnouncedBlock], first: int, layout: KvLayout
    ) -> BlockRun | None:
        if first == len(announced):
            return None
        blocks = (
            WireBlock(it.block_id, it.generation, self._packer.offset(it.block_id, layout))
            for it in announced[first:]
        )
        return BlockRun(first, tuple(blocks))

    async def _announce(self, hold: Hold, layout: KvLayout, terms: PullTerms) -> None:
        """Announce what is ready, packed first where it travels in another form."""
        async with self._packer.turn:  # which pulls of one hold take as well
            ready = hold.ready_unannounced
            if not (hold.is_alive and ready):
                return
            generations = self._engine.generations(ready)
            blocks = [AnnouncedBlock(*pair) for pair in zip(ready, generations, strict=True)]
            await self._packer.pack(
                blocks, layout, DigestKind(terms.digest_kind), may_grow=hold.is_running
            )
            # The hold may have lapsed meanwhile; then anything was packed.
            hold.require_alive()
            self.holds.announce(hold, blocks)
        self._changed(hold)

    def _have_digested(self, hold: Hold, kept: _Kept, layout: KvLayout, terms: PullTerms) -> None:
        """Digest what was announced: now, or if it is much in a thread, while its puller hears of
        it.
        """
        if kept.digesting is not None and kept.digesting.done():
            kept.digesting.result()  # it failed, or it would not be there any more
        if not (hold.is_alive and hold.undigested) or kept.digesting is not None:
            return
        num_bytes = layout.block_num_bytes
        ranges = [
            (self._packer.offset(block.block_id, layout), num_bytes) for block in hold.undigested
        ]
        kind = DigestKind(terms.digest_kind)
        if kind is DigestKind.XXH3 and len(ranges) * num_bytes <= INLINE_NUM_BYTES:
            self.holds.digested(hold, range_digests(self.cache, ranges, kind))
            self._changed(hold)
            return
        # Not as a task: that would wait for its turn behind whatever is being sent.
        kept.digesting = asyncio.get_running_loop().run_in_executor(
            None, range_digests, self.cache, ranges, kind
        )
        kept.digesting.add_done_callback(partial(self._digested, hold, kept))

    def _digested(self, hold: Hold, kept: _Kept, done: "asyncio.Future[list[int]]") -> None:
        """Of a hold that lapsed meanwhile, these are digests of anything; nobody hears of them."""
        if done.cancelled() or not hold.is_alive:
            return
        if done.exception() is None:
            kept.digesting = None
            self.holds.digested(hold, done.result())
        self._changed(hold)

    def _last_word(self, hold: Hold) -> Completed:
        digest = handoff_digest(
            handoff_id=hold.handoff_id,
            num_tokens=hold.num_tokens,
            prompt_ids=hold.prompt_ids,
            output_ids=hold.output_ids,
            block_digests=hold.digests,
        )
        return Completed(hold.output_ids, hold.num_tokens, digest)

    async def _outlast_finish(self, hold: Hold) -> None:
        """Give the coordinator time to call the puller off, then refuse."""
        try:
            async with asyncio.timeout(self.limits.unclaimed_hold_s):
                await asyncio.Event().wait()
        except TimeoutError:
            raise HandoffLost(
                f"handoff {hold.handoff_id} finished here", handoff_id=hold.handoff_id
            ) from None

    def ranges(
        self, handoff_id: str, puller_id: str, indexes: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Where announced blocks lie in our memory, as (offset, number of bytes).

        Raises:
            HandoffLost, PermissionDenied: see `Holds.find`.
            InvalidRequest: an index that is not announced.
        """
        hold = self.holds.find(handoff_id, puller_id)
        assert hold.terms is not None or not hold.announced
        num_announced = len(hold.announced)
        for index in indexes:
            if index >= num_announced:
                raise InvalidRequest(
                    "indexes", f"{index} is not announced, {num_announced} blocks are"
                )
        if hold.terms is None:
            return []
        layout = self._packer.wire_layout(hold.terms)
        return [
            (self._packer.offset(hold.announced[index].block_id, layout), layout.block_num_bytes)
            for index in indexes
        ]

    def frames(self, handoff_id: str, puller_id: str, indexes: Sequence[int]) -> Iterator[bytes]:
        """The bytes of announced blocks, as messages (see `kvrelay.transfer.frames`). The hold is
        looked at after each frame was copied, so no byte leaves that was read when it had lapsed.
        """
        hold = self.holds.find(handoff_id, puller_id)
        ranges = self.ranges(handoff_id, puller_id, indexes)
        for index, (start, num_bytes) in zip(indexes, ranges, strict=True):
            for frame in frames_of(index, self.cache.range_bytes(start, num_bytes)):
                hold.require_alive()
                yield frame

    @contextmanager
    def reading(
        self, handoff_id: str, puller_id: str, indexes: Sequence[int]
    ) -> Iterator[list[tuple[int, int]]]:
        """As `ranges`, for a copy that we take part in: whatever becomes of the hold and of its
        sequence, the blocks are not reused meanwhile. Never again after `QuiescenceLost`: the
        process must end.
        """
        ranges = self.ranges(handoff_id, puller_id, indexes)
        hold = self.holds.find(handoff_id, puller_id)
        blocks = [hold.announced[index].block_id for index in indexes]
        self._engine.pin(blocks)
        try:
            yield ranges
        except QuiescenceLost:
            raise
        except BaseException:
            self._engine.unpin(blocks)
            raise
        else:
            self._engine.unpin(blocks)

    def freeze(self, handoff_id: str, puller_id: str) -> None:
        """Have a running sequence stop after its step. A prompt has stopped or will anyway.

        Raises:
            HandoffLost, PermissionDenied: see `Holds.find`.
        """
        hold = self.holds.find(handoff_id, puller_id)
        if hold.is_running:
            self._engine.freeze(hold.seq_id)

    async def release(self, handoff_id: str, puller_id: str, generations: Sequence[int]) -> None:
        """See `Holds.release`. A puller may ask while the last digests are being computed."""
        await self._told(handoff_id)
        released = self.holds.release(
            handoff_id, puller_id, generations=generations, current=self._engine.generations
        )
        if released is not None:
            self._end(released)
            log.info("handoff.released", handoff_id=handoff_id, num_blocks=released.num_blocks)

    async def _told(self, handoff_id: str) -> None:
        """Until all that is complete is digested; the blocks are read until then."""
        hold = self.holds.alive(handoff_id)
        while hold is not None and hold.state is HoldState.COMPLETE and hold.num_pulls:
            if hold.is_told:
                return
            await self._kept[hold].changed.wait()

    # Ends

    def close(self) -> None:
        """Stop the timer; holds are lapsed by their sessions."""
        if self._timer is not None:
            self._timer.cancel()

    def lapse_overdue(self) -> None:
        """Give up what nobody came for. Called by the timer."""
        self._timer = None
        for hold in self.holds.lapse_overdue(self._clock.now()):
            log.warning("handoff.unclaimed", handoff_id=hold.handoff_id)
            self._metrics.hold_expirations.inc()
            if hold.seq_id:
                self._end(hold)
            else:
                self._changed(hold)
        self._arm()

    def _end(self, hold: Hold) -> None:
        kept = self._keep(hold)
        self._changed(hold)
        kept.on_end(hold.state)
        self._forget_if_gone(hold)
        self._arm()

    def _keep(self, hold: Hold) -> _Kept:
        kept = self._kept.get(hold)
        if kept is None:
            kept = self._kept[hold] = _Kept(on_end=_nothing, changed=asyncio.Event())
        return kept

    def _forget_if_gone(self, hold: Hold) -> None:
        is_waited_for = hold.is_alive or hold.num_pulls > 0
        if not is_waited_for:
            self._kept.pop(hold, None)

    def _changed(self, hold: Hold) -> None:
        """Wake every pull of this hold."""
        kept = self._kept[hold]
        if hold.is_told and kept.last_word is None:
            kept.last_word = self._last_word(hold)
        kept.changed.set()
        kept.changed = asyncio.Event()
        self._arm()

    def _arm(self) -> None:
        """Have `lapse_overdue` called when the next hold is due, and not before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due_s = self.holds.next_due_s()
        if due_s is not None:
            delay_s = max(0.0, due_s - self._clock.now())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.lapse_overdue)


def _digests(digests: Sequence[int], first: int) -> DigestRun | None:
    return DigestRun(first, tuple(digests[first:])) if first < len(digests) else None


def _nothing(state: HoldState) -> None:
    """Nobody waits for the end of a hold that never began."""
    del state
