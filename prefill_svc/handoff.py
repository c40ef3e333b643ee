"""Hands held KV to the worker it is held for: the wire side of `keeper`."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from kvrelay.errors import Incompatible
from kvrelay.types import Fingerprint
from kvrelay.v1 import handoff_pb2 as pb
from kvrelay.v1 import handoff_pb2_grpc as pb_grpc
from prefill_svc import convert
from prefill_svc.keeper import HoldKeeper

Context = grpc.aio.ServicerContext[Any, Any]


class HandoffService(pb_grpc.HandoffServiceServicer):
    """Turns messages into calls of the keeper and back; decides nothing.

    Errors become statuses in `kvrelay.rpc.status.StatusInterceptor`.
    """

    def __init__(
        self, keeper: HoldKeeper, *, worker_id: str, epoch: str, fingerprint: Fingerprint
    ) -> None:
        self._keeper = keeper
        self._header = convert.header_to_wire(worker_id, epoch)
        self._fingerprint = fingerprint

    async def Pull(
        self, request: pb.PullRequest, context: Context
    ) -> AsyncIterator[pb.PullResponse]:
        """See `HandoffService.Pull` in protos/kvrelay/v1/handoff.proto."""
        self._require_epoch(request.epoch)
        convert.require_fingerprint(request.fingerprint, self._fingerprint)
        handoff_id = convert.handoff_id_from_wire(request.handoff_id)
        async with aclosing(self._keeper.announcements(handoff_id, request.puller_id)) as events:
            async for event in events:
                yield convert.announcement_to_wire(event)

    async def Read(
        self, request: pb.ReadRequest, context: Context
    ) -> AsyncIterator[pb.ReadResponse]:
        """See `HandoffService.Read` in protos/kvrelay/v1/handoff.proto."""
        self._require_epoch(request.epoch)
        indexes = convert.indexes_from_wire(request.indexes)
        for frame in self._keeper.frames(request.handoff_id, request.puller_id, indexes):
            yield convert.frame_to_wire(frame)

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        """See `HandoffService.Release` in protos/kvrelay/v1/handoff.proto."""
        self._require_epoch(request.epoch)
        self._keeper.release(request.handoff_id, request.puller_id, request.generations)
        return pb.ReleaseResponse(header=self._header)

    def _require_epoch(self, epoch: str) -> None:
        ours = self._header.epoch
        if epoch != ours:
            raise Incompatible(f"epoch {epoch[:64]} is not ours, {ours}", epoch=ours)
