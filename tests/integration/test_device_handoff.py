"""KV that is computed on a device crosses to another worker's device through host memory.

The device is stood for by separate memory on the CPU, so a copy that was forgotten shows.
"""

import asyncio
import threading
from dataclasses import replace

import pytest
import torch

from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache, runs_of
from kvrelay.kv.layout import KvLayout
from tests.integration.test_handoff import TRANSPORTS, pair
from tests.support import workers
from tests.support.builders import prompt
from tests.support.tiny_cuda import cuda_runner_of
from tests.support.tiny_model import tiny_spec, tiny_weights
from tests.support.workers import LIMITS, decode_submit, scripted, tokens_of, until

LAYOUT = KvLayout(num_layers=2, block_size=4, num_kv_heads=3, head_dim=8, dtype="bfloat16")
CPU = torch.device("cpu")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_tokens_across_a_handoff_between_devices_are_those_of_one(transport):
    """At lengths around block and chunk edges, by a transport that knows of no device."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    limits = replace(LIMITS, budget_tokens=128, max_chunk_tokens=32)
    with (
        cuda_runner_of(spec, weights) as holders,
        cuda_runner_of(spec, weights) as pullers,
    ):
        for _, cache in (holders, pullers):
            cache.on_device.fill_(torch.nan)
        async with pair(
            holder={"model": holders, "limits": limits}, puller={"model": pullers, "limits": limits}
        ) as both:
            alone: dict[str, int] = {}
            handed: dict[str, int] = {}
            for num_tokens in (1, 15, 16, 17, 33, 64, 130):
                ids = [token_id % spec.vocab_size for token_id in prompt(num_tokens)]
                request_id, _ = await both.submit_both(ids, transport, max_tokens=9)
                handed[request_id] = num_tokens
                # Another salt, so that it computes its own prompt.
                fields = decode_submit(ids, max_tokens=9, cache_salt=b"alone")
                await both.decodes.submit(**fields)
                alone[fields["request_id"]] = num_tokens
            got = await both.decodes.collect(*alone, *handed)
            await both.is_idle()

    by_length = {num_tokens: tokens_of(got[name]) for name, num_tokens in alone.items()}
    assert {num_tokens: tokens_of(got[name]) for name, num_tokens in handed.items()} == by_length
    assert all(len(tokens) == 9 for tokens in by_length.values())


class SlowCache(KvCache):
    """Copies blocks to its device for as long as it is told to."""

    def __init__(self) -> None:
        super().__init__(workers.LAYOUT, 64, shareable=True)
        self.has_begun, self.may_end = threading.Event(), threading.Event()

    def landed(self, blocks) -> None:
        self.has_begun.set()
        assert self.may_end.wait(30.0)


async def test_a_landing_that_is_called_off_ends_when_nothing_writes_any_more() -> None:
    """Its blocks are nobody's before: a thread of ours still writes to them."""
    cache = SlowCache()
    async with pair(puller={"model": (scripted(cache), cache)}) as both:
        request_id, _ = await both.submit_both(prompt(9), "shm")
        assert await asyncio.to_thread(cache.has_begun.wait, 30.0)
        await both.decodes.cancel(request_id)
        await both.prefills.cancel(request_id)
        await until(lambda: both.holder.engine.is_idle)
        fields = decode_submit(prompt(3, variant=1))
        await both.decodes.submit(**fields)
        await both.decodes.outputs(fields["request_id"])  # so both cancels were obeyed
        held = both.puller.num_held_blocks
        num_landing = both.puller.lander.num_landing
        cache.may_end.set()
        await both.is_idle()

    assert (held, num_landing) == (3, 1)


def test_each_side_is_copied_block_by_block_and_only_when_told() -> None:
    """What was not named keeps what it held."""
    cache = DeviceCache(LAYOUT, 6, shareable=True, device=CPU)
    cache.on_device.fill_(3.0)
    cache.mirror([4, 1, 2])
    cache.wait_mirrored()
    assert [bool(cache.tensor[i].eq(3.0).all()) for i in range(6)] == [
        *(False, True, True, False, True, False)
    ]
    cache.tensor.fill_(5.0)
    cache.landed([0, 5])
    assert [bool(cache.on_device[i].eq(5.0).all()) for i in range(6)] == [
        *(True, False, False, False, False, True)
    ]
    cache.close()
    cache.close()


@pytest.mark.parametrize(
    ("blocks", "runs"),
    [
        ([], []),
        ([3], [(3, 4)]),
        ([5, 4, 3], [(3, 6)]),
        ([0, 2, 2, 3, 9], [(0, 1), (2, 4), (9, 10)]),
    ],
)
def test_neighbours_are_copied_together(blocks, runs) -> None:
    """In whatever order they are named."""
    assert list(runs_of(blocks)) == runs
