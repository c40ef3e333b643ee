"""What the `nccl` transport asks of a holder, over gRPC."""

from collections.abc import Sequence

from kvrelay.rpc.channels import Channels
from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.holder import told_by
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc


class GrpcHolderCalls:
    """See `kvrelay.transfer.nccl_puller.HolderCalls`. The channels are the caller's to close."""

    def __init__(
        self, channels: Channels, *, puller_id: str, puller_epoch: str, timeout_s: float
    ) -> None:
        self._channels = channels
        self._puller_id = puller_id
        self._puller_epoch = puller_epoch
        self._timeout_s = timeout_s

    async def open_link(self, remote: RemoteHold, unique_id: bytes) -> None:
        request = handoff_pb2.OpenLinkRequest(
            handoff_id=remote.handoff_id,
            puller_id=self._puller_id,
            puller_epoch=self._puller_epoch,
            epoch=remote.epoch,
            ticket=remote.ticket,
            unique_id=unique_id,
        )
        async with self._channels.use(remote.address) as channel:
            with told_by(remote):
                stub = handoff_pb2_grpc.HandoffServiceStub(channel)
                await stub.OpenLink(request, timeout=self._timeout_s)

    async def send(
        self, remote: RemoteHold, *, link_id: str, sequence: int, indexes: Sequence[int]
    ) -> None:
        request = handoff_pb2.SendRequest(
            handoff_id=remote.handoff_id,
            puller_id=self._puller_id,
            puller_epoch=self._puller_epoch,
            epoch=remote.epoch,
            ticket=remote.ticket,
            link_id=link_id,
            indexes=indexes,
            sequence=sequence,
        )
        async with self._channels.use(remote.address) as channel:
            with told_by(remote):
                # As long as it takes: the transport watches the link, and breaks it off.
                await handoff_pb2_grpc.HandoffServiceStub(channel).Send(request)
