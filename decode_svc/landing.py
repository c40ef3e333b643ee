"""Brings a held prompt's KV here: tells `Intake` what happened and carries out what follows.

    1. open `Pull` at the holder; the engine is asked for blocks once there are bytes for them
    2. fetch what is announced, batch by batch, while the holder computes on; digest each batch
    3. when the holder has completed: check what binds the bytes to the prompt, `Release`
    4. only after its OK may the sequence join

On any failure, cancellation included, the blocks go back to the engine after the
transport has stopped writing, which its `pull` promises once it has returned or raised.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field

import structlog

from decode_svc.convert import HandoffCost
from decode_svc.holder import HolderClient
from decode_svc.intake import Intake, IntakeState
from kvrelay.clock import Clock
from kvrelay.engine.engine import Engine
from kvrelay.engine.request import EngineRequest, Granted
from kvrelay.errors import KvCorrupt, KvPoolExhausted, ServingError
from kvrelay.kv.cache import KvCache
from kvrelay.obs.metrics import WorkerMetrics
from kvrelay.transfer.base import BlockCopy, KvTransport, RemoteHold
from kvrelay.transfer.build import transport_for
from kvrelay.transfer.digest import block_digests, handoff_digest
from kvrelay.types import BlockId

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LandingLimits:
    """What bounds one landing."""

    batch_num_bytes: int
    """Most bytes fetched between two looks at what else has been announced."""


@dataclass(slots=True, eq=False)
class _Landing:
    """One handoff under way."""

    request: EngineRequest
    source: RemoteHold
    intake: Intake
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listener: "asyncio.Task[None] | None" = None
    """Hears the holder; it ends by itself when the hold does, or something went wrong."""

    is_submitted: bool = False
    """Whether the engine knows the sequence, so that somebody must release it."""

    num_cached_tokens: int = 0
    completed_s: float = 0.0
    landed_s: float = 0.0
    num_overlapped: int = 0
    """Blocks that had landed when the holder completed."""

    pull_s: float = 0.0

    @property
    def lost(self) -> BaseException | None:
        """Why the holder is heard no more, if not for a good end."""
        if self.listener is None or not self.listener.done() or self.listener.cancelled():
            return None
        return self.listener.exception()

    def require_holder(self) -> None:
        """Raises whatever ended the listener, our own bugs included."""
        if self.lost is not None:
            raise self.lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """KV in place: the first token that came with it, and what it cost."""

    first_token_id: int
    cost: HandoffCost


class Lander:
    """Lands handoffs for one engine. Used from the event loop only."""

    def __init__(
        self,
        *,
        engine: Engine,
        cache: KvCache,
        transports: Sequence[KvTransport],
        holders: HolderClient,
        limits: LandingLimits,
        metrics: WorkerMetrics,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._transports = transports
        self._holders = holders
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._landings: dict[str, _Landing] = {}  # by seq_id

    @property
    def num_landing(self) -> int:
        return len(self._landings)

    def granted(self, grant: Granted) -> None:
        """The engine gave blocks. Grants for landings that were given up are ignored."""
        landing = self._landings.get(grant.seq_id)
        if landing is not None:
            landing.intake.granted(grant)
            landing.num_cached_tokens = grant.num_cached_blocks * self._cache.layout.block_size
            landing.changed.set()

    async def land(
        self, request: EngineRequest, source: RemoteHold, on_landed: Callable[[Landed], None]
    ) -> None:
        """Bring the KV of `request` here and let its sequence join.

        `on_landed` is called just before the join; from then on the sequence is the
        engine's, and whoever cancels it releases it there. If it was not called, then on
        any exception, cancellation included, the engine has the blocks back.

        Raises:
            HandoffLost: the holder no longer has it, or its hold lapsed meanwhile.
            KvCorrupt: what landed is not what was announced, or is of another prompt.
            PeerUnavailable: the holder could not be reached or went away.
            Incompatible: there is no transport for this source, or fingerprints differ.
            QueueFull, KvPoolExhausted: see `Engine.submit`.
        """
        transport = transport_for(self._transports, source.offer)
        self._require_fits(request)
        landing = self._landings[request.seq_id] = self._begin(request, source)
        try:
            async with self._listening(landing):
                await self._fetch(landing, transport)
                landed = await self._release(landing, transport.name)
                # Nothing is awaited from the holder's word to the join.
                on_landed(landed)
                self._engine.join(request.seq_id, (landed.first_token_id,))
                landing.intake.joined()
        except KvCorrupt as error:
            if landing.lost not in (None, error):
                raise landing.lost from error  # it lapsed: the bytes may well be another's
            self._metrics.kv_corrupt.inc()
            raise
        finally:
            del self._landings[request.seq_id]
            if landing.intake.state is not IntakeState.JOINED:
                landing.intake.failed()
                if landing.is_submitted:
                    self._engine.release(request.seq_id)

    def _begin(self, request: EngineRequest, source: RemoteHold) -> _Landing:
        layout = self._cache.layout
        num_tokens = len(request.prompt_ids)
        intake = Intake(
            source.handoff_id,
            num_tokens=num_tokens,
            num_blocks=layout.num_blocks_for(num_tokens),
            max_batch=max(1, self._limits.batch_num_bytes // layout.block_num_bytes),
        )
        return _Landing(request, source, intake)

    def _require_fits(self, request: EngineRequest) -> None:
        """Refuse at once what the engine would refuse when the first bytes are ready."""
        num_tokens = len(request.prompt_ids) + request.stop.max_tokens - 1
        wanted = self._cache.layout.num_blocks_for(num_tokens)
        if wanted > self._cache.num_blocks:
            raise KvPoolExhausted(wanted_blocks=wanted, free_blocks=self._cache.num_blocks)

    @asynccontextmanager
    async def _listening(self, landing: _Landing) -> AsyncIterator[None]:
        """Hear the holder's announcements meanwhile. Listening tells it that we live."""
        listener = landing.listener = asyncio.create_task(self._listen(landing))
        listener.add_done_callback(lambda _: landing.changed.set())
        try:
            yield
        finally:
            listener.cancel()
            await asyncio.gather(listener, return_exceptions=True)
            # A holder lost after its last word takes nothing back; a bug of ours always shows.
            if not isinstance(landing.lost, ServingError):
                landing.require_holder()

    async def _listen(self, landing: _Landing) -> None:
        async with aclosing(self._holders.announcements(landing.source)) as announcements:
            async for announcement in announcements:
                landing.intake.heard(announcement)
                self._note_completion(landing)
                landing.changed.set()
        landing.intake.require_complete()

    def _note_completion(self, landing: _Landing) -> None:
        if landing.intake.completion is not None:
            landing.completed_s = self._clock.now()
            landing.num_overlapped = landing.intake.num_landed

    async def _fetch(self, landing: _Landing, transport: KvTransport) -> None:
        """Until every block has landed and every byte is verified."""
        intake = landing.intake
        while intake.state is not IntakeState.VERIFYING:
            landing.changed.clear()
            landing.require_holder()
            if intake.wants_grant and not landing.is_submitted:
                self._engine.submit(landing.request)
                landing.is_submitted = True
            if batch := intake.next_batch():
                await self._fetch_batch(landing, transport, batch)
            else:
                await landing.changed.wait()
        landing.landed_s = max(landing.landed_s, landing.completed_s)
        intake.verify_handoff(self._handoff_digest(landing))

    async def _fetch_batch(
        self, landing: _Landing, transport: KvTransport, batch: Sequence[BlockCopy]
    ) -> None:
        stats = await transport.pull(landing.source, batch)
        self._metrics.observe_pull(num_bytes=stats.num_bytes, elapsed_s=stats.elapsed_s)
        landing.pull_s += stats.elapsed_s
        landing.intake.landed(batch)
        landing.landed_s = self._clock.now()
        digests = await _taken_in(self._cache, [copy.target for copy in batch])
        landing.intake.verify(batch, digests)

    async def _release(self, landing: _Landing, transport: str) -> Landed:
        """The fence. Bytes that landed before it are usable only after it."""
        intake, source = landing.intake, landing.source
        verified_s = self._clock.now()
        await self._holders.release(source, intake.generations)
        block_num_bytes = self._cache.layout.block_num_bytes
        cost = HandoffCost(
            transfer_s=landing.landed_s - landing.completed_s,
            verify_s=verified_s - landing.landed_s,
            release_s=self._clock.now() - verified_s,
            num_bytes=intake.num_landed * block_num_bytes,
            overlapped_num_bytes=landing.num_overlapped * block_num_bytes,
            transport=transport,
            cached_prompt_tokens=landing.num_cached_tokens,
        )
        assert intake.completion is not None
        log.info(
            "handoff.landed",
            handoff_id=source.handoff_id,
            num_blocks=intake.num_landed,
            num_bytes=cost.num_bytes,
            overlapped_num_bytes=cost.overlapped_num_bytes,
            transport=transport,
            pull_s=round(landing.pull_s, 6),
        )
        return Landed(first_token_id=intake.completion.first_token_id, cost=cost)

    def _handoff_digest(self, landing: _Landing) -> bytes:
        """What the holder must have said if it computed our prompt. Its blocks' digests are
        those it announced; blocks that we had cached are our own, and were not moved.
        """
        completion = landing.intake.completion
        assert completion is not None
        return handoff_digest(
            handoff_id=landing.source.handoff_id,
            num_tokens=len(landing.request.prompt_ids),
            first_token_id=completion.first_token_id,
            prompt_ids=landing.request.prompt_ids,
            block_digests=landing.intake.digests,
        )


def _take_in(cache: KvCache, blocks: Sequence[BlockId]) -> list[int]:
    """Digests of blocks that have landed, and the blocks where they are computed with.

    As with the pull itself: nobody computes with what the digests do not verify.
    """
    digests = block_digests(cache, blocks)
    cache.landed(blocks)
    return digests


async def _taken_in(cache: KvCache, blocks: Sequence[BlockId]) -> list[int]:
    """As `_take_in`, in a thread, and over on return, cancelled or not: the thread writes to
    blocks that the caller may free.
    """
    taking = asyncio.create_task(asyncio.to_thread(_take_in, cache, blocks))
    try:
        return await asyncio.shield(taking)
    except asyncio.CancelledError:
        while not taking.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([taking])
        raise
