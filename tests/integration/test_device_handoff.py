"""KV that is computed on a device crosses to another worker's device through host memory.

The device is stood for by separate memory on the CPU, so a copy that was forgotten shows.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch

from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache, runs_of
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.base import PullStats
from tests.integration.test_handoff import TRANSPORTS, pair
from tests.integration.test_moving import Ear, Watched, hand_over
from tests.support import workers
from tests.support.builders import prompt
from tests.support.scripted_model import StepGate
from tests.support.tiny_cuda import cuda_runner_of
from tests.support.tiny_model import tiny_spec, tiny_weights
from tests.support.workers import (
    LIMITS,
    DecodeBench,
    decode_session,
    decode_submit,
    decode_worker,
    new_id,
    pull_of,
    scripted,
    ticket_of,
    tokens_of,
    until,
)

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


class Paced:
    """A runner that takes its steps when it is told to."""

    def __init__(self, inner, gate: StepGate) -> None:
        self._inner, self._gate = inner, gate

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def step(self, batch):
        self._gate.pass_through()
        return self._inner.step(batch)


class BetweenDevices:
    """A transport that copies from one device to the other, and leaves the hosts' sides alone."""

    lands_on = "device"

    def __init__(self, inner, caches: Mapping[str, DeviceCache]) -> None:
        self._inner, self._caches = inner, caches

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def register(self, cache) -> None:
        self._here = cache
        self._inner.register(cache)

    async def pull(self, remote, copies) -> PullStats:
        source, target = self._caches[remote.worker_id].device_bytes, self._here.device_bytes
        for copy in copies:
            data = source[copy.source_offset :][: copy.num_bytes]
            target[copy.target_offset :][: copy.num_bytes] = data
        return PullStats(num_bytes=sum(copy.num_bytes for copy in copies), elapsed_s=0.001)

    def still(self, remote, blocks) -> None:
        return None


class Stop:
    """One decode worker that a sequence comes by."""

    def __init__(self, bench: DecodeBench, ear: Ear, gate: StepGate, holders: Watched) -> None:
        self.bench, self.ear, self.gate, self.holders = bench, ear, gate, holders

    async def generate(self, request_id: str, attempt: int, last: int) -> None:
        """Until the token at `last` is told; it is then in the step of the next."""
        name = (request_id, attempt)
        await self.ear.until(lambda it: name in it.tokens)
        while (reached := max(self.ear.tokens[name])) < last:
            self.gate.let_one_pass()
            await self.ear.until(lambda it, n=reached: max(it.tokens[name]) > n)


@asynccontextmanager
async def stops(models, wraps) -> AsyncIterator[list[Stop]]:
    async with AsyncExitStack() as held:
        made: list[Stop] = []
        for i, ((runner, cache), wrap) in enumerate(zip(models, wraps, strict=True)):
            cache.on_device.fill_(torch.nan)
            cache.tensor.fill_(torch.nan)
            gate = StepGate()
            holders: list[Watched] = []

            def watch(client, holders=holders):
                holders.append(Watched(client))
                return holders[-1]

            bench = await held.enter_async_context(
                decode_worker(
                    worker_id=f"decode-{i}",
                    epoch=f"{i:016x}",
                    model=(Paced(runner, gate), cache),
                    limits=replace(LIMITS, budget_tokens=128, max_chunk_tokens=32),
                    gate=gate,
                    wrap=wrap,
                    wrap_holders=watch,
                )
            )
            session = await held.enter_async_context(decode_session(bench))
            ear = Ear(session)
            held.push_async_callback(ear.close)
            made.append(Stop(bench, ear, gate, holders[0]))
        yield made


@pytest.mark.parametrize("second", TRANSPORTS)
@pytest.mark.parametrize("first", [*TRANSPORTS, "between devices"])
async def test_a_sequence_moves_from_device_to_device_with_all_that_it_has_generated(first, second):
    """Twice, with what landed and with what was computed since, whichever side it landed on."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    ids = [token_id % spec.vocab_size for token_id in prompt(20)]
    num_tokens = 80
    with (
        cuda_runner_of(spec, weights) as a,
        cuda_runner_of(spec, weights) as b,
        cuda_runner_of(spec, weights) as c,
    ):
        caches = {"decode-0": a[1]}

        def wrapped(transport):
            if first in TRANSPORTS or transport.name != "shm":
                return transport
            return BetweenDevices(transport, caches)

        async with stops([a, b, c], [None, wrapped, None]) as route:
            alone = decode_submit(ids, max_tokens=num_tokens, cache_salt=b"alone")
            await route[0].ear.session.submit(**alone)
            route[0].gate.let_one_pass()
            await route[0].generate(alone["request_id"], 1, num_tokens - 1)
            expected = route[0].ear.tokens[alone["request_id"], 1]

            request_id, known = new_id(), {}
            await route[0].ear.session.submit(
                **decode_submit(ids, request_id=request_id, max_tokens=num_tokens)
            )
            route[0].gate.let_one_pass()
            for attempt, (here, there, transport) in enumerate(
                zip(route, route[1:], (first, second), strict=False), 1
            ):
                await here.generate(request_id, attempt, 25 * attempt)
                known |= here.ear.tokens[request_id, attempt]
                handoff_id = new_id()
                names = {"puller_id": there.bench.worker_id, "puller_epoch": there.bench.epoch}
                source = pull_of(
                    here.bench,
                    handoff_id,
                    transport if transport in TRANSPORTS else "shm",
                    ticket=ticket_of(here.bench, handoff_id, **names),
                    is_running=True,
                )
                await hand_over(here.ear, request_id, attempt, handoff_id, there.bench)
                await there.ear.session.submit(
                    **decode_submit(
                        ids,
                        request_id=request_id,
                        attempt=attempt + 1,
                        emitted_token_ids=[known[i] for i in range(len(known))],
                        max_tokens=num_tokens,
                        pull=source,
                    )
                )
                await there.holders.froze.wait()
                here.gate.let_one_pass()
                there.gate.let_one_pass()
            await route[2].generate(request_id, 3, num_tokens - 1)
            known |= route[2].ear.tokens[request_id, 3]
            moved = [stop.ear.moved.get((request_id, i)) for i, stop in enumerate(route, 1)]
            for stop in route:
                stop.gate.open()

    assert moved == [27, 52, None]
    assert known == expected
    assert len(set(expected.values())) > 20, "too dull to tell"


class SlowCache(KvCache):
    """Copies blocks to its device for as long as it is told to."""

    has_device = True

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
    cache.to_host([4, 1, 2])
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
