"""What `cuda_ipc` does beside what all transports do: mappings that end, events, refusals."""

import asyncio
import sys

import pytest
import torch

from kvrelay.clock import MonotonicClock
from kvrelay.errors import Incompatible, KvCorrupt, PeerUnavailable, QuiescenceLost
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.transfer.base import BlockCopy
from kvrelay.transfer.cuda_ipc import CudaIpcTransport, CupyCuda
from kvrelay.transfer.refusals import RETRY_S
from tests.support.clock import ManualClock
from tests.support.device_peer import HASTY, SHORT, SMALL, World, copies_of, open_device_peer
from tests.support.scripted_cuda import ScriptedCuda


def open_peer(world, worker_id, **options):
    return open_device_peer("cuda_ipc", world, worker_id, **options)


async def until_unmapped(world: World, *, left: int) -> None:
    """Mappings end in a thread, and when the event loop hears of the holder's end."""
    async with asyncio.timeout(5):
        while len(world.machine.mapped) > left:  # noqa: ASYNC110 - the thread tells nobody
            await asyncio.sleep(0.001)


async def test_a_peer_is_mapped_once_and_for_as_long_as_it_lives():
    """However many pulls there are; its end is noticed without one."""
    world = World()
    async with open_peer(world, "decode-0") as puller:
        async with open_peer(world, "prefill-0", seed=2) as holder:
            for i in range(4):
                await puller.transport.pull(holder.hold(), copies_of([(i, i)]))
                assert len(world.machine.mapped) == 1
        await until_unmapped(world, left=0)


async def test_preparing_maps_before_anybody_waits():
    """So the first pull begins as soon as any; what cannot be mapped is met by whoever pulls."""
    world = World()
    async with (
        open_peer(world, "prefill-0") as holder,
        open_peer(world, "prefill-1") as other,
        open_peer(world, "decode-0", seed=2) as puller,
    ):
        assert puller.transport.prepare(holder.hold())
        async with asyncio.timeout(5):
            while not world.machine.mapped:  # noqa: ASYNC110 - the thread tells nobody
                await asyncio.sleep(0.001)
        puller.cuda.maps.clear()
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        puller.cuda.maps.set()
        puller.cuda.is_reachable = False
        assert puller.transport.prepare(other.hold())
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(other.hold(), copies_of([(0, 0)]))
        assert puller.transport.prepare(holder.hold())  # and closes meanwhile


async def test_closing_unmaps_all():
    """And gives the streams back."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "prefill-1") as other:
        async with open_peer(world, "decode-0") as puller:
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
            await puller.transport.pull(other.hold(), copies_of([(0, 0)]))
            assert len(world.machine.mapped) == 2
        assert world.machine.mapped == []
        assert len(world.machine.streams) == 2


async def test_the_least_recently_used_mapping_makes_room():
    """There are never more than `max_peers`."""
    world = World()
    async with (
        open_peer(world, "prefill-0") as a,
        open_peer(world, "prefill-1") as b,
        open_peer(world, "prefill-2") as c,
        open_peer(world, "decode-0", seed=2, max_links=2) as puller,
    ):
        for holder in (a, b, a, c):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
            assert puller.block(0) == holder.block(0)
        await until_unmapped(world, left=2)
        await puller.transport.pull(a.hold(), copies_of([(1, 1)]))
        assert len(world.machine.mapped) == 2


async def test_copies_begin_after_the_holders_event():
    """So that a holder may announce what its device has not written yet."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "decode-0") as puller:
        event = next(iter(world.machine.num_recorded))  # the holder's came first
        holder.transport.written(stream=99)
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        waited = [stream.waited_for for stream in world.machine.streams.values()]
        assert world.machine.num_recorded[event] == 1
        assert [event] in waited


async def test_memory_within_one_process_is_refused():
    """CUDA cannot map it; there are better ways to get at it."""
    world = World()
    async with (
        open_peer(world, "prefill-0", process="one") as holder,
        open_peer(world, "decode-0", process="one") as puller,
    ):
        with pytest.raises(Incompatible, match="within one process"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))


async def test_memory_that_cannot_be_exported_is_refused_with_the_likely_reason():
    """When the worker starts, not when somebody pulls."""
    world = World()
    cache = DeviceCache(SMALL, 2, shareable=False, device=torch.device("cpu"))
    cuda = ScriptedCuda(world.machine, process="p")
    cuda.is_exportable = False
    transport = CudaIpcTransport(worker_id="w", epoch="e", cuda=cuda, clock=MonotonicClock())
    with pytest.raises(Incompatible, match="expandable_segments"):
        transport.register(cache)
    await transport.close()


async def test_a_device_out_of_reach_is_unavailable():
    """Every time, and nothing stays mapped."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "decode-0") as puller:
        puller.cuda.is_reachable = False
        for _ in range(2):
            with pytest.raises(PeerUnavailable, match="cannot be mapped"):
                await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        assert world.machine.mapped == []


async def test_a_device_out_of_reach_leaves_pulls_to_other_transports():
    """But for the first; it is tried again after a while, and nobody waits for that."""
    world, clock = World(), ManualClock()
    async with (
        open_peer(world, "prefill-0") as holder,
        open_peer(world, "prefill-1") as other,
        open_peer(world, "decode-0", seed=2, clock=clock) as puller,
    ):
        puller.cuda.is_reachable = False
        prepare = puller.transport.prepare
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        puller.cuda.is_reachable = True
        clock.advance(0.9 * RETRY_S)
        assert not prepare(holder.hold())
        assert prepare(other.hold())
        assert prepare(holder.hold(epoch="another"))
        clock.advance(0.1 * RETRY_S)
        assert not prepare(holder.hold())
        async with asyncio.timeout(5):
            while not prepare(holder.hold()):  # noqa: ASYNC110 - it is tried by nobody's wish
                await asyncio.sleep(0.001)
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        assert puller.block(0) == holder.block(0)


async def test_a_mapping_that_came_too_late_is_used_all_the_same():
    """Once it was given up it is there when it is tried again."""
    world, clock = World(), ManualClock()
    async with (
        open_peer(world, "prefill-0") as holder,
        open_peer(world, "decode-0", limits=HASTY, clock=clock) as puller,
    ):
        puller.cuda.maps.clear()
        with pytest.raises(PeerUnavailable, match="mapping"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        puller.cuda.maps.set()
        clock.advance(RETRY_S)
        async with asyncio.timeout(5):
            while not puller.transport.prepare(holder.hold()):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        assert len(world.machine.mapped) == 1


async def test_a_mapping_that_takes_too_long_is_given_up():
    """Nothing is being written, so it costs this pull alone; the mapping may still come."""
    world = World()
    async with (
        open_peer(world, "prefill-0") as holder,
        open_peer(world, "decode-0", limits=HASTY) as puller,
    ):
        puller.cuda.maps.clear()
        with pytest.raises(PeerUnavailable, match="mapping"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        puller.cuda.maps.set()
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_copy_that_cannot_be_begun_is_a_failure(nth):
    """Whichever of a pull's it is; what was begun before has ended."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "decode-0") as puller:
        puller.cuda.fail_at_copy = nth
        with pytest.raises(PeerUnavailable, match="cudaErrorInvalidValue"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0), (2, 1), (4, 2)]))
        puller.overwrite(0xA5)
        await puller.transport.pull(holder.hold(), copies_of([(5, 5)]))
        assert all(set(puller.block(i)) == {0xA5} for i in range(3))


async def test_a_device_that_fails_costs_the_process():
    """Nobody can tell what a broken stream still does."""
    world = World()
    async with (
        open_peer(world, "prefill-0") as holder,
        open_peer(world, "decode-0", limits=SHORT) as puller,
    ):
        puller.cuda.is_broken = True
        with pytest.raises(QuiescenceLost, match="cudaErrorLaunchFailure"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))


@pytest.mark.parametrize("past_end", [0, 1 << 50, -(1 << 50)])
async def test_a_range_the_holder_does_not_have_is_refused(past_end):
    """Before anything is copied."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "decode-0") as puller:
        offset = holder.cache.num_bytes + past_end
        copy = BlockCopy(index=0, source_offset=offset, target_offset=0, num_bytes=1)
        with pytest.raises(KvCorrupt, match="prefill-0, which has"):
            await puller.transport.pull(holder.hold(), [copy])
        assert puller.cuda.num_copies == 0


def test_without_cupy_the_extra_to_install_is_named(monkeypatch):
    """In one line."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(Incompatible, match=r"install kvrelay\[cuda12\] or kvrelay\[cuda13\]"):
        CupyCuda(0)
