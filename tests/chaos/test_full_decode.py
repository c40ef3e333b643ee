"""A decode worker that stays full: its prefill worker queues, and nobody loses anything.

For a few seconds; for 30 with CHAOS_FULL in the environment, as `make chaos` has it.
"""

import asyncio
import os

import pytest

from kvrelay.handoff.holds import HoldLimits
from kvrelay.types import Role
from tests.support.builders import prompt
from tests.support.proxied_pool import Node, ProxiedPool, proxied_pool
from tests.support.workers import BLOCK_SIZE, until

FULL_S = 30.0 if os.environ.get("CHAOS_FULL") else 3.0

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(FULL_S + 120)]

NUM_BLOCKS = 40
HOG = prompt((NUM_BLOCKS - 4) * BLOCK_SIZE - 2, variant=50)
"""Leaves four blocks. Every other prompt needs more."""

HOG_STEPS = 10
NUM_REQUESTS = 40
MAX_TOKENS = 6
LIMITS = HoldLimits(hold_s=0.5, unclaimed_hold_s=20.0, max_expected=64, max_remembered=256)
"""A hold that a timer took for abandoned would be gone long before there is room."""


def measured(node: Node, name: str) -> float:
    """A sample of the worker's metrics, as of now."""
    assert node.bench is not None
    node.bench.metrics.observe_load(node.bench.service.load())
    labels = {"role": node.role.value}
    value = node.bench.registry.get_sample_value(f"kvrelay_engine_{name}", labels)
    assert value is not None, name
    return float(value)


async def keep_asking(pool: ProxiedPool, prompts: list[tuple[int, ...]]) -> list:
    """One request after the other, evenly over the time in which there is no room."""
    asking = []
    async with asyncio.TaskGroup() as group:
        for prompt_ids in prompts:
            asking.append(
                group.create_task(pool.ask(prompt_ids, MAX_TOKENS, timeout_s=FULL_S + 60))
            )
            await asyncio.sleep(FULL_S / len(prompts))
    return [task.result() for task in asking]


@pytest.mark.parametrize("transport", ["shm", "stream"])
async def test_a_full_decode_worker_slows_its_prefill_worker(transport):
    """
    Prefilled blocks wait where they are until there is room; then every request ends right. No
    hold was given up by a timer, and the metrics say who waited for whom.
    """
    prompts = [prompt(5 * BLOCK_SIZE + i % 9, variant=i) for i in range(NUM_REQUESTS)]
    both = {"num_blocks": NUM_BLOCKS, "hold_limits": LIMITS}
    async with proxied_pool(
        transport=transport,
        prefill=both,
        decode={**both, "step_s": FULL_S / HOG_STEPS},
    ) as pool:
        (holder,), (puller,) = pool.of(Role.PREFILL), pool.of(Role.DECODE)
        hog = asyncio.create_task(pool.ask(HOG, HOG_STEPS + 3, timeout_s=FULL_S + 60))
        await until(lambda: measured(puller, "running_sequences") == 1)
        asking = asyncio.create_task(keep_asking(pool, prompts))

        await until(lambda: measured(puller, "waiting_handoffs") > 2, timeout_s=FULL_S)
        # Its own blocks are full of what nobody fetches, so prompts wait for blocks as well.
        await until(lambda: measured(holder, "waiting_sequences") > 2, timeout_s=FULL_S)
        assert not hog.done(), "all this while it was full"
        hog_answer = await hog
        assert puller.gate is not None
        puller.gate.open()
        answers = await asking

        pool.require_right(hog_answer, HOG, HOG_STEPS + 3)
        assert hog_answer.error is None
        for prompt_ids, answer in zip(prompts, answers, strict=True):
            pool.require_right(answer, prompt_ids, MAX_TOKENS)
            assert answer.error is None
            assert answer.lost_attempts == ()
        for node in (holder, puller):
            assert measured(node, "hold_expirations_total") == 0
        assert measured(puller, "waiting_handoffs") == 0
        assert measured(puller, "grant_wait_seconds_count") == NUM_REQUESTS + 1
        assert measured(puller, "grant_wait_seconds_sum") > FULL_S / 2
