"""KV between processes with real devices: the same bytes, and how fast they came."""

import asyncio
import importlib.util
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from tests.support.kernel_cases import HAS_DEVICE

MISSING = [
    name for name in ("cupy", "msgpack", "structlog") if importlib.util.find_spec(name) is None
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device and triton"),
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}"),
    pytest.mark.timeout(300),
]

if not MISSING:
    from kvrelay.errors import Incompatible, PeerUnavailable, QuiescenceLost
    from kvrelay.kernels.digest import lanes64_ranges
    from kvrelay.kv.device_cache import DeviceCache
    from kvrelay.transfer.cuda_ipc import CudaIpcTransport, CupyCuda
    from kvrelay.transfer.nccl import NcclTransport
    from tests.support import device_child as child
    from tests.support.device_child import LAYOUT, copies_of, filled_cache, open_device_child

NUM_BLOCKS = 256

MULTI_RANK_VERSION = 23000
"""Of the NCCL that can be told to let two ranks have one device."""


@pytest.fixture(autouse=True, scope="module")
def what_cuda_keeps() -> None:
    """Files that CUDA opens at its first use stay open; no test is to blame for them."""
    cache = filled_cache(2, seed=0, device=0)
    cuda = CupyCuda(0)
    cuda.use_device()
    cuda.export_memory(cache.device_bytes.data_ptr(), cache.num_bytes)
    cuda.close_event(cuda.export_event().event)
    cuda.open_stream().close()
    cache.close()


def blocks(cache: "DeviceCache") -> torch.Tensor:
    each = LAYOUT.block_num_bytes
    return cache.device_bytes[: cache.num_blocks * each].view(cache.num_blocks, each)


def digests(cache: "DeviceCache", ids: list[int]) -> list[int]:
    each = LAYOUT.block_num_bytes
    return lanes64_ranges(cache.device_bytes, [(i * each, each) for i in ids])


@asynccontextmanager
async def pair(
    kind: str, *, devices: tuple[int, int] = (0, 0), shares_devices: bool = False
) -> AsyncIterator[tuple]:
    """A holder in another process, its puller here, their caches' contents known."""
    async with open_device_child(
        kind, num_blocks=NUM_BLOCKS, seed=1, device=devices[0], shares_devices=shares_devices
    ) as holder:
        transport = child.make_transport(
            kind,
            worker_id="decode-0",
            epoch="e9",
            device=devices[1],
            shares_devices=shares_devices,
            calls=holder,
        )
        cache = filled_cache(NUM_BLOCKS, seed=2, device=devices[1])
        transport.register(cache)
        try:
            yield holder, transport, cache
        finally:
            await transport.close()
            cache.close()


async def require_bytes(holder, transport, cache: "DeviceCache") -> float:
    """Blocks land in reverse, the digest's kernel agrees, the others stay. Bytes per second of
    all of them in one piece.
    """
    twin = filled_cache(NUM_BLOCKS, seed=1, device=cache.device.index)
    try:
        before = blocks(cache).clone()
        half = list(range(NUM_BLOCKS // 2))
        pairs = [(i, NUM_BLOCKS // 2 - 1 - i) for i in half]
        await transport.pull(holder.remote, copies_of(pairs))
        landed = [target for _, target in pairs]
        assert torch.equal(blocks(cache)[landed], blocks(twin)[half])
        assert torch.equal(blocks(cache)[NUM_BLOCKS // 2 :], before[NUM_BLOCKS // 2 :])
        assert digests(cache, landed) == digests(twin, half)
        best = 0.0
        for _ in range(5):
            copies = copies_of([(i, i) for i in range(NUM_BLOCKS)])
            stats = await transport.pull(holder.remote, copies)
            best = max(best, stats.num_bytes / stats.elapsed_s)
        assert torch.equal(blocks(cache), blocks(twin))
        return best
    finally:
        twin.close()


async def test_cuda_ipc_between_two_processes_on_one_device(capsys):
    """Equal bytes, at the speed of a copy within the device."""
    async with pair("cuda_ipc") as (holder, transport, cache):
        assert transport.can_pull(holder.remote.offer)
        speed = await require_bytes(holder, transport, cache)
        num_bytes = NUM_BLOCKS * LAYOUT.block_num_bytes
    with capsys.disabled():
        sys.stdout.write(f"\ncuda_ipc: {speed / 1e9:.0f} GB/s in pulls of {num_bytes >> 20} MiB\n")
    assert speed > 50e9


async def test_cuda_ipc_notices_that_the_holder_was_killed():
    """By the connection that the handles came over; the mapping does not mind."""
    async with pair("cuda_ipc") as (holder, transport, _):
        await transport.pull(holder.remote, copies_of([(0, 0)]))
        holder.process.kill()
        await holder.process.wait()
        with pytest.raises(PeerUnavailable):
            await transport.pull(holder.remote, copies_of([(0, 0)]))


async def test_cuda_ipc_within_one_process_is_refused():
    """CUDA could not do it."""
    from kvrelay.clock import MonotonicClock

    caches = [filled_cache(2, seed=i, device=0) for i in range(2)]
    transports = [
        CudaIpcTransport(worker_id=f"w{i}", epoch="e1", cuda=CupyCuda(0), clock=MonotonicClock())
        for i in range(2)
    ]
    for transport, cache in zip(transports, caches, strict=True):
        transport.register(cache)
    offer = transports[0].describe()
    remote = child.RemoteHold(handoff_id="h", worker_id="w0", epoch="e1", address="", offer=offer)
    try:
        with pytest.raises(Incompatible, match="within one process"):
            await transports[1].pull(remote, copies_of([(0, 0)]))
    finally:
        for transport, cache in zip(transports, caches, strict=True):
            await transport.close()
            cache.close()


def test_memory_inside_an_allocation_is_exported_with_its_offset():
    """The allocator hands out pieces; a handle names the whole."""
    pieces = [torch.zeros(4096, dtype=torch.uint8, device="cuda") for _ in range(3)]
    cuda = CupyCuda(0)
    cuda.use_device()
    exported = [cuda.export_memory(piece.data_ptr(), piece.numel()) for piece in pieces]
    ours = {one.handle: [] for one in exported}
    for one, piece in zip(exported, pieces, strict=True):
        ours[one.handle].append(piece.data_ptr() - one.offset)
    assert all(len(set(begins)) == 1 for begins in ours.values())
    assert any(one.offset > 0 for one in exported)


def test_memory_of_expandable_segments_is_refused_by_name():
    """CUDA exports no handle of it."""
    script = (
        "from kvrelay.clock import MonotonicClock\n"
        "from kvrelay.transfer.cuda_ipc import CudaIpcTransport, CupyCuda\n"
        "from tests.support.device_child import filled_cache\n"
        "cuda, clock = CupyCuda(0), MonotonicClock()\n"
        "it = CudaIpcTransport(worker_id='w', epoch='e', cuda=cuda, clock=clock)\n"
        "it.register(filled_cache(8, seed=0, device=0))\n"
    )
    setting = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | setting, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "Incompatible: device memory cannot be shared" in done.stderr, done.stderr
    assert "expandable_segments" in done.stderr


async def test_nccl_refuses_two_ranks_on_one_device():
    """After both have come; the puller hears why, or that nobody will ever know."""
    require_nccl()
    if torch.cuda.device_count() > 1 or may_share():
        pytest.skip("NCCL can be given a device for each rank")
    async with pair("nccl", shares_devices=True) as (holder, transport, _):
        with pytest.raises((PeerUnavailable, QuiescenceLost)):
            await transport.opened(holder.remote)
        assert not transport.prepare(holder.remote)


async def test_nccl_between_two_processes(capsys, monkeypatch):
    """Equal bytes, between two devices or, with an NCCL that allows it, within one."""
    require_nccl()
    devices = (0, 1) if torch.cuda.device_count() > 1 else (0, 0)
    if devices == (0, 0):
        if not may_share():
            pytest.skip("needs two CUDA devices, or NCCL >= 2.30 for two ranks on one")
        monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    async with pair("nccl", devices=devices, shares_devices=devices == (0, 0)) as it:
        holder, transport, cache = it
        assert isinstance(transport, NcclTransport)
        assert transport.can_pull(holder.remote.offer)
        assert not transport.prepare(holder.remote)
        async with asyncio.timeout(120):
            await transport.opened(holder.remote)
        speed = await require_bytes(holder, transport, cache)
    with capsys.disabled():
        sys.stdout.write(f"\nnccl: {speed / 1e9:.1f} GB/s between devices {devices}\n")


def require_nccl() -> None:
    from cupy.cuda import nccl

    if not nccl.available:
        pytest.skip("CuPy finds no NCCL")


def may_share() -> bool:
    from cupy.cuda import nccl

    return nccl.get_version() >= MULTI_RANK_VERSION
