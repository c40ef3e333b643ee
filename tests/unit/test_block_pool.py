"""The block pool: who has a block, and what happens when the last one leaves."""

import pytest

from kvrelay.errors import KvPoolExhausted
from kvrelay.kv.block_pool import BlockCounts, BlockPool
from kvrelay.kv.prefix_index import PrefixIndex
from kvrelay.types import BlockId
from tests.support.builders import index, prompt


def _pool(num_blocks: int) -> tuple[BlockPool, PrefixIndex]:
    known = index(block_size=4)
    return BlockPool(num_blocks, known), known


def _cached(pool: BlockPool, known: PrefixIndex, num_blocks: int, *, variant: int = 0):
    """A released prompt whose blocks the index knows."""
    blocks = pool.allocate(num_blocks)
    keys = known.keys(prompt(4 * num_blocks, variant=variant), b"")
    for key, block in zip(keys, blocks, strict=True):
        known.insert(key, block)
    pool.release(blocks)
    return blocks


def test_allocation_is_all_or_nothing():
    """
    Asking for more than is available raises with both numbers and takes nothing.
    """
    pool, _ = _pool(3)
    pool.allocate(1)

    with pytest.raises(KvPoolExhausted, match="3 KV blocks wanted, 2 free"):
        pool.allocate(3)

    assert pool.counts == BlockCounts(free=2, cached=0, held=1)
    pool.check()


def test_an_unindexed_block_is_free_after_its_last_holder():
    """
    A shared block outlives its first holder; its generation grows when the last one leaves.
    """
    pool, _ = _pool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)

    pool.release(blocks)
    assert pool.counts.held == 1
    assert pool.generation(blocks[0]) == 0

    pool.release(blocks)
    assert pool.counts == BlockCounts(free=2, cached=0, held=0)
    assert pool.generation(blocks[0]) == 1
    pool.check()


def test_an_indexed_block_is_cached_and_can_be_shared_again():
    """
    Its content is kept, so its generation stays.
    """
    pool, known = _pool(4)
    blocks = _cached(pool, known, 2)
    assert pool.counts == BlockCounts(free=2, cached=2, held=0)

    pool.share(blocks)

    assert pool.counts == BlockCounts(free=2, cached=0, held=2)
    assert [pool.generation(block) for block in blocks] == [0, 0]
    pool.check()


def test_eviction_waits_until_free_blocks_are_used_up():
    """
    Only as many cached blocks go as are missing.
    """
    pool, known = _pool(4)
    _cached(pool, known, 3)

    pool.allocate(1)
    assert pool.counts == BlockCounts(free=0, cached=3, held=1)

    pool.allocate(1)
    assert pool.counts == BlockCounts(free=0, cached=2, held=2)
    pool.check()


def test_the_least_recently_used_prefix_is_evicted_first_from_its_tail():
    """
    Within a prefix the tail goes first, since a tail without its head is of no use.
    """
    pool, known = _pool(4)
    older = _cached(pool, known, 2, variant=1)
    newer = _cached(pool, known, 2, variant=2)
    pool.share(older)
    pool.release(older)  # used again, so `newer` is the least recently used now

    taken = pool.allocate(3)

    assert set(taken) == {*newer, older[1]}
    assert older[0] in known
    assert older[1] not in known
    pool.check()


def test_generations_grow_on_eviction():
    """
    A stale reference to an evicted block can be told from a good one.
    """
    pool, known = _pool(1)
    (block,) = _cached(pool, known, 1)

    assert pool.allocate(1) == [block]
    assert pool.generation(block) == 1


def test_blocks_about_to_be_shared_do_not_count_as_room():
    """
    A cached hit cannot both be shared and be evicted for the rest of the same prompt.
    """
    pool, known = _pool(3)
    blocks = _cached(pool, known, 2)

    assert pool.num_available == 3
    assert pool.num_available_besides(blocks) == 1


def test_releasing_what_nobody_holds_is_a_bug():
    """
    A double release is found at once.
    """
    pool, _ = _pool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)

    with pytest.raises(AssertionError):
        pool.release(blocks)
    with pytest.raises(AssertionError):
        pool.share([BlockId(1)])
