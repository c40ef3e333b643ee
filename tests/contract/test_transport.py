"""What every transport promises, whichever carries the bytes."""

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvrelay.errors import HandoffLost, PeerUnavailable
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.base import KvTransport
from kvrelay.transfer.faulty import FaultRates, FaultyTransport
from tests.support.kv_peer import (
    Peer,
    copies_of,
    make_transport,
    open_child,
    open_peer,
    why_not,
)

KINDS = ["shm", "stream", "nixl", "cuda_ipc", "nccl", "faulty-shm", "faulty-nixl"]

WIDE = KvLayout(num_layers=8, block_size=16, num_kv_heads=4, head_dim=512, dtype="float32")
"""2 MiB a block: several frames, and pulls long enough to be caught halfway."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    problem = why_not(carrier(request.param))
    if problem is not None:
        pytest.skip(f"{request.param}: {problem}")
    return request.param


def carrier(kind: str) -> str:
    return kind.removeprefix("faulty-")


def puller_transport(kind: str) -> KvTransport:
    transport = make_transport(carrier(kind), worker_id="decode-0", epoch="e9")
    if kind.startswith("faulty-"):
        return FaultyTransport(transport, plan=FaultRates({}), seed=0)
    return transport


@asynccontextmanager
async def pair(
    kind: str, *, layout: KvLayout | None = None, **options
) -> AsyncIterator[tuple[Peer, Peer]]:
    """A holder and a puller with equal layouts and different bytes."""
    if layout is not None:
        options["layout"] = layout
    async with (
        open_peer(carrier(kind), seed=1, **options) as holder,
        open_peer(
            carrier(kind),
            seed=2,
            worker_id="decode-0",
            epoch="e9",
            transport=puller_transport(kind),
            **options,
        ) as puller,
    ):
        yield holder, puller


@pytest.mark.parametrize(
    "layout",
    [
        KvLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=2, dtype="bfloat16"),
        KvLayout(num_layers=3, block_size=16, num_kv_heads=3, head_dim=64, dtype="float32"),
        KvLayout(num_layers=30, block_size=32, num_kv_heads=3, head_dim=64, dtype="bfloat16"),
        WIDE,
    ],
    ids=["tiny", "float32", "smollm2-blocks-of-32", "two-frames"],
)
@pytest.mark.parametrize(
    "pairs",
    [
        [(0, 0)],
        [(15, 0)],
        [(i, i) for i in range(16)],
        [(i, 15 - i) for i in range(16)],
        [(3, 4), (4, 5), (9, 6), (1, 15), (2, 0), (5, 1)],
    ],
    ids=["first", "last-to-first", "all", "reversed", "scattered"],
)
async def test_targets_hold_the_sources_bytes_and_nothing_else_changes(kind, layout, pairs):
    """Each target equals its source on return; every other block is as before."""
    async with pair(kind, layout=layout) as (holder, puller):
        before = [puller.block(i) for i in range(16)]
        stats = await puller.transport.pull(holder.hold(), copies_of(pairs, layout))
        landed = {target: holder.block(source) for source, target in pairs}
        for i in range(16):
            assert puller.block(i) == landed.get(i, before[i]), f"block {i}"
        assert stats.num_bytes == len(pairs) * layout.block_num_bytes
        assert stats.elapsed_s > 0


async def test_pulling_no_blocks_changes_nothing(kind):
    """An empty pull is a pull."""
    async with pair(kind) as (holder, puller):
        before = [puller.block(i) for i in range(16)]
        assert (await puller.transport.pull(holder.hold(), [])).num_bytes == 0
        assert [puller.block(i) for i in range(16)] == before


async def test_a_second_pull_sees_what_the_holder_wrote_since(kind):
    """Nothing of an earlier pull is remembered."""
    async with pair(kind) as (holder, puller):
        await puller.transport.pull(holder.hold(), copies_of([(3, 3)]))
        holder.cache.tensor[3] = 7.0
        await puller.transport.pull(holder.hold(), copies_of([(3, 3)]))
        assert puller.block(3) == holder.block(3)


async def test_pulls_at_once_do_not_mix(kind):
    """Pulls from two holders and of one holder twice each land their own bytes."""
    async with (
        pair(kind) as (holder, puller),
        open_peer(carrier(kind), seed=3, worker_id="prefill-1", epoch="e2") as other,
    ):
        await asyncio.gather(
            puller.transport.pull(holder.hold(), copies_of([(0, 0), (1, 1)])),
            puller.transport.pull(holder.hold(), copies_of([(2, 2), (3, 3)])),
            puller.transport.pull(other.hold(), copies_of([(0, 4), (1, 5)])),
        )
        assert [puller.block(i) for i in range(4)] == [holder.block(i) for i in range(4)]
        assert [puller.block(4), puller.block(5)] == [other.block(0), other.block(1)]


async def test_nothing_is_written_once_a_cancelled_pull_has_ended(kind):
    """Whenever it is cancelled, what the caller writes to the targets afterwards stays."""
    async with pair(kind, layout=WIDE, num_blocks=24) as (holder, puller):
        copies = copies_of([(i, (i * 5) % 24) for i in range(23)], WIDE)
        (other,) = copies_of([(0, (23 * 5) % 24)], WIDE)
        num_cancelled = 0
        for num_turns in [*range(12), *range(12, 120, 12)]:
            pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            pulling.cancel()
            num_cancelled += (await asyncio.wait([pulling]))[0].pop().cancelled()
            for copy in copies:
                puller.cache.range_bytes(copy.target_offset, copy.num_bytes)[:] = (
                    b"\xa5" * copy.num_bytes
                )
            await puller.transport.pull(holder.hold(), [other])  # time for a straggler
            for copy in copies:
                assert puller.landed(copy) == b"\xa5" * copy.num_bytes
        assert num_cancelled > 5


async def test_a_pull_cancelled_halfway_leaves_its_targets_alone(kind):
    """Cancelled after bytes have landed and before all have."""
    async with pair(kind, layout=WIDE, num_blocks=24) as (holder, puller):
        if holder.reads is not None:
            holder.reads.stall_at = 20
        marker = puller.block(0)
        pulling = asyncio.create_task(
            puller.transport.pull(holder.hold(), copies_of([(i, i) for i in range(24)], WIDE))
        )
        await _changed(puller, 0, marker)
        pulling.cancel()
        pulling.cancel()
        await asyncio.wait([pulling])
        puller.cache.tensor.fill_(3.0)
        if holder.reads is not None:
            holder.reads.go_on.set()
            holder.reads.stall_at = -1
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)], WIDE))
        assert bool((puller.cache.tensor[1:] == 3.0).all())


async def test_a_holder_that_closed_is_unavailable(kind):
    """Before the first pull, or after some."""
    async with pair(kind) as (holder, puller):
        async with open_peer(carrier(kind), worker_id="prefill-7", epoch="e7") as gone:
            unknown = gone.hold()
        async with open_peer(carrier(kind), worker_id="prefill-8", epoch="e8") as gone:
            known = gone.hold()
            await puller.transport.pull(known, copies_of([(0, 0)]))
        for remote in (unknown, known):
            with pytest.raises(PeerUnavailable):
                await puller.transport.pull(remote, copies_of([(0, 0)]))
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))


async def test_another_epoch_is_refused(kind):
    """A hold of an earlier life of the worker is lost."""
    async with pair(kind) as (holder, puller):
        before = puller.block(0)
        with pytest.raises(HandoffLost):
            await puller.transport.pull(holder.hold(epoch="e0"), copies_of([(0, 0)]))
        assert puller.block(0) == before


async def test_a_closed_transport_pulls_no_more_and_closes_again(kind):
    """Closing is repeatable and final."""
    async with pair(kind) as (holder, puller):
        remote = holder.hold()
        await puller.transport.pull(remote, copies_of([(0, 0)]))
        await puller.transport.close()
        await puller.transport.close()
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(remote, copies_of([(0, 0)]))


async def test_closing_ends_a_pull_under_way(kind):
    """The puller's own close is not mistaken for a cancelled task."""
    async with pair(kind, layout=WIDE, num_blocks=24) as (holder, puller):
        if holder.reads is not None:
            holder.reads.stall_at = 20
        marker = puller.block(0)
        pulling = asyncio.create_task(
            puller.transport.pull(holder.hold(), copies_of([(i, i) for i in range(24)], WIDE))
        )
        await _changed(puller, 0, marker)
        await puller.transport.close()
        if holder.reads is not None:
            with pytest.raises(PeerUnavailable):
                await pulling
        else:
            await asyncio.wait([pulling])  # it may have been at its last run
            assert isinstance(pulling.exception(), PeerUnavailable | None)


async def test_an_offer_is_recognised_by_its_kind_and_host(kind):
    """A transport can pull what it offers itself, and no other transport's offer."""
    async with pair(kind) as (holder, puller):
        offer = holder.transport.describe()
        assert offer.name == puller.transport.name == carrier(kind)
        assert puller.transport.can_pull(offer)
        other = make_transport(
            "stream" if carrier(kind) == "shm" else "shm", worker_id="w", epoch="e"
        )
        assert not other.can_pull(offer)


async def test_pulls_leave_nothing_behind(kind):
    """200 pulls cost no descriptor, thread, task or socket; closing gives back all."""
    async with pair(kind) as (holder, puller):  # what the libraries keep for ever
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
    idle = _resources()
    async with pair(kind) as (holder, puller):
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        first = _resources()
        for i in range(200):
            await puller.transport.pull(holder.hold(), copies_of([(i % 16, i % 7)]))
        assert _resources() == first
    assert _resources() == idle


@pytest.mark.parametrize("kill", [False, True], ids=["stays", "is-killed"])
async def test_blocks_cross_processes(kind, kill):
    """Another process's bytes land; after its SIGKILL it is unavailable."""
    layout = KvLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=64, dtype="bfloat16")
    async with (
        open_peer(carrier(kind), layout=layout, seed=5) as twin,  # the child's bytes, at hand
        open_peer(
            carrier(kind),
            layout=layout,
            worker_id="decode-0",
            epoch="e9",
            transport=puller_transport(kind),
        ) as puller,
        open_child(carrier(kind), layout=layout, num_blocks=16, seed=5) as child,
    ):
        assert puller.transport.can_pull(child.remote.offer)
        await puller.transport.pull(
            child.remote, copies_of([(i, 15 - i) for i in range(16)], layout)
        )
        assert [puller.block(15 - i) for i in range(16)] == [twin.block(i) for i in range(16)]
        if kill:
            child.process.send_signal(signal.SIGKILL)
            await child.process.wait()
            with pytest.raises(PeerUnavailable):
                await puller.transport.pull(child.remote, copies_of([(0, 0)]))


async def _changed(peer: Peer, block_id: int, before: bytes) -> None:
    """Lets the loop turn until bytes have landed: memory has no event to wait for."""
    while peer.block(block_id)[:64] == before[:64]:  # noqa: ASYNC110
        await asyncio.sleep(0)


def _resources() -> tuple[int, list[str], int, int]:
    gc.collect()  # of errors kept by earlier tests, whose tracebacks refer to caches
    mapped = Path("/proc/self/maps").read_text().count("memfd:kvrelay-kv")
    threads = sorted(thread.name for thread in threading.enumerate())
    return len(os.listdir("/proc/self/fd")), threads, len(asyncio.all_tasks()), mapped
