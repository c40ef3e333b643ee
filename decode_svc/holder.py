"""Calls the worker that holds a handoff: to hear of it, to have it stop, and for the fence."""

from collections.abc import AsyncGenerator, Sequence

from decode_svc import convert
from decode_svc.intake import Announcement
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.submit import ModelBounds
from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.digest import DigestKind
from kvrelay.transfer.holder import told_by
from kvrelay.transfer.wire_choice import WireDtype
from kvrelay.types import Fingerprint
from kvrelay.v1 import handoff_pb2_grpc as pb_grpc


class HolderClient:
    """The handoff service of every peer, as one puller calls it."""

    def __init__(
        self,
        channels: Channels,
        *,
        puller_id: str,
        epoch: str,
        fingerprint: Fingerprint,
        bounds: ModelBounds,
        wire_dtype: WireDtype,
        release_timeout_s: float,
    ) -> None:
        self._channels = channels
        self._puller = convert.Puller(puller_id, epoch)
        self._fingerprint = fingerprint
        self._bounds = bounds
        self._wire_dtype = wire_dtype
        self._release_timeout_s = release_timeout_s

    def wire_dtype(self, *, is_running: bool) -> WireDtype:
        """What we would like to move. A running sequence must not change by moving."""
        return "auto" if is_running else self._wire_dtype

    async def announcements(
        self,
        source: RemoteHold,
        *,
        digest_kind: DigestKind,
        is_running: bool,
        limit_tokens: int,
    ) -> AsyncGenerator[Announcement, None]:
        """What the holder says, until the hold ends. Open, it keeps the hold from its timer.

        Raises:
            HandoffLost, PeerUnavailable, PermissionDenied, Incompatible, QueueFull.
            KvCorrupt: a message that makes no sense.
        """
        request = convert.pull_to_wire(
            source,
            self._puller,
            fingerprint=self._fingerprint,
            wire_dtype=self.wire_dtype(is_running=is_running),
            digest_kind=digest_kind,
            limit_tokens=limit_tokens,
        )
        async with self._channels.use(source.address) as channel:
            with told_by(source):
                call = pb_grpc.HandoffServiceStub(channel).Pull(request)
                try:
                    async for message in call:
                        for news in convert.announcements_from_wire(message, self._bounds):
                            yield news
                finally:
                    call.cancel()

    async def freeze(self, source: RemoteHold) -> None:
        """Have a running sequence stop, so that its hold completes.

        Raises:
            HandoffLost, PeerUnavailable: see `announcements`.
        """
        request = convert.freeze_to_wire(source, self._puller)
        async with self._channels.use(source.address) as channel:
            with told_by(source):
                stub = pb_grpc.HandoffServiceStub(channel)
                await stub.Freeze(request, timeout=self._release_timeout_s)

    async def release(self, source: RemoteHold, generations: Sequence[int]) -> None:
        """Return only if every block of the hold kept its content until now.

        Raises:
            HandoffLost: drop the bytes.
            PeerUnavailable: nobody knows; drop them as well.
        """
        request = convert.release_to_wire(source, self._puller, generations=generations)
        async with self._channels.use(source.address) as channel:
            with told_by(source):
                stub = pb_grpc.HandoffServiceStub(channel)
                await stub.Release(request, timeout=self._release_timeout_s)
