"""The little of CUDA that transports need, as a seam: CuPy behind it in production.

Pointers, events and streams are integers, as CUDA has them. All calls are made with the device in
use by the calling thread (`use_device`); those that wait let other threads run.
"""

import ctypes
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

HANDLE_NUM_BYTES = 64
"""Of a CUDA IPC handle, for memory or an event."""


class DeviceFailed(Exception):
    """CUDA or NCCL said no. The text is the library's own."""


@dataclass(frozen=True, slots=True)
class ExportedMemory:
    """What another process of this machine needs to map some of our device memory."""

    handle: bytes
    """Names a whole allocation."""

    offset: int
    """Of the memory in it; allocators hand out pieces."""


@dataclass(frozen=True, slots=True)
class ExportedEvent:
    """An event of ours, and its name for other processes."""

    event: int
    handle: bytes


class CudaStream(Protocol):
    """A queue of work on the device."""

    @property
    def pointer(self) -> int: ...

    def copy(self, *, target: int, source: int, num_bytes: int) -> None:
        """Enqueue a copy between two addresses, on whatever devices they are."""
        ...

    def wait_for(self, event: int) -> None:
        """Enqueue nothing further before what `event` last recorded is done."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was enqueued is over. May take for ever."""
        ...

    def close(self) -> None: ...


class CudaApi(Protocol):
    """One device of this process. Every method may raise `DeviceFailed`."""

    def use_device(self) -> None:
        """For the calling thread, for all that follows."""
        ...

    def device_uuid(self) -> str: ...

    def process_token(self) -> bytes:
        """16 bytes, other ones in every process of this machine."""
        ...

    def open_stream(self) -> CudaStream: ...

    def export_memory(self, pointer: int, num_bytes: int) -> ExportedMemory: ...

    def map_memory(self, handle: bytes) -> int:
        """Where the allocation that `handle` names is in this process. Not for our own."""
        ...

    def unmap_memory(self, pointer: int) -> None: ...

    def export_event(self) -> ExportedEvent: ...

    def import_event(self, handle: bytes) -> int: ...

    def record(self, event: int, stream: int) -> None: ...

    def close_event(self, event: int) -> None: ...


def process_token() -> bytes:
    """16 bytes: equal only for calls of one process, whichever namespaces processes are in."""
    named = f"{os.getpid()} {Path('/proc/self/ns/pid').stat().st_ino}"
    return hashlib.blake2b(named.encode(), digest_size=16).digest()


def allocation_of(pointer: int) -> tuple[int, int]:
    """Where the allocation that `pointer` lies in begins, and its size.

    By the driver's own account, because CuPy does not pass this question on.
    """
    begin, num_bytes = ctypes.c_uint64(), ctypes.c_size_t()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceFailed("no CUDA driver on this machine") from error
    code = driver.cuMemGetAddressRange_v2(
        ctypes.byref(begin), ctypes.byref(num_bytes), ctypes.c_uint64(pointer)
    )
    if code != 0:
        raise DeviceFailed(f"no allocation at this address: driver error {code}")
    return begin.value, num_bytes.value
