"""Whatever befalls the bytes, no token comes from them; and nothing is refused that is right.

This is the quick tier. `make fuzz-handoff` does the same with 10 000 and 100 000.
"""

import os
from dataclasses import replace

import pytest

from kvrelay.transfer import nixl
from tests.support.handoffs import HARMS, handoffs
from tests.support.workers import LAYOUT

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

SHARE = int(os.environ.get("FUZZ_SHARE", "1"))
"""`test_the_suite_can_fail` is content with a part of it."""

NUM_CORRUPTIONS = 504 // SHARE
NUM_CLEAN = 2004 // SHARE
SEED = 4

needs_nixl = pytest.mark.skipif(not nixl.is_installed(), reason="nixl is not installed")
TRANSPORTS = ("shm", "stream", pytest.param("nixl", marks=needs_nixl))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_corruption_is_caught_and_no_clean_handoff_is_refused(transport):
    """
    One bit to a whole block, stale and exchanged blocks, another prompt's: each ends as KV_CORRUPT,
    without a token. All the others have the model's own tokens.
    """
    num_corruptions, num_clean = NUM_CORRUPTIONS // 3, NUM_CLEAN // 3
    async with handoffs(transport, seed=SEED) as pair:
        tally = await pair.run(num_corruptions=num_corruptions, num_clean=num_clean)

    assert not tally.wrong, f"seed={SEED}: {tally.wrong[:10]} and {len(tally.wrong)} in all"
    assert tally.num_clean == num_clean
    assert tally.num_caught == num_corruptions
    assert len(tally.caught) == len(HARMS), "every kind of harm was done"


LARGER_BLOCKS = replace(LAYOUT, block_size=8)
IN_BFLOAT16 = replace(LAYOUT, dtype="bfloat16", head_dim=16)


@pytest.mark.parametrize(
    ("holder", "puller", "num_clean"),
    [
        (LAYOUT, LARGER_BLOCKS, 400),
        (LARGER_BLOCKS, LAYOUT, 400),
        (IN_BFLOAT16, replace(IN_BFLOAT16, dtype="fp8"), 0),
        (IN_BFLOAT16, replace(IN_BFLOAT16, dtype="int8", block_size=8), 0),
    ],
    ids=["to-larger-blocks", "to-smaller-blocks", "packed-to-fp8", "packed-to-int8"],
)
async def test_a_corruption_is_caught_in_another_form_too(holder, puller, num_clean):
    """
    What is digested is what travels, before it is unpacked into blocks of our own. (The scripted
    model's KV does not survive rounding, so of those forms there is nothing clean.)
    """
    num_corruptions, num_clean = 80 // SHARE, num_clean // SHARE
    pair = handoffs("shm", seed=SEED, holder_layout=holder, puller_layout=puller)
    async with pair as it:
        tally = await it.run(num_corruptions=num_corruptions, num_clean=num_clean)

    assert not tally.wrong, f"seed={SEED}: {tally.wrong[:10]} and {len(tally.wrong)} in all"
    assert (tally.num_caught, tally.num_clean) == (num_corruptions, num_clean)
