"""KV between GPUs of any two hosts, by NCCL: the puller asks, both sides move together.

`nccl_puller` asks, `nccl_holder` answers, `nccl_link` is what they share, and `nccl_links` decides
which pairs have one. Here they are one transport, with CuPy behind them.

NCCL authenticates nobody. The secret that makes a pair travels over our gRPC alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from kvrelay.clock import Clock
from kvrelay.errors import HandoffLost, Incompatible
from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.transfer.base import BlockCopy, BlockGeneration, PullStats, RemoteHold
from kvrelay.transfer.cuda_runtime import CudaApi, DeviceFailed
from kvrelay.transfer.nccl_holder import NcclHolder
from kvrelay.transfer.nccl_link import (
    HOLDER_RANK,
    PULLER_RANK,
    Communicator,
    LinkLimits,
    NcclApi,
    OnLost,
    Rank,
)
from kvrelay.transfer.nccl_puller import HolderCalls, NcclPuller
from kvrelay.types import TransportOffer


class NcclTransport:
    """See `KvTransport`. For workers with a CUDA device each and one version of NCCL."""

    name = "nccl"
    lands_on: Literal["host", "device"] = "device"

    def __init__(
        self,
        *,
        epoch: str,
        nccl: NcclApi,
        cuda: CudaApi,
        calls: HolderCalls,
        clock: Clock,
        on_lost: OnLost,
        limits: LinkLimits | None = None,
        max_links: int = 8,
        shares_devices: bool = False,
    ) -> None:
        """`on_lost` hears of what nobody waits for; the process then has to end. `max_links` is for
        pulling and for serving each. `shares_devices` is for an NCCL that was told to let two
        ranks have one device.
        """
        self._nccl = nccl
        self._cuda = cuda
        self._calls = calls
        self._clock = clock
        self._on_lost = on_lost
        self._limits = limits or LinkLimits()
        self._max_links = max_links
        self._shares_devices = shares_devices
        self._here = _Address(epoch=epoch, version=nccl.version(), device_uuid=cuda.device_uuid())
        self._puller: NcclPuller | None = None
        self._holder: NcclHolder | None = None
        self._num_bytes = 0

    def register(self, cache: KvCache) -> None:
        assert self._puller is None, "registered twice"
        assert isinstance(cache, DeviceCache), "the cache is not on a device"
        begin, self._num_bytes = cache.device_bytes.data_ptr(), cache.num_bytes

        def rank(number: int) -> Rank:
            return Rank(
                nccl=self._nccl,
                cuda=self._cuda,
                begin=begin,
                num_bytes=self._num_bytes,
                rank=number,
            )

        self._puller = NcclPuller(
            rank(PULLER_RANK),
            calls=self._calls,
            clock=self._clock,
            limits=self._limits,
            max_links=self._max_links,
            on_lost=self._on_lost,
        )
        self._holder = NcclHolder(
            rank(HOLDER_RANK),
            clock=self._clock,
            limits=self._limits,
            max_links=self._max_links,
            on_lost=self._on_lost,
        )

    @property
    def holder(self) -> NcclHolder:
        """What pullers reach over gRPC. Only after `register`."""
        assert self._holder is not None, "not registered"
        return self._holder

    def describe(self) -> TransportOffer:
        return TransportOffer(name=self.name, address=str(self._here), host="")

    def can_pull(self, offer: TransportOffer) -> bool:
        """Not between two versions of NCCL, and not within one device: NCCL does neither."""
        there = _address_of(offer)
        return (
            offer.name == self.name
            and there is not None
            and there.version == self._here.version
            and (self._shares_devices or there.device_uuid != self._here.device_uuid)
        )

    def prepare(self, remote: RemoteHold) -> bool:
        """Whether a pull could begin at once. If not, a link is being opened, or it was tried
        lately and will be again; meanwhile another transport has to do. Never waits.
        """
        return not self._asked.ask(remote)

    async def opened(self, remote: RemoteHold) -> None:
        """Wait for what `prepare` began.

        Raises:
            ServingError: what kept it from being opened.
        """
        await self._asked.opened(remote)

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        """Also raises `PeerUnavailable` where `prepare` says no."""
        assert all(0 <= copy.target_offset <= self._num_bytes - copy.num_bytes for copy in copies)
        there = _address_of(remote.offer)
        if there is not None and there.epoch != remote.epoch:
            raise HandoffLost(f"{remote.worker_id} of epoch {remote.epoch} is gone")
        started = self._clock.now()
        await self._asked.pull(remote, copies)
        return PullStats(
            num_bytes=sum(copy.num_bytes for copy in copies),
            elapsed_s=self._clock.now() - started,
        )

    def still(self, remote: RemoteHold, blocks: Sequence[BlockGeneration]) -> bool | None:
        """Only the holder can tell."""
        return None

    async def close(self) -> None:
        """Pulls and sends under way end with `PeerUnavailable`."""
        if self._puller is not None and self._holder is not None:
            await self._puller.close()
            await self._holder.close()

    @property
    def _asked(self) -> NcclPuller:
        assert self._puller is not None, "not registered"
        return self._puller


@dataclass(frozen=True, slots=True)
class _Address:
    """What an offer says: enough to see beforehand that a pair cannot be."""

    epoch: str
    version: int
    device_uuid: str

    def __str__(self) -> str:
        return f"{self.epoch} {self.version} {self.device_uuid}"


def _address_of(offer: TransportOffer) -> _Address | None:
    parts = offer.address.split(" ")
    if len(parts) != 3 or not parts[1].isdecimal() or len(parts[1]) > 9:
        return None
    return _Address(epoch=parts[0], version=int(parts[1]), device_uuid=parts[2])


class CupyNccl:
    """`NcclApi` by CuPy."""

    def __init__(self) -> None:
        """Raises:
        Incompatible: CuPy is not installed, or finds no NCCL.
        """
        self._nccl = _cupy_nccl()

    def version(self) -> int:
        with _said_by_nccl():
            version: int = self._nccl.get_version()
        return version

    def unique_id(self) -> bytes:
        with _said_by_nccl():
            unique_id: bytes = self._nccl.get_unique_id()
        return unique_id

    def join(self, unique_id: bytes, *, rank: int) -> Communicator:
        with _said_by_nccl():
            return _CupyCommunicator(self._nccl, self._nccl.NcclCommunicator(2, unique_id, rank))

    @contextmanager
    def group(self) -> Iterator[None]:
        with _said_by_nccl():
            self._nccl.groupStart()
            yield
            self._nccl.groupEnd()


class _CupyCommunicator:
    """`Communicator` by CuPy. Bytes are bytes: whatever the KV is made of, NCCL moves UINT8."""

    def __init__(self, nccl: Any, communicator: Any) -> None:
        self._uint8: int = nccl.NCCL_UINT8
        self._communicator = communicator

    def send(self, pointer: int, num_bytes: int, *, peer: int, stream: int) -> None:
        self._move(self._communicator.send, pointer, num_bytes, peer, stream)

    def recv(self, pointer: int, num_bytes: int, *, peer: int, stream: int) -> None:
        self._move(self._communicator.recv, pointer, num_bytes, peer, stream)

    def check_async_error(self) -> None:
        with _said_by_nccl():
            self._communicator.check_async_error()

    def abort(self) -> None:
        with _said_by_nccl():
            self._communicator.abort()

    def _move(
        self, move: Callable[..., None], pointer: int, num_bytes: int, peer: int, stream: int
    ) -> None:
        with _said_by_nccl():
            move(pointer, num_bytes, self._uint8, peer, stream)


def _cupy_nccl() -> Any:
    try:
        from cupy.cuda import nccl
    except ImportError as error:
        raise Incompatible(
            "transports between GPUs need CuPy: install kvrelay[cuda12] or kvrelay[cuda13]"
        ) from error
    if not nccl.available:
        raise Incompatible("CuPy finds no NCCL: install nvidia-nccl-cu12 or nvidia-nccl-cu13")
    return nccl


@contextmanager
def _said_by_nccl() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # CuPy's errors of NCCL are
        raise DeviceFailed(str(error)) from error
    except KeyError as error:  # CuPy has no name for the codes of newer NCCLs
        raise DeviceFailed(f"NCCL error {error}") from error
