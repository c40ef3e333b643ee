"""KV between GPUs of one host: the puller maps the holder's device memory and copies from it.

1. `register` exports our allocation and an event, and serves both on a page (`cuda_ipc_page`).
2. The first pull from a peer maps that peer's allocation; the mapping ends with the peer.
3. A pull is then one copy per run of neighbouring ranges, on a stream of its own, begun after the
   peer's event and awaited in a thread of its own.

Between processes alone: CUDA maps no process's memory into itself.
"""

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from kvrelay.clock import Clock
from kvrelay.errors import Incompatible, PeerUnavailable, QuiescenceLost, ServingError
from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.transfer import cuda_ipc_page, manifest
from kvrelay.transfer.base import BlockCopy, BlockGeneration, PullStats, RemoteHold
from kvrelay.transfer.cuda_ipc_copy import WINDOW_NUM_BYTES, check_sources, copy_runs
from kvrelay.transfer.cuda_ipc_map import MappedDevice, PeerDevices
from kvrelay.transfer.cuda_ipc_page import DevicePage
from kvrelay.transfer.cuda_runtime import (
    CudaApi,
    CudaStream,
    DeviceFailed,
    ExportedEvent,
    ExportedMemory,
    allocation_of,
    process_token,
)
from kvrelay.transfer.host import host_identity
from kvrelay.transfer.refusals import Refusals
from kvrelay.transfer.runs import runs_of
from kvrelay.transfer.shm_map import PeerMemories, PeerMemory
from kvrelay.transfer.shm_serve import DescriptorServer
from kvrelay.transfer.side_thread import SideThread, ended, raise_if_cancelled
from kvrelay.types import TransportOffer


class CudaIpcTransport:
    """See `KvTransport`. For processes of one user on one host, each with a CUDA device."""

    name = "cuda_ipc"
    lands_on: Literal["host", "device"] = "device"

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: str,
        cuda: CudaApi,
        clock: Clock,
        max_peers: int = 64,
        connect_timeout_s: float = 2.0,
        copy_timeout_s: float = 10.0,
        quiesce_timeout_s: float = 5.0,
    ) -> None:
        """`copy_timeout_s` is for one pull; what is then still under way has `quiesce_timeout_s`
        to end, or `pull` raises `QuiescenceLost`.
        """
        self._worker_id = worker_id
        self._epoch = epoch
        self._cuda = cuda
        self._clock = clock
        self._max_peers = max_peers
        self._connect_timeout_s = connect_timeout_s
        self._copy_timeout_s = copy_timeout_s
        self._quiesce_timeout_s = quiesce_timeout_s
        self._host = host_identity()
        self._registered: _Registered | None = None
        self._stops: set[threading.Event] = set()
        self._mapping: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._refusals = Refusals()
        self._is_closed = False

    def register(self, cache: KvCache) -> None:
        """Raises:
        Incompatible: this device's memory cannot be shared.
        """
        assert self._registered is None, "registered twice"
        assert isinstance(cache, DeviceCache), "the cache is not on a device"
        begin = cache.device_bytes.data_ptr()
        try:
            self._cuda.use_device()
            memory = self._cuda.export_memory(begin, cache.num_bytes)
            written = self._cuda.export_event()
            stream = self._cuda.open_stream()
        except DeviceFailed as error:
            raise Incompatible(
                f"device memory cannot be shared: {error} "
                "(memory of PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True never can)"
            ) from error
        page = DevicePage(
            process=self._cuda.process_token(),
            memory=memory.handle,
            offset=memory.offset,
            num_bytes=cache.num_bytes,
            written=written.handle,
        )
        thread = SideThread("kv-cuda-ipc-copy")
        self._registered = _Registered(
            begin=begin,
            num_bytes=cache.num_bytes,
            written=written,
            stream=stream,
            server=self._served(page),
            peers=PeerMemories(
                max_peers=self._max_peers,
                connect_timeout_s=self._connect_timeout_s,
                clock=self._clock,
            ),
            devices=PeerDevices(self._cuda, thread, map_timeout_s=self._connect_timeout_s),
            thread=thread,
        )

    def describe(self) -> TransportOffer:
        return TransportOffer(name=self.name, address=self._here.server.address, host=self._host)

    def can_pull(self, offer: TransportOffer) -> bool:
        return offer.name == self.name and offer.host == self._host

    def written(self, stream: int) -> None:
        """Have pulls that begin later wait for all that is in `stream` now.

        For a holder that announces blocks before the device has written them. For any thread.
        """
        self._cuda.record(self._here.written.event, stream)

    def prepare(self, remote: RemoteHold) -> bool:
        """Unless the holder's memory could not be mapped lately. It is mapped meanwhile, and a
        pull waits for that.
        """
        here, peer = self._here, (remote.worker_id, remote.epoch)
        page = here.peers.known(remote)
        is_mapped = page is not None and here.devices.has(page)
        is_refused = self._refusals.has(remote)
        shall_try = self._refusals.shall_try(remote, self._clock.now())
        if (is_refused or not is_mapped) and shall_try and peer not in self._mapping:
            mapping = self._mapping[peer] = asyncio.create_task(self._try(here, remote))
            mapping.add_done_callback(lambda _: self._mapping.pop(peer))
        return not is_refused

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        """Whether the hold lasted is left to `Release`."""
        here = self._here
        assert all(0 <= copy.target_offset <= here.num_bytes - copy.num_bytes for copy in copies)
        started = self._clock.now()
        async with AsyncExitStack() as used:
            page, source = await self._map(here, remote, used)
            check_sources(source, copies, remote)
            is_whole = await self._copy(source, copies, remote)
            if not is_whole or not page.is_alive():
                raise PeerUnavailable(f"holder {remote.worker_id} or we went away during a pull")
        return PullStats(
            num_bytes=sum(copy.num_bytes for copy in copies),
            elapsed_s=self._clock.now() - started,
        )

    def still(self, remote: RemoteHold, blocks: Sequence[BlockGeneration]) -> bool | None:
        """Only the holder can tell."""
        return None

    async def close(self) -> None:
        """Pulls under way end with `PeerUnavailable`. Waits for at most one window's copy."""
        self._is_closed = True
        here, self._registered = self._registered, None
        if here is None:
            return
        for mapping in self._mapping.values():
            mapping.cancel()
        for stop in self._stops:
            stop.set()
        here.server.close()
        await here.peers.close()
        here.devices.close()
        closing = here.thread.call(partial(_close_device, self._cuda, here))
        here.thread.close()
        if await ended(closing, within_s=self._quiesce_timeout_s):
            with suppress(DeviceFailed):  # the process is about to end; nothing is left to save
                closing.result()
        raise_if_cancelled()

    @property
    def _here(self) -> "_Registered":
        if self._is_closed:
            raise PeerUnavailable("the cuda_ipc transport is closed")
        assert self._registered is not None, "not registered"
        return self._registered

    def _served(self, page: DevicePage) -> DescriptorServer:
        said = manifest.MemoryManifest(
            worker_id=self._worker_id,
            epoch=self._epoch,
            num_bytes=cuda_ipc_page.PAGE_NUM_BYTES,
            resident_num_bytes=cuda_ipc_page.PAGE_NUM_BYTES,
            num_blocks=0,
            generations_offset=0,
        )
        fd = cuda_ipc_page.sealed(page)
        try:
            return DescriptorServer(fd, manifest.encode(said), max_peers=self._max_peers)
        finally:
            os.close(fd)  # the server has its own

    async def _try(self, here: "_Registered", remote: RemoteHold) -> None:
        with suppress(ServingError):  # whoever pulls meets it, too
            async with AsyncExitStack() as used:
                await self._map(here, remote, used)

    async def _map(
        self, here: "_Registered", remote: RemoteHold, used: AsyncExitStack
    ) -> tuple[PeerMemory, MappedDevice]:
        """The holder's page and memory, until `used` ends."""
        try:
            page = await used.enter_async_context(here.peers.use(remote))
            source = await here.devices.of(page, remote)
        except PeerUnavailable:
            self._refusals.refused(remote, self._clock.now())
            raise
        self._refusals.reached(remote)
        return page, source

    async def _copy(
        self, source: MappedDevice, copies: Sequence[BlockCopy], remote: RemoteHold
    ) -> bool:
        """Whether all was copied. When this returns or raises, nothing is being copied; but
        where it raises `QuiescenceLost`.
        """
        here = self._here
        stop = threading.Event()
        self._stops.add(stop)
        runs = runs_of(copies, max_bytes=WINDOW_NUM_BYTES)
        copying = here.thread.call(
            partial(
                copy_runs,
                self._cuda,
                here.stream,
                runs,
                source=source,
                target=here.begin,
                is_unwanted=stop.is_set,
            )
        )
        try:
            async with asyncio.timeout(self._copy_timeout_s):
                return await asyncio.shield(copying)
        except (TimeoutError, asyncio.CancelledError) as error:
            stop.set()
            await self._require_end(copying, remote)
            if isinstance(error, TimeoutError):
                raise PeerUnavailable(
                    f"copying from {remote.worker_id} took more than {self._copy_timeout_s} s"
                ) from None
            raise
        except DeviceFailed as error:
            raise PeerUnavailable(f"copying from {remote.worker_id} failed: {error}") from error
        finally:
            self._stops.discard(stop)

    async def _require_end(self, copying: "asyncio.Future[bool]", remote: RemoteHold) -> None:
        """Return when nothing is being copied any more.

        Raises:
            QuiescenceLost: it did not end.
        """
        if not await ended(copying, within_s=self._quiesce_timeout_s):
            raise QuiescenceLost(
                f"a copy from {remote.worker_id} has not ended "
                f"{self._quiesce_timeout_s} s after it was given up"
            )
        if isinstance(lost := copying.exception(), QuiescenceLost):
            raise lost
        raise_if_cancelled()


@dataclass(frozen=True, slots=True)
class _Registered:
    """What exists between `register` and `close`."""

    begin: int
    num_bytes: int
    written: ExportedEvent
    stream: CudaStream
    server: DescriptorServer
    peers: PeerMemories
    devices: PeerDevices
    thread: SideThread


def _close_device(cuda: CudaApi, here: _Registered) -> None:
    cuda.use_device()
    here.stream.close()
    cuda.close_event(here.written.event)


class CupyCuda:
    """`CudaApi` by CuPy, for one device of this process."""

    def __init__(self, device: int) -> None:
        """Raises:
        Incompatible: CuPy is not installed.
        """
        self._runtime = _cupy_runtime()
        self._device = device

    def use_device(self) -> None:
        with _said_by_cuda():
            self._runtime.setDevice(self._device)

    def device_uuid(self) -> str:
        # CuPy's ends at its first zero byte.
        return str(torch.cuda.get_device_properties(self._device).uuid)

    def process_token(self) -> bytes:
        return process_token()

    def open_stream(self) -> CudaStream:
        return _CupyStream(self._runtime)

    def export_memory(self, pointer: int, num_bytes: int) -> ExportedMemory:
        begin, size = allocation_of(pointer)
        if pointer + num_bytes > begin + size:
            raise DeviceFailed("it lies in more than one allocation")
        with _said_by_cuda():
            handle: bytes = self._runtime.ipcGetMemHandle(begin)
        return ExportedMemory(handle=handle, offset=pointer - begin)

    def map_memory(self, handle: bytes) -> int:
        with _said_by_cuda():
            pointer: int = self._runtime.ipcOpenMemHandle(handle)
        return pointer

    def unmap_memory(self, pointer: int) -> None:
        with _said_by_cuda():
            self._runtime.ipcCloseMemHandle(pointer)

    def export_event(self) -> ExportedEvent:
        flags = self._runtime.eventInterprocess | self._runtime.eventDisableTiming
        with _said_by_cuda():
            event: int = self._runtime.eventCreateWithFlags(flags)
            handle: bytes = self._runtime.ipcGetEventHandle(event)
        return ExportedEvent(event=event, handle=handle)

    def import_event(self, handle: bytes) -> int:
        with _said_by_cuda():
            event: int = self._runtime.ipcOpenEventHandle(handle)
        return event

    def record(self, event: int, stream: int) -> None:
        with _said_by_cuda():
            self._runtime.eventRecord(event, stream)

    def close_event(self, event: int) -> None:
        with _said_by_cuda():
            self._runtime.eventDestroy(event)


class _CupyStream:
    """`CudaStream` by CuPy. Waits on an event that lets the processor sleep meanwhile."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        with _said_by_cuda():
            # Not ordered with the default stream, which the model may be using.
            self._stream: int = runtime.streamCreateWithFlags(runtime.streamNonBlocking)
            flags = runtime.eventBlockingSync | runtime.eventDisableTiming
            self._over: int = runtime.eventCreateWithFlags(flags)

    @property
    def pointer(self) -> int:
        return self._stream

    def copy(self, *, target: int, source: int, num_bytes: int) -> None:
        kind = self._runtime.memcpyDefault
        with _said_by_cuda():
            self._runtime.memcpyAsync(target, source, num_bytes, kind, self._stream)

    def wait_for(self, event: int) -> None:
        with _said_by_cuda():
            self._runtime.streamWaitEvent(self._stream, event)

    def synchronize(self) -> None:
        with _said_by_cuda():
            self._runtime.eventRecord(self._over, self._stream)
            self._runtime.eventSynchronize(self._over)

    def close(self) -> None:
        with _said_by_cuda():
            self._runtime.eventDestroy(self._over)
            self._runtime.streamDestroy(self._stream)


def _cupy_runtime() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise Incompatible(
            "transports between GPUs need CuPy: install kvrelay[cuda12] or kvrelay[cuda13]"
        ) from error
    return cupy.cuda.runtime


@contextmanager
def _said_by_cuda() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # CuPy's errors of CUDA are
        raise DeviceFailed(str(error)) from error
