"""What each worker's prefix index probably holds, from what was placed on it. Pure.

A guess that only routing relies on: a wrong one costs time, never a token. Prefixes are told apart
in blocks of one size for the whole pool. When that size changes, what was noted before matches no
more, and is forgotten in time.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class PrefixMap:
    """Bounded per worker; the least recently used are forgotten first."""

    def __init__(self, *, max_blocks_per_worker: int) -> None:
        self._max_blocks = max_blocks_per_worker
        self._hashes: dict[str, OrderedDict[bytes, None]] = {}

    def add(self, worker_id: str, block_hashes: Iterable[bytes]) -> None:
        """Note that a worker computes, or has pulled, these blocks."""
        seen = self._hashes.setdefault(worker_id, OrderedDict())
        for block_hash in block_hashes:
            seen[block_hash] = None
            seen.move_to_end(block_hash)
        while len(seen) > self._max_blocks:
            seen.popitem(last=False)

    def match(self, worker_id: str, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks that the worker probably has."""
        seen = self._hashes.get(worker_id)
        if not seen:
            return 0
        for i, block_hash in enumerate(block_hashes):
            if block_hash not in seen:
                return i
        return len(block_hashes)

    def forget(self, worker_id: str) -> None:
        """A worker that left, or started anew, has nothing."""
        self._hashes.pop(worker_id, None)
