"""What transports between devices promise, like all others, whatever CUDA and NCCL do meanwhile.

CUDA and NCCL are scripted here; tests/gpu/test_transports.py has the real ones.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvrelay.errors import HandoffLost, PeerUnavailable, QuiescenceLost
from kvrelay.kv.layout import KvLayout
from kvrelay.types import TransportOffer
from tests.support.device_peer import (
    SHORT,
    SMALL,
    DevicePeer,
    World,
    copies_of,
    open_device_peer,
)

KINDS = ["cuda_ipc", "nccl"]

WIDE = KvLayout(num_layers=4, block_size=16, num_kv_heads=4, head_dim=128, dtype="float32")
"""256 KiB a block."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@asynccontextmanager
async def pair(kind: str, **options) -> AsyncIterator[tuple[DevicePeer, DevicePeer]]:
    """A holder and a puller that is ready to pull from it."""
    world = World()
    async with (
        open_device_peer(kind, world, "prefill-0", seed=1, **options) as holder,
        open_device_peer(kind, world, "decode-0", seed=2, **options) as puller,
    ):
        await puller.ready(holder.hold())
        yield holder, puller


def hold_up(kind: str, puller: DevicePeer) -> tuple[asyncio.Event, "asyncio.Event"]:
    """The gate that the next bytes stop at, on their way, and the event that they are there."""
    if kind == "cuda_ipc":
        puller.cuda.copies.clear()
        return puller.cuda.copies, puller.cuda.copying
    puller.nccl.moves.clear()
    return puller.nccl.moves, puller.nccl.moving


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
@pytest.mark.parametrize("layout", [SMALL, WIDE], ids=["small", "wide"])
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
        holder.overwrite(7)
        await puller.transport.pull(holder.hold(), copies_of([(3, 3)]))
        assert puller.block(3) == b"\x07" * SMALL.block_num_bytes


async def test_pulls_at_once_do_not_mix(kind):
    """Pulls from two holders and of one holder twice each land their own bytes."""
    world = World()
    async with (
        open_device_peer(kind, world, "prefill-0", seed=1) as holder,
        open_device_peer(kind, world, "prefill-1", seed=3) as other,
        open_device_peer(kind, world, "decode-0", seed=2) as puller,
    ):
        await puller.ready(holder.hold())
        await puller.ready(other.hold())
        await asyncio.gather(
            puller.transport.pull(holder.hold(), copies_of([(0, 0), (1, 1)])),
            puller.transport.pull(holder.hold(), copies_of([(2, 2), (3, 3)])),
            puller.transport.pull(other.hold(), copies_of([(0, 4), (1, 5)])),
        )
        assert [puller.block(i) for i in range(4)] == [holder.block(i) for i in range(4)]
        assert [puller.block(4), puller.block(5)] == [other.block(0), other.block(1)]


async def test_a_cancelled_pull_ends_when_its_bytes_have(kind):
    """Not before: whoever hears of its end may give the blocks to somebody else."""
    async with pair(kind, layout=WIDE) as (holder, puller):
        gate, there = hold_up(kind, puller)
        remote = holder.hold()
        pulling = asyncio.create_task(
            puller.transport.pull(remote, copies_of([(i, i) for i in range(16)], WIDE))
        )
        await asyncio.to_thread(there.wait)
        for _ in range(3):
            pulling.cancel()
            await asyncio.wait([pulling], timeout=0.02)
            assert not pulling.done()
        gate.set()
        await asyncio.wait([pulling])
        assert pulling.cancelled()
        puller.overwrite(0xA5)
        await puller.transport.pull(remote, copies_of([(0, 0)], WIDE))  # time for a straggler
        assert {puller.block(i)[:1] for i in range(1, 16)} == {b"\xa5"}
        assert puller.block(0) == holder.block(0)


async def test_nothing_is_written_once_a_cancelled_pull_has_ended(kind):
    """Whenever it is cancelled."""
    async with pair(kind, layout=WIDE) as (holder, puller):
        copies = copies_of([(i, (i * 5) % 16) for i in range(15)], WIDE)
        (other,) = copies_of([(0, (15 * 5) % 16)], WIDE)
        num_cancelled = 0
        for num_turns in range(12):
            pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies))
            for _ in range(num_turns):
                await asyncio.sleep(0)
            pulling.cancel()
            num_cancelled += (await asyncio.wait([pulling]))[0].pop().cancelled()
            puller.overwrite(0xA5)
            await puller.transport.pull(holder.hold(), [other])
            assert all(set(puller.block((i * 5) % 16)) == {0xA5} for i in range(15))
        assert num_cancelled > 3


async def test_a_holder_that_closed_is_unavailable(kind):
    """Before the first pull, or after some; others are not affected."""
    world = World()
    async with (
        open_device_peer(kind, world, "prefill-0", seed=1) as holder,
        open_device_peer(kind, world, "decode-0", seed=2) as puller,
    ):
        async with open_device_peer(kind, world, "prefill-7") as gone:
            unknown = gone.hold()
        async with open_device_peer(kind, world, "prefill-8") as gone:
            known = gone.hold()
            await puller.ready(known)
            await puller.transport.pull(known, copies_of([(0, 0)]))
        for remote in (unknown, known):
            with pytest.raises(PeerUnavailable):
                await puller.transport.pull(remote, copies_of([(0, 0)]))
        await puller.ready(holder.hold())
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
    async with pair(kind, layout=WIDE) as (holder, puller):
        gate, there = hold_up(kind, puller)
        pulling = asyncio.create_task(
            puller.transport.pull(holder.hold(), copies_of([(i, i) for i in range(16)], WIDE))
        )
        await asyncio.to_thread(there.wait)
        closing = asyncio.create_task(puller.transport.close())
        await asyncio.sleep(0)
        gate.set()
        await closing
        await asyncio.wait([pulling])
        # It may have been at its last bytes.
        assert isinstance(pulling.exception(), PeerUnavailable | None)


async def test_a_copy_that_does_not_end_costs_the_process(kind):
    """Rather than blocks that somebody may still write to."""
    async with pair(kind, limits=SHORT) as (holder, puller):
        gate, _ = hold_up(kind, puller)
        with pytest.raises(QuiescenceLost):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        gate.set()


async def test_a_cancelled_pull_whose_copy_does_not_end_says_so(kind):
    """It does not end as cancelled, which would mean that its blocks are free."""
    async with pair(kind, limits=SHORT) as (holder, puller):
        gate, there = hold_up(kind, puller)
        pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies_of([(0, 0)])))
        await asyncio.to_thread(there.wait)
        pulling.cancel()
        await asyncio.wait([pulling])
        assert not pulling.cancelled()
        assert isinstance(pulling.exception(), QuiescenceLost)
        gate.set()


async def test_a_copy_that_takes_too_long_and_then_ends_is_a_failure(kind):
    """The blocks are free, the bytes are nobody's."""
    limits = SHORT
    async with pair(kind, limits=limits) as (holder, puller):
        gate, there = hold_up(kind, puller)
        pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies_of([(0, 0)])))
        await asyncio.to_thread(there.wait)
        await asyncio.wait([pulling], timeout=1.3 * limits.transfer_timeout_s)
        gate.set()
        await asyncio.wait([pulling])
        assert isinstance(pulling.exception(), PeerUnavailable)


async def test_an_offer_is_recognised_by_its_kind(kind):
    """A transport can pull what its peer offers, and no other transport's offer."""
    async with pair(kind) as (holder, puller):
        offer = holder.transport.describe()
        assert offer.name == puller.transport.name == kind
        assert puller.transport.lands_on == "device"
        assert puller.transport.can_pull(offer)
        assert not puller.transport.can_pull(TransportOffer(name="shm", address="", host=""))
