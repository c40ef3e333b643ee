"""Digests: equal for equal handoffs, different for everything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kernels.digest import lanes64
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.digest import (
    HANDOFF_DIGEST_NUM_BYTES,
    DigestKind,
    block_digest,
    handoff_digest,
    range_digests,
)

SAME = {
    "handoff_id": "h-1",
    "num_tokens": 3,
    "output_ids": (7,),
    "prompt_ids": (1, 2, 3),
    "block_digests": (10, 20),
}


def test_a_block_digest_is_known():
    """It is xxh3-64 with seed 0, so other builds and languages agree."""
    assert block_digest(memoryview(b"")) == 0x2D06800538D394C2


@given(data=st.binary(min_size=1, max_size=300), where=st.integers(0), bit=st.integers(0, 7))
def test_one_flipped_bit_changes_a_block_digest(data, where, bit):
    """Any single bit, at any size."""
    flipped = bytearray(data)
    flipped[where % len(data)] ^= 1 << bit
    assert block_digest(memoryview(flipped)) != block_digest(memoryview(data))


def test_a_handoff_digest_is_known():
    """P and D of different builds compute the same 128 bits."""
    digest = handoff_digest(**SAME)
    assert digest.hex() == "0e59f5f0dde81c9ee27bacd35a8bf3a3"
    assert len(digest) == HANDOFF_DIGEST_NUM_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"handoff_id": "h-2"},
        {"num_tokens": 4},
        {"output_ids": (8,)},
        {"output_ids": (7, 8)},
        {"output_ids": ()},
        {"prompt_ids": (1, 3, 2)},
        {"prompt_ids": (1, 2, 3, 0)},
        {"prompt_ids": ()},
        {"block_digests": (20, 10)},
        {"block_digests": (10, 20, 0)},
        {"block_digests": ()},
    ],
)
def test_every_part_is_bound(change):
    """Changing, reordering or lengthening any part changes the digest."""
    assert handoff_digest(**SAME | change) != handoff_digest(**SAME)


PARTS = st.tuples(*[st.lists(st.integers(0, 3), max_size=4)] * 3)


@given(PARTS, PARTS)
def test_parts_cannot_flow_into_each_other(one, other):
    """Two handoffs have one digest only if prompt, outputs and blocks are all equal."""

    def digest(parts):
        return handoff_digest(**SAME | dict(zip(names, parts, strict=True)))

    names = ("prompt_ids", "output_ids", "block_digests")
    assert (digest(one) == digest(other)) == (one == other)


def test_a_token_that_becomes_generated_changes_the_digest():
    """Prompt and outputs are computed by different paths, so their border is bound, too."""
    assert handoff_digest(**SAME | {"prompt_ids": (1, 2), "output_ids": (3, 7)}) != handoff_digest(
        **SAME
    )


def test_the_largest_ids_and_digests_fit():
    """32 bits of token id and 64 of digest are written whole."""
    largest = handoff_digest(**SAME | {"prompt_ids": (2**32 - 1,), "block_digests": (2**64 - 1,)})
    smaller = handoff_digest(**SAME | {"prompt_ids": (2**32 - 1,), "block_digests": (2**64 - 2,)})
    assert largest != smaller


@pytest.mark.parametrize("kind", list(DigestKind))
def test_ranges_of_a_cache_are_digested_where_they_lie(kind):
    """Blocks and what is staged behind them, in the order asked for, by either kind."""
    layout = KvLayout(num_layers=1, block_size=4, num_kv_heads=1, head_dim=8, dtype="bfloat16")
    cache = KvCache(layout, 2, shareable=False, staging_num_bytes=64)
    cache.bytes[:] = [i * 37 % 251 for i in range(cache.num_bytes)]
    ranges = [(cache.staging_offset + 16, 48), (0, layout.block_num_bytes), (16, 0)]
    alone = {DigestKind.XXH3: lambda part: block_digest(part.data), DigestKind.LANES64: lanes64}

    digests = range_digests(cache, ranges, kind)

    assert digests == [alone[kind](cache.bytes[at : at + size]) for at, size in ranges]
    assert len(set(digests)) == 3
    cache.close()
