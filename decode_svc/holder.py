"""Calls the worker that holds a handoff: hears its announcements and asks for the fence.

A refusal is told as what it means to the puller: whatever the holder does not know, or
knew before it was restarted, is a lost handoff; a holder that does not answer is no use.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager

import grpc

from decode_svc import convert
from decode_svc.intake import Announcement
from kvrelay.errors import (
    Cancelled,
    DeadlinePassed,
    HandoffLost,
    Incompatible,
    NotFound,
    PeerUnavailable,
    ServingError,
)
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.status import from_grpc
from kvrelay.rpc.submit import ModelBounds
from kvrelay.transfer.base import RemoteHold
from kvrelay.types import Fingerprint
from kvrelay.v1 import handoff_pb2_grpc as pb_grpc


class HolderClient:
    """The handoff service of every peer, as one puller calls it."""

    def __init__(
        self,
        channels: Channels,
        *,
        puller_id: str,
        fingerprint: Fingerprint,
        bounds: ModelBounds,
        release_timeout_s: float,
    ) -> None:
        self._channels = channels
        self._puller_id = puller_id
        self._fingerprint = fingerprint
        self._bounds = bounds
        self._release_timeout_s = release_timeout_s

    async def announcements(self, source: RemoteHold) -> AsyncGenerator[Announcement, None]:
        """What the holder says, until the hold ends. Open, it keeps the hold from its timer.

        Raises:
            HandoffLost, PeerUnavailable, PermissionDenied, Incompatible, QueueFull.
            KvCorrupt: a message that makes no sense.
        """
        request = convert.pull_to_wire(
            source, puller_id=self._puller_id, fingerprint=self._fingerprint
        )
        async with self._channels.use(source.address) as channel:
            with _told_by(source):
                call = pb_grpc.HandoffServiceStub(channel).Pull(request)
                try:
                    async for message in call:
                        yield convert.announcement_from_wire(message, self._bounds)
                finally:
                    call.cancel()

    async def release(self, source: RemoteHold, generations: Sequence[int]) -> None:
        """Return only if every block of the hold kept its content until now.

        Raises:
            HandoffLost: drop the bytes.
            PeerUnavailable: nobody knows; drop them as well.
        """
        request = convert.release_to_wire(
            source, puller_id=self._puller_id, generations=generations
        )
        async with self._channels.use(source.address) as channel:
            with _told_by(source):
                stub = pb_grpc.HandoffServiceStub(channel)
                await stub.Release(request, timeout=self._release_timeout_s)


@contextmanager
def _told_by(source: RemoteHold) -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _meaning(from_grpc(error), source) from error
    except asyncio.CancelledError:
        # gRPC says the same when a call is cancelled under us because its channel was closed.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise PeerUnavailable(f"the channel to {source.worker_id} was closed") from None


def _meaning(error: ServingError, source: RemoteHold) -> ServingError:
    names = {"handoff_id": source.handoff_id, "worker_id": source.worker_id}
    is_other_epoch = isinstance(error, Incompatible) and "epoch" in error.details
    if is_other_epoch or isinstance(error, NotFound):
        return HandoffLost(f"{source.worker_id} does not hold it: {error}", **names)
    if isinstance(error, Cancelled | DeadlinePassed):  # not ours, so the holder's silence
        return PeerUnavailable(f"{source.worker_id}: {error}", **names)
    return error
