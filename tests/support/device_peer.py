"""Workers with scripted devices that pull from each other, all within one process.

The transports are the real ones. CUDA and NCCL behind them are scripted, and so are the RPCs.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from kvrelay.clock import Clock, MonotonicClock
from kvrelay.errors import HandoffLost, PeerUnavailable, QuiescenceLost, ServingError
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.base import BlockCopy, RemoteHold
from kvrelay.transfer.cuda_ipc import CudaIpcTransport
from kvrelay.transfer.nccl import NcclTransport
from kvrelay.transfer.nccl_link import LinkLimits
from tests.support.scripted_cuda import ScriptedCuda, ScriptedMachine
from tests.support.scripted_nccl import ScriptedFabric, ScriptedNccl

SMALL = KvLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=8, dtype="float32")

SHORT = LinkLimits(
    open_timeout_s=5.0, transfer_timeout_s=0.3, quiesce_timeout_s=0.6, check_interval_s=0.01
)
"""For tests in which a transfer takes too long."""

HASTY = LinkLimits(open_timeout_s=0.3)
"""For tests in which opening does."""

LONG = LinkLimits(check_interval_s=0.01)


@dataclass
class World:
    """All that scripted workers share."""

    machine: ScriptedMachine = field(default_factory=ScriptedMachine)
    fabric: ScriptedFabric = field(default_factory=ScriptedFabric)
    peers: dict[str, "DevicePeer"] = field(default_factory=dict)
    memories: list[torch.Tensor] = field(default_factory=list)
    """Kept, as memory that somebody has mapped is."""


class ScriptedCalls:
    """See `HolderCalls`: reaches the holder without gRPC. Indexes are block ids."""

    def __init__(self, world: World, puller_id: str) -> None:
        self.problem: ServingError | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.asked: list[tuple[int, list[int]]] = []
        self.opened: list[str] = []
        self._world = world
        self._puller_id = puller_id

    async def open_link(self, remote: RemoteHold, unique_id: bytes) -> None:
        self.opened.append(remote.worker_id)
        holder = self._reached(remote).nccl_transport.holder
        await holder.open_link(puller_id=self._puller_id, unique_id=unique_id)

    async def send(
        self, remote: RemoteHold, *, link_id: str, sequence: int, indexes: Sequence[int]
    ) -> None:
        peer = self._reached(remote)
        self.asked.append((sequence, list(indexes)))
        await self.go_on.wait()
        if self.problem is not None:
            raise self.problem
        each = peer.cache.layout.block_num_bytes
        ranges = [(index * each, each) for index in indexes]
        await peer.nccl_transport.holder.send(
            puller_id=self._puller_id, link_id=link_id, sequence=sequence, ranges=ranges
        )

    def _reached(self, remote: RemoteHold) -> "DevicePeer":
        peer = self._world.peers.get(remote.worker_id)
        if peer is None:
            raise PeerUnavailable(f"{remote.worker_id} does not answer")
        if peer.epoch != remote.epoch:
            raise HandoffLost(f"{remote.worker_id} of epoch {remote.epoch} is gone")
        return peer


@dataclass
class DevicePeer:
    """One worker."""

    worker_id: str
    epoch: str
    cache: DeviceCache
    cuda: ScriptedCuda
    nccl: ScriptedNccl
    calls: ScriptedCalls
    transport: CudaIpcTransport | NcclTransport
    lost: list[QuiescenceLost]

    @property
    def nccl_transport(self) -> NcclTransport:
        assert isinstance(self.transport, NcclTransport)
        return self.transport

    def hold(self, *, epoch: str | None = None) -> RemoteHold:
        return RemoteHold(
            handoff_id="handoff-0",
            worker_id=self.worker_id,
            epoch=epoch or self.epoch,
            address="127.0.0.1:1",
            offer=self.transport.describe(),
        )

    def block(self, block_id: int) -> bytes:
        each = self.cache.layout.block_num_bytes
        return bytes(self.cache.device_bytes[block_id * each : (block_id + 1) * each].numpy())

    def overwrite(self, value: int) -> None:
        self.cache.device_bytes.fill_(value)

    async def ready(self, remote: RemoteHold) -> None:
        """Whatever a first pull needs is there."""
        if isinstance(self.transport, NcclTransport):
            await self.transport.opened(remote)


def copies_of(pairs: Sequence[tuple[int, int]], layout: KvLayout = SMALL) -> list[BlockCopy]:
    """One copy per (source, target) block, in that order; indexes are source ids."""
    each = layout.block_num_bytes
    return [
        BlockCopy(
            index=source,
            source_offset=source * each,
            target_offset=target * each,
            num_bytes=each,
        )
        for source, target in pairs
    ]


@asynccontextmanager
async def open_device_peer(
    kind: str,
    world: World,
    worker_id: str,
    *,
    epoch: str = "e1",
    seed: int = 1,
    layout: KvLayout = SMALL,
    num_blocks: int = 16,
    limits: LinkLimits = LONG,
    max_links: int = 8,
    clock: Clock | None = None,
    process: str = "",
    wired: Callable[[ScriptedCuda, ScriptedNccl], None] = lambda cuda, nccl: None,
) -> AsyncIterator[DevicePeer]:
    """A worker whose device memory is filled with bytes of `seed`.

    `wired` may script its device before the transport sees it.
    """
    cache = DeviceCache(layout, num_blocks, shareable=False, device=torch.device("cpu"))
    rng = np.random.default_rng(seed)
    cache.device_bytes.copy_(torch.from_numpy(rng.integers(0, 256, cache.num_bytes, np.uint8)))
    world.memories.append(cache.device_bytes)
    cuda = ScriptedCuda(
        world.machine, process=process or worker_id + epoch, device=f"gpu-of-{worker_id}"
    )
    cuda.use_device()  # of the thread that wires all
    nccl = ScriptedNccl(world.fabric, world.machine)
    wired(cuda, nccl)
    calls = ScriptedCalls(world, worker_id)
    lost: list[QuiescenceLost] = []
    transport: CudaIpcTransport | NcclTransport
    if kind == "nccl":
        transport = NcclTransport(
            epoch=epoch,
            nccl=nccl,
            cuda=cuda,
            calls=calls,
            clock=clock or MonotonicClock(),
            on_lost=lost.append,
            limits=limits,
            max_links=max_links,
        )
    else:
        transport = CudaIpcTransport(
            worker_id=worker_id,
            epoch=epoch,
            cuda=cuda,
            clock=clock or MonotonicClock(),
            max_peers=max_links,
            connect_timeout_s=limits.open_timeout_s,
            copy_timeout_s=limits.transfer_timeout_s,
            quiesce_timeout_s=limits.quiesce_timeout_s,
        )
    transport.register(cache)
    peer = DevicePeer(worker_id, epoch, cache, cuda, nccl, calls, transport, lost)
    world.peers[worker_id] = peer
    try:
        yield peer
    finally:
        for gate in (cuda.copies, cuda.maps, nccl.joins, nccl.moves, nccl.aborts):
            gate.set()
        await transport.close()
        if world.peers.get(worker_id) is peer:
            del world.peers[worker_id]
        if not world.peers:
            world.fabric.release()
        cache.close()
