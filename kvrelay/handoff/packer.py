"""Puts a holder's blocks where they travel from: the side of the cache, and the form."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from kvrelay.handoff.forms import packing_for
from kvrelay.handoff.holds import AnnouncedBlock, PullTerms
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.kv.staging import StagingPlan
from kvrelay.transfer.digest import DigestKind
from kvrelay.transfer.side_thread import ended, raise_if_cancelled
from kvrelay.types import BlockId

TIMEOUT_S = 30.0
"""Packing takes milliseconds; a machine that is so far behind has other troubles."""


class Packer:
    """One cache's. Used from the event loop; the work is done in a thread."""

    def __init__(self, cache: KvCache, staging: StagingPlan) -> None:
        self.turn = asyncio.Lock()
        """To be held over `pack`, and over the announcement of what was packed."""

        self._cache = cache
        self._staging = staging
        self._packed: dict[tuple[str, DigestKind], dict[BlockId, int]] = {}
        """Generations of the blocks that lie there, by what they were packed to and where."""

    def wire_layout(self, terms: PullTerms) -> KvLayout:
        """In which form blocks are moved on these terms: ours where we cannot pack to theirs."""
        own = self._cache.layout
        if self._staging.can_pack_to(terms.wire_dtype):
            return replace(own, dtype=terms.wire_dtype)
        return own

    def offset(self, block: BlockId, layout: KvLayout) -> int:
        """Where a block lies in our memory when it travels in that form."""
        own = self._cache.layout
        if layout == own:
            return block * own.block_num_bytes
        return self._staging.offset(block, layout.dtype)

    async def pack(
        self,
        blocks: Sequence[AnnouncedBlock],
        layout: KvLayout,
        kind: DigestKind,
        *,
        may_grow: bool,
    ) -> None:
        """Have blocks lie where they travel from. What does already is left alone: another puller
        may be reading it. But for blocks that may have grown since.

        Their step is over, so a device has written what it was to write.
        """
        if self._is_there(layout, kind):
            return
        there = self._packed.setdefault((layout.dtype, kind), {})
        missing = [
            block for block in blocks if may_grow or there.get(block.block_id) != block.generation
        ]
        if not missing:
            return
        ids = [block.block_id for block in missing]
        for block_id in ids:
            there.pop(block_id, None)
        offsets = [self.offset(block_id, layout) for block_id in ids]
        packing = asyncio.get_running_loop().run_in_executor(
            None, self._put, ids, layout, kind, offsets
        )
        # Whoever is cancelled waits all the same: the next to pack may have the same blocks.
        await ended(packing, within_s=TIMEOUT_S)
        raise_if_cancelled()
        packing.result()
        if not may_grow:
            there.update((block.block_id, block.generation) for block in missing)

    def _is_there(self, layout: KvLayout, kind: DigestKind) -> bool:
        """Whether blocks travel as they are, from where they are computed with."""
        is_on_its_side = kind is not DigestKind.XXH3 or not self._cache.has_device
        return layout == self._cache.layout and is_on_its_side

    def _put(
        self,
        blocks: Sequence[BlockId],
        layout: KvLayout,
        kind: DigestKind,
        offsets: Sequence[int],
    ) -> None:
        """For a thread."""
        if kind is DigestKind.XXH3:
            self._cache.to_host(blocks)
        if layout != self._cache.layout:
            packing_for(kind)(self._cache, blocks, layout, offsets)
