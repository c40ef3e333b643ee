"""A worker that holds KV and nothing else: a filled cache, served by one transport."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

import grpc
import numpy as np
import torch

from kvrelay.clock import MonotonicClock
from kvrelay.errors import HandoffLost
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.rpc import status
from kvrelay.transfer import nixl
from kvrelay.transfer.base import BlockCopy, KvTransport, RemoteHold
from kvrelay.transfer.frames import frames_of
from kvrelay.transfer.shm import ShmTransport
from kvrelay.transfer.stream import StreamTransport, add_to_server
from kvrelay.types import TransportOffer
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc

HANDOFF = "handoff-0"

SMALL = KvLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=8, dtype="float32")


def why_not(kind: str) -> str | None:
    """Why this machine cannot run transports of a kind here; None if it can."""
    if kind == "nixl" and not nixl.is_installed():
        return "NIXL is not installed: kvrelay[nixl]"
    if kind in ("cuda_ipc", "nccl"):
        return "no CUDA device" if not torch.cuda.is_available() else "runs with `make gpu`"
    return None


def make_transport(kind: str, *, worker_id: str, epoch: str) -> KvTransport:
    clock = MonotonicClock()
    if kind == "shm":
        return ShmTransport(worker_id=worker_id, epoch=epoch, clock=clock)
    if kind == "nixl":
        return nixl.NixlTransport(worker_id=worker_id, epoch=epoch, clock=clock)
    assert kind == "stream", kind
    return StreamTransport(worker_id=worker_id, epoch=epoch, clock=clock)


def fill(cache: KvCache, seed: int) -> None:
    """Bytes that differ from block to block, the same for the same seed and size."""
    rng = np.random.default_rng(seed)
    for block_id in range(cache.num_blocks):
        cache.block_bytes(block_id)[:] = rng.bytes(cache.layout.block_num_bytes)


def copies_of(pairs: Sequence[tuple[int, int]], layout: KvLayout = SMALL) -> list[BlockCopy]:
    """One copy per (source, target) block, in order; indexes are source ids, as `ScriptedReads`."""
    num_bytes = layout.block_num_bytes
    return [
        BlockCopy(
            index=source,
            source_offset=source * num_bytes,
            target_offset=target * num_bytes,
            num_bytes=num_bytes,
        )
        for source, target in pairs
    ]


class ScriptedReads(handoff_pb2_grpc.HandoffServiceServicer):
    """Serves every block of a cache as one hold, whose indexes are the block ids.

    Before the frame `stall_at` it says so in `stalled` and waits for `go_on`. `frames` replaces
    what is sent.
    """

    def __init__(self, cache: KvCache, *, epoch: str) -> None:
        self.lapsed = False
        self.stall_at = -1
        self.stalled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.frames: Sequence[handoff_pb2.ReadResponse | bytes] | None = None
        self._cache = cache
        self._epoch = epoch

    async def Read(
        self, request: handoff_pb2.ReadRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[handoff_pb2.ReadResponse | bytes]:
        if request.epoch != self._epoch or self.lapsed:
            await context.abort_with_status(status.to_grpc(HandoffLost("no such hold")))
        frames = self._frames(request) if self.frames is None else self.frames
        for num_sent, frame in enumerate(frames):
            if num_sent == self.stall_at:
                self.stalled.set()
                await self.go_on.wait()
            yield frame

    async def Release(
        self, request: handoff_pb2.ReleaseRequest, context: grpc.aio.ServicerContext
    ) -> handoff_pb2.ReleaseResponse:
        return handoff_pb2.ReleaseResponse()

    def _frames(self, request: handoff_pb2.ReadRequest) -> Iterator[bytes]:
        for index in request.indexes:
            yield from frames_of(index, self._cache.block_bytes(index))


@dataclass
class Peer:
    """One side. `reads` is there if it serves `stream`."""

    worker_id: str
    epoch: str
    cache: KvCache
    transport: KvTransport
    address: str = ""
    reads: ScriptedReads | None = None

    def hold(self, *, epoch: str | None = None) -> RemoteHold:
        return RemoteHold(
            handoff_id=HANDOFF,
            worker_id=self.worker_id,
            epoch=epoch or self.epoch,
            address=self.address,
            offer=self.transport.describe(),
        )

    def block(self, block_id: int) -> bytes:
        return bytes(self.cache.block_bytes(block_id))

    def landed(self, copy: BlockCopy) -> bytes:
        return bytes(self.cache.range_bytes(copy.target_offset, copy.num_bytes))


@asynccontextmanager
async def open_peer(
    kind: str,
    *,
    layout: KvLayout = SMALL,
    num_blocks: int = 16,
    seed: int = 1,
    worker_id: str = "prefill-0",
    epoch: str = "e1",
    transport: KvTransport | None = None,
) -> AsyncIterator[Peer]:
    """A filled cache and its transport, served over gRPC too where `kind` needs it."""
    cache = KvCache(layout, num_blocks, shareable=True)
    fill(cache, seed)
    transport = transport or make_transport(kind, worker_id=worker_id, epoch=epoch)
    transport.register(cache)
    peer = Peer(worker_id=worker_id, epoch=epoch, cache=cache, transport=transport)
    server = None
    if kind == "stream":
        peer.reads = ScriptedReads(cache, epoch=epoch)
        server = grpc.aio.server()
        add_to_server(peer.reads, server)
        peer.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
    try:
        yield peer
    finally:
        await transport.close()
        if server is not None:
            await server.stop(None)
        cache.close()


@dataclass
class ChildPeer:
    """A holder in another process, as `python -m tests.support.kv_child` prints it."""

    process: asyncio.subprocess.Process
    remote: RemoteHold


@asynccontextmanager
async def open_child(
    kind: str, *, layout: KvLayout, num_blocks: int, seed: int, worker_id: str = "prefill-0"
) -> AsyncIterator[ChildPeer]:
    """The same in a process of its own; it is gone when the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.kv_child",
        json.dumps(
            {
                "kind": kind,
                "layout": asdict(layout),
                "num_blocks": num_blocks,
                "seed": seed,
                "worker_id": worker_id,
            }
        ),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        said = json.loads(await process.stdout.readline())
        remote = RemoteHold(
            handoff_id=HANDOFF,
            worker_id=said["worker_id"],
            epoch=said["epoch"],
            address=said["address"],
            offer=TransportOffer(**said["offer"]),
        )
        yield ChildPeer(process, remote)
    finally:
        process.stdin.close()
        await process.wait()
