"""Digests: equal for equal handoffs, different for everything else."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.transfer.digest import HANDOFF_DIGEST_NUM_BYTES, block_digest, handoff_digest

SAME = {
    "handoff_id": "h-1",
    "num_tokens": 3,
    "first_token_id": 7,
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
    assert digest.hex() == "c5461276d1edffa9467f50c7b2e83e6b"
    assert len(digest) == HANDOFF_DIGEST_NUM_BYTES


@pytest.mark.parametrize(
    "change",
    [
        {"handoff_id": "h-2"},
        {"num_tokens": 4},
        {"first_token_id": 8},
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


@given(
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.integers(0, 3), max_size=3),
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.integers(0, 3), max_size=3),
)
def test_parts_cannot_flow_into_each_other(ids, digests, other_ids, other_digests):
    """Two handoffs have one digest only if prompt and blocks are both equal."""
    one = handoff_digest(**SAME | {"prompt_ids": ids, "block_digests": digests})
    other = handoff_digest(**SAME | {"prompt_ids": other_ids, "block_digests": other_digests})
    assert (one == other) == ((ids, digests) == (other_ids, other_digests))


def test_the_largest_ids_and_digests_fit():
    """32 bits of token id and 64 of digest are written whole."""
    largest = handoff_digest(**SAME | {"prompt_ids": (2**32 - 1,), "block_digests": (2**64 - 1,)})
    smaller = handoff_digest(**SAME | {"prompt_ids": (2**32 - 1,), "block_digests": (2**64 - 2,)})
    assert largest != smaller
