"""Brings held KV here: tells `Intake` what happened and carries out what follows.

    1. open `Pull` at the holder; the engine is asked for blocks once there are bytes for them
    2. fetch what is announced, batch by batch, while the holder computes on; measure each batch
       while the next is fetched. Bytes that come in another form than we keep are put into our
       blocks by the same hand that measured them
    3. a running sequence is frozen when all it had so far is here, so that little is left
    4. when the last byte is here, the fence says whether the holder's blocks kept their content
       until then: we look where the transport lets us see that, else the holder answers
       `Release`. Meanwhile the last digests are compared
    5. only after both may the sequence join; then the holder is let go, if it was not asked

On any failure, cancellation included, the blocks go back to the engine after the
transport has stopped writing, which its `pull` promises once it has returned or raised.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

import structlog

from decode_svc.convert import HandoffCost
from decode_svc.fetcher import Fetcher, over
from decode_svc.holder import HolderClient
from decode_svc.intake import Expected, Intake, IntakeState
from decode_svc.under_way import Landing, Source
from kvrelay.clock import Clock
from kvrelay.engine.engine import Engine
from kvrelay.engine.request import EngineRequest, Granted
from kvrelay.errors import HandoffLost, KvCorrupt, KvPoolExhausted, ServingError
from kvrelay.kv.cache import KvCache
from kvrelay.obs.metrics import WorkerMetrics
from kvrelay.transfer.base import BlockGeneration, KvTransport
from kvrelay.transfer.build import transport_for
from kvrelay.transfer.digest import handoff_digest

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LandingLimits:
    """What bounds one landing."""

    batch_num_bytes: int
    """Most bytes fetched between two looks at what else has been announced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """KV in place: the tokens that came with it, and what it cost."""

    output_ids: tuple[int, ...]
    """All that the holder had generated."""

    num_tokens: int
    """Whose KV is here."""

    cost: HandoffCost


class Lander:
    """Lands handoffs for one engine. Used from the event loop only."""

    def __init__(
        self,
        *,
        engine: Engine,
        cache: KvCache,
        fetcher: Fetcher,
        transports: Sequence[KvTransport],
        holders: HolderClient,
        limits: LandingLimits,
        metrics: WorkerMetrics,
        clock: Clock,
    ) -> None:
        self._engine = engine
        self._cache = cache
        self._fetcher = fetcher
        self._transports = transports
        self._holders = holders
        self._limits = limits
        self._metrics = metrics
        self._clock = clock
        self._landings: dict[str, Landing] = {}  # by seq_id

    @property
    def num_landing(self) -> int:
        return len(self._landings)

    @property
    def num_waiting_for_blocks(self) -> int:
        """Landings that have bytes to fetch and no room for them."""
        return sum(landing.is_waiting_for_blocks for landing in self._landings.values())

    def granted(self, grant: Granted) -> None:
        """The engine gave blocks. Grants for landings that were given up are ignored."""
        landing = self._landings.get(grant.seq_id)
        if landing is not None:
            landing.intake.granted(grant)
            landing.granted_s = self._clock.now()
            landing.num_cached_tokens = landing.intake.first_token
            self._metrics.grant_wait.observe(landing.grant_wait_s)
            landing.changed.set()

    async def land(
        self, request: EngineRequest, source: Source, on_landed: Callable[[Landed], None]
    ) -> None:
        """Bring the KV of `request` here and let its sequence join.

        `on_landed` is called just before the join; from then on the sequence is the
        engine's, and whoever cancels it releases it there. If it was not called, then on
        any exception but `QuiescenceLost`, cancellation included, the engine has the blocks back.

        Raises:
            HandoffLost: the holder no longer has it, or its hold lapsed meanwhile.
            KvCorrupt: what landed is not what was announced, or is of another request.
            PeerUnavailable: the holder could not be reached or went away.
            Incompatible: there is no transport for this source, or the workers cannot be paired.
            QueueFull, KvPoolExhausted: see `Engine.submit`.
            QuiescenceLost: something may still write to the blocks; the process must end.
        """
        transport, hold = transport_for(self._transports, source.hold)
        source = replace(source, hold=hold)
        self._require_fits(request)
        landing = self._landings[request.seq_id] = self._begin(request, source, transport)
        try:
            async with self._listening(landing):
                landed = await self._bring(landing)
                # Nothing is awaited from the fence to the join.
                on_landed(landed)
                self._engine.join(request.seq_id, landed.output_ids, landed.num_tokens)
                landing.intake.joined()
                await _let_others_run()
                self._log(landing, landed.cost)
                await self._let_go(landing)
        except KvCorrupt as error:
            if landing.lost not in (None, error):
                raise landing.lost from error  # it lapsed: the bytes may well be another's
            await self._require_held(landing)
            self._metrics.kv_corrupt.inc()
            raise
        finally:
            del self._landings[request.seq_id]
            if landing.intake.state is not IntakeState.JOINED:
                landing.intake.failed()
                if landing.is_submitted and landing.is_quiet:
                    self._engine.release(request.seq_id)

    def _begin(self, request: EngineRequest, source: Source, transport: KvTransport) -> Landing:
        expected = Expected(
            num_prompt=len(request.prompt_ids),
            emitted_ids=request.output_ids,
            is_running=source.is_running,
            limit_tokens=request.landing_tokens,
            layout=self._cache.layout,
            wire_dtype=self._holders.wire_dtype(is_running=source.is_running),
        )
        intake = Intake(
            source.hold.handoff_id,
            expected,
            max_batch_bytes=min(self._limits.batch_num_bytes, self._fetcher.max_batch_bytes),
        )
        return Landing(request, source, transport, intake)

    def _require_fits(self, request: EngineRequest) -> None:
        """Refuse at once what the engine would refuse when the first bytes are ready."""
        num_tokens = len(request.prompt_ids) + request.stop.max_tokens - 1
        wanted = self._cache.layout.num_blocks_for(num_tokens)
        if wanted > self._cache.num_blocks:
            raise KvPoolExhausted(wanted_blocks=wanted, free_blocks=self._cache.num_blocks)

    # The holder

    @asynccontextmanager
    async def _listening(self, landing: Landing) -> AsyncIterator[None]:
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

    async def _listen(self, landing: Landing) -> None:
        announcements = self._holders.announcements(
            landing.hold,
            digest_kind=landing.digest_kind,
            is_running=landing.source.is_running,
            limit_tokens=landing.request.landing_tokens,
        )
        async with aclosing(announcements):
            async for announcement in announcements:
                landing.intake.heard(announcement)
                self._note(landing)
                landing.changed.set()
        landing.intake.require_complete()

    def _note(self, landing: Landing) -> None:
        intake = landing.intake
        if landing.first_announced_s is None and intake.announced:
            landing.first_announced_s = self._clock.now()
        if landing.announced_s is None and intake.is_announced:
            landing.announced_s = self._clock.now()
            landing.num_overlapped_bytes = intake.num_landed_bytes

    async def _require_held(self, landing: Landing) -> None:
        """Raise HandoffLost if the holder has taken its blocks back without our having heard: then
        what we read may well be another's, and is nobody's corruption.
        """
        if landing.is_released:
            return  # it was held until then
        try:
            await self._holders.freeze(landing.hold)
        except HandoffLost:
            raise
        except ServingError as error:
            log.info("handoff.not_frozen", reason=error.reason)

    # The bytes

    async def _bring(self, landing: Landing) -> Landed:
        """Until every byte is here, verified and behind the fence."""
        try:
            await self._fetch(landing)
            is_fenced = self._is_fenced(landing)
            releasing = None if is_fenced else asyncio.create_task(self._release(landing))
            try:
                verified_s = await self._verified(landing, releasing)
                if releasing is not None:
                    await releasing
            finally:
                if releasing is not None:
                    releasing.cancel()
                    await asyncio.gather(releasing, return_exceptions=True)
        finally:
            await over(landing.measuring)
        return self._landed(landing, verified_s=verified_s)

    def _is_fenced(self, landing: Landing) -> bool:
        """Whether we have seen for ourselves that the holder's blocks were the same until all
        was here. If not, the holder has to say so. A sequence that moves changes hands, and
        that takes its holder's word in any case.

        Raises:
            HandoffLost: they were not.
        """
        if landing.source.is_running:
            return False
        blocks = [
            BlockGeneration(block.block_id, block.generation) for block in landing.intake.announced
        ]
        is_same = landing.transport.still(landing.hold, blocks)
        if is_same is False:
            raise HandoffLost(
                f"handoff {landing.hold.handoff_id}: blocks were reused while they were read",
                handoff_id=landing.hold.handoff_id,
            )
        return is_same is True

    async def _release(self, landing: Landing) -> None:
        await self._holders.release(landing.hold, landing.intake.generations)
        landing.is_released = True

    async def _let_go(self, landing: Landing) -> None:
        """Tell the holder that we have everything, if it was not asked before. If it does not
        hear that, it takes its blocks back when the request ends.
        """
        if landing.is_released:
            return
        try:
            await self._release(landing)
        except ServingError as error:
            log.info(
                "handoff.not_released", handoff_id=landing.hold.handoff_id, reason=error.reason
            )

    async def _fetch(self, landing: Landing) -> None:
        """Until every block has landed."""
        intake = landing.intake
        while intake.state not in (IntakeState.LANDED, IntakeState.VERIFIED):
            landing.changed.clear()
            landing.require_holder()
            self._require_measured(landing)
            self._require_room_in_time(landing)
            if intake.wants_grant and not landing.is_submitted:
                self._engine.submit(landing.request)
                landing.is_submitted = True
            if intake.has_batch:
                await self._fetcher.fetch(landing)
            elif self._is_time_to_freeze(landing):
                landing.is_freezing = True
                await self._holders.freeze(landing.hold)
            else:
                await landing.changed.wait()
        landing.landed_s = max(landing.landed_s, landing.announced_s or 0.0)

    def _require_room_in_time(self, landing: Landing) -> None:
        """Raise HandoffLost if a running sequence has stopped because it reached the limit that we
        set, and there is still no room for it here: it can go on where it is.
        """
        intake = landing.intake
        if landing.source.is_running and intake.completion is not None and intake.wants_grant:
            raise HandoffLost(
                f"no blocks here for {intake.completion.num_tokens} tokens in time",
                handoff_id=landing.hold.handoff_id,
            )

    def _is_time_to_freeze(self, landing: Landing) -> bool:
        intake = landing.intake
        return (
            landing.source.is_running
            and not landing.is_freezing
            and intake.state is IntakeState.GRANTED
        )

    def _require_measured(self, landing: Landing) -> None:
        """Raises what a measurement has found wrong so far."""
        for task in [task for task in landing.measuring if task.done()]:
            landing.measuring.discard(task)
            task.result()

    # The end

    async def _verified(self, landing: Landing, releasing: "asyncio.Task[None] | None") -> float:
        """Wait until all that landed is what was announced, for our request; when it was.

        Bytes of a hold that lapsed may be another's: then that is what happened to them.
        """
        try:
            while landing.intake.state is not IntakeState.VERIFIED:
                landing.changed.clear()
                landing.require_holder()
                self._require_measured(landing)
                if self._is_measured(landing):
                    landing.intake.verify_handoff(self._handoff_digest(landing))
                else:
                    await landing.changed.wait()
        except KvCorrupt:
            if releasing is not None:
                await _unless_lapsed(releasing)
            raise
        return self._clock.now()

    def _is_measured(self, landing: Landing) -> bool:
        return landing.intake.completion is not None and not landing.measuring

    def _landed(self, landing: Landing, *, verified_s: float) -> Landed:
        intake = landing.intake
        assert intake.completion is not None
        assert landing.announced_s is not None
        # Blocks and bytes that came before the last announcement held up nobody.
        begun_s = max(landing.announced_s, landing.granted_s or 0.0)
        cost = HandoffCost(
            grant_wait_s=begun_s - landing.announced_s,
            transfer_s=max(0.0, landing.landed_s - begun_s),
            verify_s=max(0.0, verified_s - landing.landed_s),
            release_s=self._clock.now() - verified_s,
            num_bytes=intake.num_landed_bytes,
            overlapped_num_bytes=landing.num_overlapped_bytes,
            transport=landing.transport.name,
            cached_prompt_tokens=landing.num_cached_tokens,
        )
        return Landed(
            output_ids=intake.completion.output_ids,
            num_tokens=intake.completion.num_tokens,
            cost=cost,
        )

    def _log(self, landing: Landing, cost: HandoffCost) -> None:
        log.info(
            "handoff.landed",
            handoff_id=landing.hold.handoff_id,
            num_blocks=landing.intake.num_landed,
            num_bytes=cost.num_bytes,
            overlapped_num_bytes=cost.overlapped_num_bytes,
            transport=cost.transport,
            wire=landing.intake.wire_layout.dtype,
            pull_s=round(landing.pull_s, 6),
        )

    def _handoff_digest(self, landing: Landing) -> bytes:
        """What the holder must have said if it computed our request. Its blocks' digests are
        those it announced; blocks that we had cached are our own, and were not moved.
        """
        completion = landing.intake.completion
        assert completion is not None
        return handoff_digest(
            handoff_id=landing.hold.handoff_id,
            num_tokens=completion.num_tokens,
            prompt_ids=landing.request.prompt_ids,
            output_ids=completion.output_ids,
            block_digests=landing.intake.digests,
        )


async def _let_others_run() -> None:
    """Let the engine's thread have the interpreter, which it needs for the step that a caller waits
    for: this one sleeps until a third thread had a turn as well.
    """
    await asyncio.get_running_loop().run_in_executor(None, _nothing)


def _nothing() -> None:
    """All that matters is who is woken for it."""


async def _unless_lapsed(releasing: "asyncio.Task[None]") -> None:
    """Raise HandoffLost if that is the holder's answer; any other says nothing about the bytes."""
    try:
        await releasing
    except HandoffLost:
        raise
    except ServingError as error:
        log.info("handoff.not_released", reason=error.reason)
