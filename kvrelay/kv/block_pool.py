"""Every KV block is free, held or cached; this is the one owner of that fact.

Held blocks have holders, counted. A block whose last holder leaves becomes cached if
the prefix index knows its content, and free otherwise. Cached blocks are given up only
when somebody needs the room, least recently used first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvrelay.errors import KvPoolExhausted
from kvrelay.kv.prefix_index import PrefixIndex
from kvrelay.types import BlockId

_NUM_GENERATIONS = 1 << 32
"""They travel as 32 bits. No handoff lasts until a block comes round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCounts:
    """How many blocks are in each state; they sum to the size of the pool."""

    free: int
    cached: int
    held: int


class Generations(Protocol):
    """Numbers of 32 bits, one for each block, that others may be able to see."""

    def __len__(self) -> int: ...
    def __getitem__(self, block: int, /) -> int: ...
    def __setitem__(self, block: int, generation: int, /) -> None: ...


class BlockPool:
    """Gives blocks out and takes them back. Every operation is all or nothing."""

    def __init__(
        self,
        num_blocks: int,
        index: PrefixIndex,
        generations: Generations | None = None,
    ) -> None:
        """`generations` is where generations are kept, all zero, if others shall see them too."""
        assert num_blocks > 0, num_blocks
        assert generations is None or len(generations) == num_blocks
        self.num_blocks = num_blocks
        self._index = index
        self._num_holders = [0] * num_blocks
        self._generations: Generations = [0] * num_blocks if generations is None else generations
        self._free = [BlockId(i) for i in reversed(range(num_blocks))]  # taken from the end
        self._cached: dict[BlockId, None] = {}  # least recently used first

    @property
    def num_available(self) -> int:
        """How many blocks `allocate` could give now."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> BlockCounts:
        free, cached = len(self._free), len(self._cached)
        return BlockCounts(free=free, cached=cached, held=self.num_blocks - free - cached)

    def num_available_besides(self, blocks: Iterable[BlockId]) -> int:
        """How many blocks `allocate` could give if `blocks` were shared first."""
        return self.num_available - sum(block in self._cached for block in blocks)

    def num_holders(self, block: BlockId) -> int:
        return self._num_holders[block]

    def generation(self, block: BlockId) -> int:
        """Grows each time the block's content is given up, so a stale reference shows."""
        return self._generations[block]

    def allocate(self, num_blocks: int) -> list[BlockId]:
        """Take blocks whose content is nobody's; evicts only as many as are missing.

        Raises:
            KvPoolExhausted: fewer are available; nothing has changed.
        """
        if num_blocks > self.num_available:
            raise KvPoolExhausted(wanted_blocks=num_blocks, free_blocks=self.num_available)
        while len(self._free) < num_blocks:
            self._evict(next(iter(self._cached)))
        blocks = [self._free.pop() for _ in range(num_blocks)]
        for block in blocks:
            self._num_holders[block] = 1
        return blocks

    def share(self, blocks: Sequence[BlockId]) -> None:
        """Add a holder to blocks whose content is wanted as it is."""
        assert all(self._num_holders[b] > 0 or b in self._cached for b in blocks), blocks
        for block in blocks:
            self._cached.pop(block, None)
            self._num_holders[block] += 1

    def release(self, blocks: Sequence[BlockId]) -> None:
        """Remove one holder from each block of a table, given in the table's order."""
        assert all(self._num_holders[block] > 0 for block in blocks), blocks
        # From the end, so that a prefix's tail is evicted before the head it hangs on.
        for block in reversed(blocks):
            self._num_holders[block] -= 1
            if self._num_holders[block] > 0:
                continue
            if block in self._index:
                self._cached[block] = None
            else:
                self._give_up(block)

    def check(self) -> None:
        """Prove that every block is in exactly one state."""
        held = {i for i, count in enumerate(self._num_holders) if count > 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert min(self._num_holders) >= 0, "a block has fewer than no holders"
        assert len(free) + len(cached) + len(held) == self.num_blocks, "a block is lost"
        assert len(free | cached | held) == self.num_blocks, "a block has two states"
        assert all(block in self._index for block in cached), "a cached block cannot be found"
        assert not any(block in self._index for block in free), "a free block can be found"
        self._index.check()

    def _evict(self, block: BlockId) -> None:
        del self._cached[block]
        self._index.forget(block)
        self._give_up(block)

    def _give_up(self, block: BlockId) -> None:
        # Before anybody can get the block: whoever sees the old one has seen the old content.
        self._generations[block] = (self._generations[block] + 1) % _NUM_GENERATIONS
        self._free.append(block)
