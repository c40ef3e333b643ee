"""Which transports a worker runs, by the name of the setting and by what its memory allows."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import structlog

from kvrelay.clock import Clock
from kvrelay.config import SettingsError, TlsFiles
from kvrelay.errors import Incompatible, PeerUnavailable
from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.holder_calls import GrpcHolderCalls
from kvrelay.transfer import nixl
from kvrelay.transfer.base import KvTransport, RemoteHold
from kvrelay.transfer.cuda_ipc import CudaIpcTransport, CupyCuda
from kvrelay.transfer.nccl import CupyNccl, NcclTransport
from kvrelay.transfer.nccl_holder import NcclHolder
from kvrelay.transfer.nixl import NixlTransport
from kvrelay.transfer.shm import ShmTransport
from kvrelay.transfer.stream import StreamTransport

log = structlog.get_logger(__name__)

TransportChoice = Literal["auto", "shm", "nixl", "cuda_ipc", "nccl", "stream"]

_CALL_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Transports:
    """Those of one worker, registered with its cache, and what they need besides."""

    all: tuple[KvTransport, ...]
    sender: NcclHolder | None = None
    """The holder's part in `nccl`, reached over gRPC."""

    channels: Channels | None = None

    async def close(self) -> None:
        """Stop moving; pulls under way end."""
        for transport in self.all:
            await transport.close()
        if self.channels is not None:
            await self.channels.close()


class TransportBuilder:
    """Makes the transports of one worker."""

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: str,
        tls: TlsFiles | None,
        clock: Clock,
        on_lost: Callable[[BaseException], None],
        wrap: Callable[[KvTransport], KvTransport] | None = None,
    ) -> None:
        """`wrap` is put around each transport that needs nothing of the holder, e.g. to make it
        fail on purpose.
        """
        self._wrap = wrap
        self._worker_id = worker_id
        self._epoch = epoch
        self._tls = tls
        self._clock = clock
        self._on_lost = on_lost

    def build(self, choice: TransportChoice, cache: KvCache) -> Transports:
        """Those that `choice` names, as far as they can be had.

        `auto` has all that this worker can run and that could ever be the best, and each pair of
        workers uses the best it has in common. A name has that one alone; `shm` and `cuda_ipc` then
        serve only workers of the same host.

        Raises:
            SettingsError: the one that was named cannot be had here.
        """
        if choice == "auto":
            return self._auto(cache)
        try:
            return self._one(choice, cache)
        except Incompatible as error:
            raise SettingsError(f"transport = {choice}: {error}") from error

    def _auto(self, cache: KvCache) -> Transports:
        names: list[TransportChoice] = ["shm", "stream"]
        # On one host NIXL copies no faster than we do ourselves.
        if nixl.is_installed() and nixl.leaves_this_host():
            names.append("nixl")
        if isinstance(cache, DeviceCache) and cache.device.type == "cuda":
            names.append("cuda_ipc")
            # NCCL encrypts nothing and listens where it likes, unless it was told where.
            if self._tls is None and "NCCL_SOCKET_IFNAME" in os.environ:
                names.append("nccl")
        built: list[Transports] = []
        for name in names:
            try:
                built.append(self._one(name, cache))
            except Incompatible as error:
                log.info("transport.not_here", transport=name, reason=str(error))
        return Transports(
            all=tuple(transport for each in built for transport in each.all),
            sender=next((each.sender for each in built if each.sender is not None), None),
            channels=next((each.channels for each in built if each.channels is not None), None),
        )

    def _one(self, name: TransportChoice, cache: KvCache) -> Transports:
        match name:
            case "nccl":
                return self._nccl(cache)
            case "shm":
                return self._registered(
                    ShmTransport(worker_id=self._worker_id, epoch=self._epoch, clock=self._clock),
                    cache,
                )
            case "nixl":
                return self._registered(
                    NixlTransport(worker_id=self._worker_id, epoch=self._epoch, clock=self._clock),
                    cache,
                )
            case "cuda_ipc":
                return self._registered(
                    CudaIpcTransport(
                        worker_id=self._worker_id,
                        epoch=self._epoch,
                        cuda=CupyCuda(_device_of(cache)),
                        clock=self._clock,
                    ),
                    cache,
                )
            case _:
                return self._registered(
                    StreamTransport(
                        worker_id=self._worker_id,
                        epoch=self._epoch,
                        tls=self._tls,
                        clock=self._clock,
                    ),
                    cache,
                )

    def _registered(self, transport: KvTransport, cache: KvCache) -> Transports:
        wrapped = transport if self._wrap is None else self._wrap(transport)
        wrapped.register(cache)
        return Transports((wrapped,))

    def _nccl(self, cache: KvCache) -> Transports:
        device = _device_of(cache)
        channels = Channels(tls=self._tls)
        calls = GrpcHolderCalls(
            channels,
            puller_id=self._worker_id,
            puller_epoch=self._epoch,
            timeout_s=_CALL_TIMEOUT_S,
        )
        transport = NcclTransport(
            epoch=self._epoch,
            nccl=CupyNccl(),
            cuda=CupyCuda(device),
            calls=calls,
            clock=self._clock,
            on_lost=self._on_lost,
        )
        transport.register(cache)
        return Transports((transport,), sender=transport.holder, channels=channels)


def _device_of(cache: KvCache) -> int:
    """Raises Incompatible: the cache is not on a CUDA device."""
    if not isinstance(cache, DeviceCache) or cache.device.type != "cuda":
        raise Incompatible("KV is in host memory here, and it moves between CUDA devices only")
    return cache.device.index or 0


def transport_for(
    transports: Sequence[KvTransport], remote: RemoteHold
) -> tuple[KvTransport, RemoteHold]:
    """The best of ours that can pull now, and the hold with the offer that it pulls by.

    Raises:
        PeerUnavailable: none can, now or ever; another holder may do.
    """
    offers = (remote.offer, *remote.other_offers)
    for offer in offers:
        hold = replace(remote, offer=offer)
        for transport in transports:
            if transport.can_pull(offer) and transport.prepare(hold):
                return transport, hold
    offered = ", ".join(offer.name for offer in offers)
    have = ", ".join(transport.name for transport in transports)
    raise PeerUnavailable(
        f"no way is ready to pull from {remote.worker_id}: it offers {offered}, we have {have}",
        offered=offered,
    )
