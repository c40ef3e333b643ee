"""The device memories of peers, each mapped once, for as long as its page is (`cuda_ipc_page`)."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from kvrelay.errors import Incompatible, PeerUnavailable
from kvrelay.transfer import cuda_ipc_page
from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.cuda_ipc_page import DevicePage
from kvrelay.transfer.cuda_runtime import CudaApi, DeviceFailed
from kvrelay.transfer.shm_map import PeerMemory
from kvrelay.transfer.side_thread import SideThread


@dataclass(frozen=True, slots=True)
class MappedDevice:
    """A peer's device memory as it lies in this process."""

    allocation: int
    begin: int
    num_bytes: int
    written: int
    """The peer's event."""


class PeerDevices:
    """Maps and unmaps in `thread`, so both come in order with the copies made there."""

    def __init__(self, cuda: CudaApi, thread: SideThread, *, map_timeout_s: float) -> None:
        self._cuda = cuda
        self._thread = thread
        self._map_timeout_s = map_timeout_s
        self._mappings: dict[PeerMemory, asyncio.Future[MappedDevice]] = {}
        self._mapped: dict[PeerMemory, MappedDevice] = {}  # the thread's alone
        self._is_closed = False

    async def of(self, page: PeerMemory, remote: RemoteHold) -> MappedDevice:
        """The memory that `page` describes, usable until the page is closed.

        Raises:
            Incompatible: it is our own process's.
            KvCorrupt: the page makes no sense.
            PeerUnavailable: this device cannot reach it, or mapping took too long.
        """
        mapping = self._mappings.get(page)
        if mapping is None or _has_failed(mapping):
            mapping = self._begin(page)
        try:
            async with asyncio.timeout(self._map_timeout_s):
                return await asyncio.shield(mapping)
        except DeviceFailed as error:
            # Not for ever, and not for other transports.
            raise PeerUnavailable(
                f"the device memory of {remote.worker_id} cannot be mapped: {error}"
            ) from error
        except TimeoutError:
            raise PeerUnavailable(
                f"mapping the device memory of {remote.worker_id} took more than "
                f"{self._map_timeout_s} s"
            ) from None

    def has(self, page: PeerMemory) -> bool:
        """Whether the memory that `page` describes is mapped, or being mapped."""
        mapping = self._mappings.get(page)
        return mapping is not None and not _has_failed(mapping)

    def close(self) -> None:
        """Unmap all, after the copies that were asked for."""
        self._is_closed = True
        self._thread.call(self._unmap_all)

    def _begin(self, page: PeerMemory) -> "asyncio.Future[MappedDevice]":
        if self._is_closed:
            raise PeerUnavailable("the cuda_ipc transport is closed")
        said = cuda_ipc_page.decode(bytes(page.bytes))
        if said.process == self._cuda.process_token():
            raise Incompatible("cuda_ipc does not work within one process")
        if page not in self._mappings:
            page.closing.callback(self._end, page)
        mapping = self._mappings[page] = self._thread.call(partial(self._map, page, said))
        return mapping

    def _end(self, page: PeerMemory) -> None:
        self._mappings.pop(page)
        if not self._is_closed:
            self._thread.call(partial(self._unmap, page))

    def _map(self, page: PeerMemory, said: DevicePage) -> MappedDevice:
        self._cuda.use_device()
        allocation = self._cuda.map_memory(said.memory)
        try:
            written = self._cuda.import_event(said.written)
        except DeviceFailed:
            self._cuda.unmap_memory(allocation)
            raise
        mapped = MappedDevice(allocation, allocation + said.offset, said.num_bytes, written)
        self._mapped[page] = mapped
        return mapped

    def _unmap_all(self) -> None:
        for page in list(self._mapped):
            self._unmap(page)

    def _unmap(self, page: PeerMemory) -> None:
        mapped = self._mapped.pop(page, None)
        if mapped is None:
            return  # it never was
        with suppress(DeviceFailed):  # its holder is gone, and CUDA may know
            self._cuda.close_event(mapped.written)
        with suppress(DeviceFailed):
            self._cuda.unmap_memory(mapped.allocation)


def _has_failed(mapping: "asyncio.Future[MappedDevice]") -> bool:
    return mapping.done() and (mapping.cancelled() or mapping.exception() is not None)
