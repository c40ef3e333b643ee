"""Brings announced bytes here, and has them measured and put where they are computed with."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack

from decode_svc.area import LandingArea
from decode_svc.under_way import Landing
from kvrelay.clock import Clock
from kvrelay.errors import Incompatible, PeerUnavailable, QuiescenceLost
from kvrelay.handoff.forms import unpacking_for
from kvrelay.kv.cache import KvCache
from kvrelay.obs.metrics import WorkerMetrics
from kvrelay.transfer.base import BlockCopy, PullStats
from kvrelay.transfer.digest import range_digests
from kvrelay.transfer.speeds import LinkSpeeds


class Fetcher:
    """For all landings of one cache. Used from the event loop; the work is done in threads."""

    def __init__(
        self,
        *,
        cache: KvCache,
        area: LandingArea,
        speeds: LinkSpeeds,
        metrics: WorkerMetrics,
        clock: Clock,
        on_lost: Callable[[BaseException], None],
    ) -> None:
        """`on_lost` ends the process: something may still write where a pull was to land."""
        self._on_lost = on_lost
        self._kept_for_ever: list[AsyncExitStack] = []
        self._cache = cache
        self._area = area
        self._speeds = speeds
        self._metrics = metrics
        self._clock = clock

    @property
    def max_batch_bytes(self) -> int:
        """Half of the landing area, so that one batch is fetched while another is measured."""
        return self._area.num_bytes // 2

    async def fetch(self, landing: Landing) -> None:
        """Fetch what is announced, and have it measured while the next batch is fetched."""
        if len(landing.measuring) > 1:
            await asyncio.wait(landing.measuring, return_when=asyncio.FIRST_COMPLETED)
        intake = landing.intake
        batch = intake.next_batch()
        async with AsyncExitStack() as held:
            copies = await self._copies(landing, batch, held)
            stats = await self._pull(landing, copies, held)
            intake.landed(batch)
            landing.landed_s = self._clock.now()
            landing.pull_s += stats.elapsed_s
            self._metrics.observe_pull(num_bytes=stats.num_bytes, elapsed_s=stats.elapsed_s)
            self._speeds.observe(
                landing.hold.worker_id,
                landing.transport.name,
                num_bytes=stats.num_bytes,
                elapsed_s=stats.elapsed_s,
                now_s=landing.landed_s,
            )
            if stats.digests is not None and self._is_where_it_belongs(landing):
                intake.measured(batch, stats.digests)
                return
            # Not in the task: that would wait for its turn behind whatever else goes on.
            taking_in = asyncio.get_running_loop().run_in_executor(
                None, self._take_in, landing, batch, copies
            )
            measuring = asyncio.create_task(
                self._measure(landing, batch, taking_in, held.pop_all())
            )
        landing.measuring.add(measuring)
        measuring.add_done_callback(lambda _: landing.changed.set())

    def _is_where_it_belongs(self, landing: Landing) -> bool:
        """Whether what has landed is what is computed with."""
        return landing.intake.is_as_kept and not self._cache.has_device

    async def _pull(
        self, landing: Landing, copies: Sequence[BlockCopy], held: AsyncExitStack
    ) -> PullStats:
        try:
            return await landing.transport.pull(landing.hold, copies)
        except QuiescenceLost as lost:
            # Now, and not when this has come to the one who waits for it: a cancellation could
            # come first. And nobody may have that memory again.
            landing.is_quiet = False
            self._kept_for_ever.append(held.pop_all())
            self._on_lost(lost)
            raise
        except PeerUnavailable:
            self._speeds.failed(landing.hold.worker_id, landing.transport.name, self._clock.now())
            raise

    async def _copies(
        self, landing: Landing, batch: Sequence[int], held: AsyncExitStack
    ) -> list[BlockCopy]:
        """Where each block goes: to ours if it comes as we keep it, else to the landing area."""
        intake = landing.intake
        num_bytes = intake.wire_layout.block_num_bytes
        if intake.is_as_kept:
            targets = [intake.block_table[index] * num_bytes for index in batch]
        else:
            if num_bytes > self._area.num_bytes:
                raise Incompatible(
                    f"a block comes as {num_bytes} bytes of {intake.wire_layout.dtype}, to be put "
                    f"into another form in the {self._area.num_bytes} that landing_mib leaves"
                )
            start = await held.enter_async_context(self._area.part(len(batch) * num_bytes))
            targets = [start + i * num_bytes for i in range(len(batch))]
        return [
            BlockCopy(
                index=index,
                source_offset=intake.announced[index].offset_bytes,
                target_offset=target,
                num_bytes=num_bytes,
            )
            for index, target in zip(batch, targets, strict=True)
        ]

    async def _measure(
        self,
        landing: Landing,
        batch: Sequence[int],
        taking_in: "asyncio.Future[list[int]]",
        held: AsyncExitStack,
    ) -> None:
        async with held:
            digests = await taking_in
        landing.intake.measured(batch, digests)

    def _take_in(
        self, landing: Landing, batch: Sequence[int], copies: Sequence[BlockCopy]
    ) -> list[int]:
        """Digests of what has landed, and the blocks where they are computed with. For a thread.

        Nobody computes with what the digests do not verify.
        """
        cache, intake = self._cache, landing.intake
        ranges = [(copy.target_offset, copy.num_bytes) for copy in copies]
        digests = range_digests(cache, ranges, landing.digest_kind)
        own, its = cache.layout, intake.wire_layout
        first = max(intake.first_token, batch[0] * its.block_size)
        end = min(intake.num_tokens, (batch[-1] + 1) * its.block_size)
        blocks = intake.block_table[first // own.block_size : own.num_blocks_for(end)]
        if not intake.is_as_kept:
            unpack = unpacking_for(landing.digest_kind)
            unpack(
                cache,
                its,
                [copy.target_offset for copy in copies],
                first_wire_index=batch[0],
                block_table=intake.block_table,
                first_token=first,
                end_token=end,
            )
        if landing.transport.lands_on == "host":
            cache.landed(blocks)
        return digests


async def over(tasks: "set[asyncio.Task[None]]") -> None:
    """Wait until all have ended, cancelled or not: their threads write to blocks that the caller
    may free.
    """
    was_cancelled = False
    while any(not task.done() for task in tasks):
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            was_cancelled = True
    for task in tasks:
        if not task.cancelled():
            task.exception()  # seen: whoever waits here has one of its own
    if was_cancelled:
        raise asyncio.CancelledError
