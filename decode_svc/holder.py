"""Calls the worker that holds a handoff: hears its announcements and asks for the fence."""

from collections.abc import AsyncGenerator, Sequence

from decode_svc import convert
from decode_svc.intake import Announcement
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.submit import ModelBounds
from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.holder import told_by
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
            with told_by(source):
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
            with told_by(source):
                stub = pb_grpc.HandoffServiceStub(channel)
                await stub.Release(request, timeout=self._release_timeout_s)
