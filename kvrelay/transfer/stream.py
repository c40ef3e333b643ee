"""KV over gRPC: works between any two workers that can call each other.

1. `register` notes where pulls land; the bytes are served by the worker's `HandoffService`,
   whose `Read` frames blocks with `read_frames`.
2. A pull asks for the blocks in order and checks every frame before it is written.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from kvrelay.clock import Clock
from kvrelay.config import TlsFiles
from kvrelay.errors import (
    KvCorrupt,
    PeerUnavailable,
)
from kvrelay.kv.cache import KvCache
from kvrelay.rpc.channels import Channels
from kvrelay.transfer.base import BlockCopy, PullStats, RemoteHold
from kvrelay.transfer.holder import told_by
from kvrelay.types import TransportOffer
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc

FRAME_NUM_BYTES = 1 << 20
"""Most bytes in one message."""

_MAX_INDEXES = 4096
"""Most blocks that one `Read` may name."""


def read_frames(view: memoryview) -> Iterator[tuple[int, bytes]]:
    """A block's bytes as (offset, at most `FRAME_NUM_BYTES` bytes), each copied once."""
    for offset in range(0, len(view), FRAME_NUM_BYTES):
        yield offset, bytes(view[offset : offset + FRAME_NUM_BYTES])


class StreamTransport:
    """See `KvTransport`. Dials `RemoteHold.address`; the offer needs no address of its own."""

    name = "stream"
    lands_on: Literal["host", "device"] = "host"

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: str,
        clock: Clock,
        tls: TlsFiles | None = None,
        max_channels: int = 64,
    ) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._channels = Channels(tls=tls, max_idle=max_channels)
        self._clock = clock
        self._cache: KvCache | None = None
        self._is_closed = False

    def register(self, cache: KvCache) -> None:
        assert self._cache is None, "registered twice"
        self._cache = cache

    def describe(self) -> TransportOffer:
        return TransportOffer(name=self.name, address="", host="")

    def can_pull(self, offer: TransportOffer) -> bool:
        return offer.name == self.name

    def prepare(self, remote: RemoteHold) -> bool:
        """Always: what is missing is opened when it is first pulled."""
        return True

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        """Also raises `KvCorrupt` for frames that are not what was asked for, and what the
        holder's status says.
        """
        assert self._cache is not None, "not registered"
        self._check_open()
        started = self._clock.now()
        async with self._channels.use(remote.address) as channel:
            stub = handoff_pb2_grpc.HandoffServiceStub(channel)
            for first in range(0, len(copies), _MAX_INDEXES):
                await self._read(stub, remote, copies[first : first + _MAX_INDEXES])
        return PullStats(
            num_bytes=sum(copy.num_bytes for copy in copies),
            elapsed_s=self._clock.now() - started,
        )

    async def close(self) -> None:
        """Pulls under way end with `PeerUnavailable`."""
        self._is_closed = True
        await self._channels.close()

    async def _read(
        self,
        stub: "handoff_pb2_grpc.HandoffServiceAsyncStub",
        remote: RemoteHold,
        copies: Sequence[BlockCopy],
    ) -> None:
        assert self._cache is not None
        self._check_open()
        request = handoff_pb2.ReadRequest(
            handoff_id=remote.handoff_id,
            puller_id=self._worker_id,
            puller_epoch=self._epoch,
            epoch=remote.epoch,
            ticket=remote.ticket,
            indexes=[copy.index for copy in copies],
        )
        landing = _Landing(self._cache, copies)
        with told_by(remote):
            call = stub.Read(request)
            try:
                async for frame in call:
                    landing.write(frame)
            finally:
                call.cancel()
        landing.finish()

    def _check_open(self) -> None:
        if self._is_closed:
            raise PeerUnavailable("the stream transport is closed")


class _Landing:
    """Writes frames where they belong, and none that was not due."""

    def __init__(self, cache: KvCache, copies: Sequence[BlockCopy]) -> None:
        self._cache = cache
        self._copies = copies
        self._num_landed = 0
        self._offset = 0

    def write(self, frame: handoff_pb2.ReadResponse) -> None:
        if self._num_landed == len(self._copies):
            raise KvCorrupt(f"bytes after the last of {self._num_landed} blocks")
        copy = self._copies[self._num_landed]
        if (frame.index, frame.offset_bytes) != (copy.index, self._offset):
            raise KvCorrupt(
                f"frame of block {frame.index} at {frame.offset_bytes}, "
                f"expected block {copy.index} at {self._offset}"
            )
        data = frame.data
        end = self._offset + len(data)
        if not 0 < len(data) <= FRAME_NUM_BYTES or end > copy.num_bytes:
            raise KvCorrupt(
                f"frame of {len(data)} bytes at {self._offset}, "
                f"the block has {copy.num_bytes}, frames {FRAME_NUM_BYTES}"
            )
        self._cache.range_bytes(copy.target_offset + self._offset, len(data))[:] = data
        self._offset = end
        if end == copy.num_bytes:
            self._num_landed += 1
            self._offset = 0

    def finish(self) -> None:
        if self._num_landed != len(self._copies):
            raise KvCorrupt(
                f"bytes end at block {self._num_landed} of {len(self._copies)}, "
                f"offset {self._offset}"
            )
