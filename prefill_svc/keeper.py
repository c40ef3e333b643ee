"""Keeps KV until it was pulled: tells `Holds` what happened, carries out what follows from it.

    1. a submit begins a hold, each chunk advances it, the first token completes it
    2. whoever pulls is told of finished blocks as they come, each with its digest
    3. `Release` ends the hold if it never lapsed; the blocks go back to the engine
    4. a cancel, a lost session or time passing lapses it; the blocks go back as well

A puller that maps our memory may still be copying a block when its hold lapses and the
engine reuses the block. That is safe, and needs no quarantine here: we never write for
somebody else, and the puller's `Release` will be refused, so the copy is dropped.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import structlog

from kvrelay.clock import Clock
from kvrelay.engine.engine import Engine
from kvrelay.engine.request import ChunkDone
from kvrelay.errors import HandoffLost, InvalidRequest
from kvrelay.kv.cache import KvCache
from kvrelay.obs.metrics import WorkerMetrics
from kvrelay.transfer.digest import block_digests, handoff_digest
from kvrelay.transfer.stream import read_frames
from prefill_svc.holds import AnnouncedBlock, Hold, HoldLimits, Holds, HoldState

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Opened:
    """The hold exists, and how large it will be."""

    num_tokens: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class BlockRun:
    """More blocks are ready; runs follow each other without a gap."""

    first_index: int
    blocks: tuple[AnnouncedBlock, ...]


@dataclass(frozen=True, slots=True)
class Completed:
    """Everything is ready. The digest binds the blocks to the prompt."""

    first_token_id: int
    num_tokens: int
    digest: bytes


Announcement = Opened | BlockRun | Completed


@dataclass(frozen=True, slots=True)
class Frame:
    """Bytes of the block with that index in the handoff."""

    index: int
    offset_bytes: int
    data: bytes


@dataclass(slots=True)
class _Kept:
    """What a hold needs here besides its policy."""

    on_end: Callable[[], None]
    changed: asyncio.Event
    announcing: asyncio.Lock


class HoldKeeper:
    """Owns the holds of this worker, and with them the engine's held sequences.

    A sequence with a hold is released to the engine here and nowhere else, exactly once.
    Used from the event loop only.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        cache: KvCache,
        limits: HoldLimits,
        metrics: WorkerMetrics,
        clock: Clock,
    ) -> None:
        self.holds = Holds(block_size=cache.layout.block_size, limits=limits)
        self.cache = cache
        self.limits = limits
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
        on_end: Callable[[], None],
    ) -> Hold:
        """See `Holds.begin`. `on_end` is called once, when nothing is held any more."""
        hold = self.holds.begin(
            handoff_id, puller_id=puller_id, seq_id=seq_id, prompt_ids=prompt_ids
        )
        self._keep(hold).on_end = on_end
        self._changed(hold)
        return hold

    def advance(self, hold: Hold, chunk: ChunkDone) -> None:
        if hold.state is HoldState.COMPUTING:
            self.holds.advance(hold, chunk.block_table, chunk.num_computed)
            self._changed(hold)

    def complete(self, hold: Hold, first_token_id: int) -> None:
        self.holds.complete(hold, first_token_id, self._clock.now())
        self._changed(hold)

    def finish(self, hold: Hold) -> None:
        """The first token was the last: hold nothing."""
        self.holds.finish(hold)
        self._give_back(hold)

    def lapse(self, hold: Hold) -> None:
        """Nobody wants it any more. Ended holds are left as they are."""
        if hold.is_alive:
            self.holds.lapse(hold)
            self._give_back(hold)

    # For the puller

    async def announcements(
        self, handoff_id: str, puller_id: str
    ) -> AsyncGenerator[Announcement, None]:
        """What a puller is told, then silence until the hold ends.

        The stream is how we see that the puller still lives: it stays open after its last
        message, until the hold was released.

        Raises:
            HandoffLost: the hold lapsed, or never began in time.
            PermissionDenied, QueueFull: see `Holds.connect`.
        """
        hold = self.holds.connect(handoff_id, puller_id, self._clock.now())
        kept = self._keep(hold)
        try:
            self._arm()
            while hold.state is HoldState.EXPECTED:
                await kept.changed.wait()
            if hold.state is not HoldState.FINISHED:
                hold.require_alive()
            hold.require_puller(puller_id)
            yield Opened(hold.num_tokens, hold.num_blocks)
            async with aclosing(self._progress(hold, kept)) as events:
                async for event in events:
                    yield event
        finally:
            self.holds.disconnect(hold, self._clock.now())
            self._forget_if_gone(hold)
            self._arm()

    async def _progress(self, hold: Hold, kept: _Kept) -> AsyncGenerator[Announcement, None]:
        num_sent = 0
        is_complete_sent = False
        while hold.state is not HoldState.RELEASED:
            if hold.state is HoldState.FINISHED:
                await self._outlast_finish(hold)
            hold.require_alive()
            changed = kept.changed
            if hold.ready_unannounced:
                await self._announce(hold, kept)
            elif num_sent < len(hold.announced):
                first, num_sent = num_sent, len(hold.announced)
                yield BlockRun(first, tuple(hold.announced[first:]))
            elif hold.state is HoldState.COMPLETE and not is_complete_sent:
                is_complete_sent = True
                yield self._completion_of(hold)
            else:
                await changed.wait()

    async def _announce(self, hold: Hold, kept: _Kept) -> None:
        """Digest what is ready, in a thread; pulls of one hold share the work."""
        async with kept.announcing:
            hold.require_alive()
            start, blocks = len(hold.announced), hold.ready_unannounced
            if not blocks:
                return
            generations = [self._engine.generation(block) for block in blocks]
            digests = await asyncio.to_thread(block_digests, self.cache, blocks)
            # The hold may have lapsed meanwhile; then these are digests of anything.
            hold.require_alive()
            assert start == len(hold.announced)
            self.holds.announce(
                hold, [AnnouncedBlock(*b) for b in zip(blocks, generations, digests, strict=True)]
            )
        self._changed(hold)

    def _completion_of(self, hold: Hold) -> Completed:
        assert hold.first_token_id is not None
        digest = handoff_digest(
            handoff_id=hold.handoff_id,
            num_tokens=len(hold.prompt_ids),
            first_token_id=hold.first_token_id,
            prompt_ids=hold.prompt_ids,
            block_digests=[block.digest for block in hold.announced],
        )
        return Completed(hold.first_token_id, hold.num_tokens, digest)

    async def _outlast_finish(self, hold: Hold) -> None:
        """Give the coordinator time to call the puller off, then refuse."""
        try:
            async with asyncio.timeout(self.limits.unclaimed_hold_s):
                await asyncio.Event().wait()
        except TimeoutError:
            raise HandoffLost(
                f"handoff {hold.handoff_id} finished with its first token",
                handoff_id=hold.handoff_id,
            ) from None

    def frames(self, handoff_id: str, puller_id: str, indexes: Sequence[int]) -> Iterator[Frame]:
        """The bytes of announced blocks. The hold is looked at after each frame was copied,
        so no byte leaves that was read when the hold had lapsed.
        """
        hold = self.holds.find(handoff_id, puller_id)
        for index in indexes:
            hold.require_alive()
            if index >= len(hold.announced):
                raise InvalidRequest(
                    "indexes", f"{index} is not announced, {len(hold.announced)} blocks are"
                )
            for offset, data in read_frames(self.cache, hold.announced[index].block_id):
                hold.require_alive()
                yield Frame(index, offset, data)

    def release(self, handoff_id: str, puller_id: str, generations: Sequence[int]) -> None:
        """See `Holds.release`."""
        released = self.holds.release(
            handoff_id, puller_id, generations=generations, current=self._engine.generation
        )
        if released is not None:
            self._give_back(released)
            log.info("handoff.released", handoff_id=handoff_id, num_blocks=released.num_blocks)

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
                self._give_back(hold)
            else:
                self._changed(hold)
        self._arm()

    def _give_back(self, hold: Hold) -> None:
        kept = self._keep(hold)
        self._engine.release(hold.seq_id)
        self._changed(hold)
        kept.on_end()
        self._forget_if_gone(hold)
        self._arm()

    def _keep(self, hold: Hold) -> _Kept:
        kept = self._kept.get(hold)
        if kept is None:
            kept = self._kept[hold] = _Kept(
                on_end=_nothing, changed=asyncio.Event(), announcing=asyncio.Lock()
            )
        return kept

    def _forget_if_gone(self, hold: Hold) -> None:
        is_waited_for = hold.is_alive or hold.num_pulls > 0
        if not is_waited_for:
            self._kept.pop(hold, None)

    def _changed(self, hold: Hold) -> None:
        """Wake every pull of this hold."""
        kept = self._kept[hold]
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


def _nothing() -> None:
    """Nobody waits for the end of a hold that never began."""
