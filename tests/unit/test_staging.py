"""Where packed blocks lie: each in a place of its own, inside the memory that was asked for."""

import itertools
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.kv.staging import PACKED_DTYPES, StagingPlan

BFLOAT16 = KvLayout(num_layers=2, block_size=16, num_kv_heads=3, head_dim=24, dtype="bfloat16")


@st.composite
def layouts(draw):
    return KvLayout(
        num_layers=draw(st.integers(1, 4)),
        block_size=draw(st.sampled_from([4, 8, 16])),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 24, 64])),
        dtype=draw(st.sampled_from(["bfloat16", "float32", "fp8", "int8"])),
    )


@given(layouts(), st.integers(1, 9), st.booleans(), st.integers(0, 100_000))
def test_offsets_never_overlap_and_stay_inside(layout, num_blocks, packs, landing_num_bytes):
    """Blocks as they are kept, every packed form of each, and the landing area."""
    plan = StagingPlan(
        layout,
        num_blocks,
        packs_to=PACKED_DTYPES if packs else (),
        landing_num_bytes=landing_num_bytes,
    )
    blocks_num_bytes = num_blocks * layout.block_num_bytes
    ranges = [(0, blocks_num_bytes)]
    for dtype in PACKED_DTYPES:
        if plan.can_pack_to(dtype):
            num_bytes = replace(layout, dtype=dtype).block_num_bytes
            starts = [plan.offset(block, dtype) for block in range(num_blocks)]
            ranges += [(start, start + num_bytes) for start in starts]
    ranges.append((plan.landing_offset, plan.landing_offset + landing_num_bytes))
    ranges.sort()

    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert ranges[-1][1] == blocks_num_bytes + plan.num_bytes


@pytest.mark.parametrize(
    ("dtype", "packs", "wanted"),
    [
        ("bfloat16", True, {"fp8", "int8"}),
        ("float32", True, {"fp8", "int8"}),
        ("fp8", True, set()),
        ("int8", True, set()),
        ("bfloat16", False, set()),
    ],
)
def test_blocks_are_packed_only_to_what_is_narrower(dtype, packs, wanted):
    """Between fp8 and int8 there is nothing to gain, and a worker may pack nothing at all."""
    layout = replace(BFLOAT16, dtype=dtype)
    plan = StagingPlan(layout, 4, packs_to=PACKED_DTYPES if packs else (), landing_num_bytes=0)

    assert {name for name in ("bfloat16", *PACKED_DTYPES) if plan.can_pack_to(name)} == wanted


def test_a_worker_that_neither_packs_nor_unpacks_needs_no_memory_more():
    """Up to the alignment of what is not there."""
    plan = StagingPlan(BFLOAT16, 7, packs_to=(), landing_num_bytes=0)

    assert plan.num_bytes < 4096


def test_two_handoffs_of_one_block_pack_it_to_the_same_place():
    """The place depends on the block and the dtype alone."""
    plan = StagingPlan(BFLOAT16, 7, packs_to=PACKED_DTYPES, landing_num_bytes=100)
    again = StagingPlan(BFLOAT16, 7, packs_to=PACKED_DTYPES, landing_num_bytes=5)

    assert plan.offset(3, "int8") == again.offset(3, "int8") != plan.offset(3, "fp8")


def test_a_cache_made_by_the_plan_has_room_for_all_of_it():
    """The plan and the cache count from the same beginning."""
    plan = StagingPlan(BFLOAT16, 3, packs_to=PACKED_DTYPES, landing_num_bytes=1000)
    cache = KvCache(BFLOAT16, 3, shareable=False, staging_num_bytes=plan.num_bytes)

    assert min(plan.offset(0, dtype) for dtype in PACKED_DTYPES) >= cache.staging_offset
    assert len(cache.range_bytes(plan.landing_offset, 1000)) == 1000
    assert plan.landing_offset + 1000 <= cache.num_bytes
    cache.close()
