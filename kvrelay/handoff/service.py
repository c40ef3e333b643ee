"""Hands held KV to the worker it is held for: the wire side of `keeper`; decides nothing.

Whatever is asked, the ticket is looked at first: nothing is remembered, waited for or read for
somebody whom the coordinator did not send.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import grpc

from kvrelay.errors import Incompatible
from kvrelay.handoff import convert
from kvrelay.handoff.desk import TicketDesk
from kvrelay.handoff.keeper import HoldKeeper
from kvrelay.rpc.convert import header_to_wire
from kvrelay.types import Fingerprint
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc

SERVICE_NAME = handoff_pb2.DESCRIPTOR.services_by_name["HandoffService"].full_name

Context = grpc.aio.ServicerContext[Any, Any]


class Asked(Protocol):
    """What every request names."""

    @property
    def handoff_id(self) -> str: ...
    @property
    def puller_id(self) -> str: ...
    @property
    def puller_epoch(self) -> str: ...
    @property
    def epoch(self) -> str: ...
    @property
    def ticket(self) -> bytes: ...


class Sender(Protocol):
    """The holder's part in a transport that needs one."""

    async def open_link(self, *, puller_id: str, unique_id: bytes) -> None:
        """Join a communicator, in our own time."""
        ...

    async def send(
        self, *, puller_id: str, link_id: str, sequence: int, ranges: Sequence[tuple[int, int]]
    ) -> None:
        """Send (offset, number of bytes) of our memory; return when they have left it."""
        ...


class HandoffServicer(handoff_pb2_grpc.HandoffServiceServicer):
    """See `HandoffService` in protos/kvrelay/v1/handoff.proto."""

    def __init__(
        self,
        keeper: HoldKeeper,
        *,
        desk: TicketDesk,
        worker_id: str,
        epoch: str,
        fingerprint: Fingerprint,
        sender: Sender | None = None,
    ) -> None:
        self._keeper = keeper
        self._desk = desk
        self._header = header_to_wire(worker_id, epoch)
        self._fingerprint = fingerprint
        self._sender = sender

    async def Pull(
        self, request: handoff_pb2.PullRequest, context: Context
    ) -> AsyncIterator[handoff_pb2.PullResponse]:
        handoff_id = self._admitted(request)
        terms = convert.terms_from_wire(request, self._fingerprint)
        events = self._keeper.announcements(handoff_id, request.puller_id, terms)
        async with aclosing(events):
            async for event in events:
                yield convert.announcement_to_wire(event)

    async def Read(  # type: ignore[override]
        self, request: handoff_pb2.ReadRequest, context: Context
    ) -> AsyncIterator[bytes]:
        """Messages as bytes: see `kvrelay.transfer.stream.add_to_server`."""
        handoff_id = self._admitted(request)
        indexes = convert.indexes_from_wire(request.indexes)
        for frame in self._keeper.frames(handoff_id, request.puller_id, indexes):
            yield frame

    async def Freeze(
        self, request: handoff_pb2.FreezeRequest, context: Context
    ) -> handoff_pb2.FreezeResponse:
        handoff_id = self._admitted(request)
        self._keeper.freeze(handoff_id, request.puller_id)
        return handoff_pb2.FreezeResponse(header=self._header)

    async def Release(
        self, request: handoff_pb2.ReleaseRequest, context: Context
    ) -> handoff_pb2.ReleaseResponse:
        handoff_id = self._admitted(request)
        await self._keeper.release(handoff_id, request.puller_id, request.generations)
        return handoff_pb2.ReleaseResponse(header=self._header)

    async def OpenLink(
        self, request: handoff_pb2.OpenLinkRequest, context: Context
    ) -> handoff_pb2.OpenLinkResponse:
        handoff_id = self._admitted(request)
        self._keeper.holds.require_not_over(handoff_id)  # it may not have begun
        unique_id = convert.unique_id_from_wire(request.unique_id)
        await self._sending.open_link(puller_id=request.puller_id, unique_id=unique_id)
        return handoff_pb2.OpenLinkResponse(header=self._header)

    async def Send(
        self, request: handoff_pb2.SendRequest, context: Context
    ) -> handoff_pb2.SendResponse:
        handoff_id = self._admitted(request)
        indexes = convert.indexes_from_wire(request.indexes)
        link_id = convert.link_id_from_wire(request.link_id)
        with self._keeper.reading(handoff_id, request.puller_id, indexes) as ranges:
            await self._sending.send(
                puller_id=request.puller_id,
                link_id=link_id,
                sequence=request.sequence,
                ranges=ranges,
            )
        return handoff_pb2.SendResponse(header=self._header)

    def _admitted(self, request: Asked) -> str:
        """The handoff, asked for by whom the coordinator sent, of us as we are now."""
        ours = self._header.epoch
        if request.epoch != ours:
            raise Incompatible(f"epoch {request.epoch[:64]} is not ours, {ours}", epoch=ours)
        handoff_id = convert.handoff_id_from_wire(request.handoff_id)
        self._desk.check(handoff_id, request.puller_id, request.puller_epoch, request.ticket)
        return handoff_id

    @property
    def _sending(self) -> Sender:
        if self._sender is None:
            raise Incompatible("this worker sends nothing: it has no transport that does")
        return self._sender
