"""KV over gRPC: works between any two workers that can call each other.

1. `register` notes where pulls land; the bytes are served by the worker's `HandoffService`, which
   `add_to_server` registers so that its `Read` may answer with the bytes of `frames_of`.
2. A pull asks for the blocks in order and checks every frame before it is written.
"""

from collections.abc import Sequence
from typing import Any, Literal

import grpc
from google.protobuf.message import DecodeError

from kvrelay.clock import Clock
from kvrelay.config import TlsFiles
from kvrelay.errors import (
    KvCorrupt,
    PeerUnavailable,
)
from kvrelay.kv.cache import KvCache
from kvrelay.rpc.channels import Channels
from kvrelay.transfer.base import BlockCopy, BlockGeneration, PullStats, RemoteHold
from kvrelay.transfer.frames import FRAME_NUM_BYTES, data_of
from kvrelay.transfer.holder import told_by
from kvrelay.types import TransportOffer
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc

_MAX_INDEXES = 4096
"""Most blocks that one `Read` may name."""


_Read = grpc.aio.UnaryStreamMultiCallable[handoff_pb2.ReadRequest, bytes]

SERVICE = handoff_pb2.DESCRIPTOR.services_by_name["HandoffService"].full_name


def add_to_server(
    servicer: handoff_pb2_grpc.HandoffServiceServicer, server: grpc.aio.Server
) -> None:
    """As the generated function of this service, but `Read` may yield bytes of messages, too."""
    taken = _Taken()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(servicer, taken)  # type: ignore[arg-type]
    read = taken.handlers["Read"]
    taken.handlers["Read"] = grpc.unary_stream_rpc_method_handler(
        read.unary_stream, read.request_deserializer, _as_bytes
    )
    handlers = grpc.method_handlers_generic_handler(SERVICE, taken.handlers)
    server.add_generic_rpc_handlers((handlers,))
    server.add_registered_method_handlers(SERVICE, taken.handlers)


class _Taken:
    """Stands in for a server, and takes the handlers of one service."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Those that `add_registered_method_handlers` tells by name."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        assert service == SERVICE
        self.handlers = dict(handlers)


def _as_bytes(answer: handoff_pb2.ReadResponse | bytes) -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()


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
            read: _Read = channel.unary_stream(
                f"/{SERVICE}/Read", handoff_pb2.ReadRequest.SerializeToString
            )
            for first in range(0, len(copies), _MAX_INDEXES):
                await self._read(read, remote, copies[first : first + _MAX_INDEXES])
        return PullStats(
            num_bytes=sum(copy.num_bytes for copy in copies),
            elapsed_s=self._clock.now() - started,
        )

    def still(self, remote: RemoteHold, blocks: Sequence[BlockGeneration]) -> bool | None:
        """Only the holder can tell."""
        return None

    async def close(self) -> None:
        """Pulls under way end with `PeerUnavailable`."""
        self._is_closed = True
        await self._channels.close()

    async def _read(
        self,
        read: "_Read",
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
            call = read(request)
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

    def write(self, frame: bytes) -> None:
        if self._num_landed == len(self._copies):
            raise KvCorrupt(f"bytes after the last of {self._num_landed} blocks")
        copy = self._copies[self._num_landed]
        data = data_of(
            frame,
            index=copy.index,
            offset=self._offset,
            left_num_bytes=copy.num_bytes - self._offset,
        )
        self._land(copy, self._checked(copy, frame) if data is None else data)

    def _land(self, copy: BlockCopy, data: memoryview | bytes) -> None:
        end = self._offset + len(data)
        self._cache.range_bytes(copy.target_offset + self._offset, len(data))[:] = data
        self._offset = end
        if end == copy.num_bytes:
            self._num_landed += 1
            self._offset = 0

    def _checked(self, copy: BlockCopy, raw: bytes) -> bytes:
        """The data of a frame that was cut or written otherwise than we do it."""
        try:
            frame = handoff_pb2.ReadResponse.FromString(raw)
        except DecodeError as error:
            raise KvCorrupt(f"frame of {len(raw)} bytes is no message") from error
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
        return data

    def finish(self) -> None:
        if self._num_landed != len(self._copies):
            raise KvCorrupt(
                f"bytes end at block {self._num_landed} of {len(self._copies)}, "
                f"offset {self._offset}"
            )
