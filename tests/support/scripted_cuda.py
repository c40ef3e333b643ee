"""CUDA without a device: addresses are of host memory, streams work when they are awaited.

All of one machine share a `ScriptedMachine`; each `ScriptedCuda` is a process on it.
What may go wrong is switched on by attributes, and every wait ends when the test opens its gate.
"""

import ctypes
import itertools
import threading
from collections.abc import Callable

from kvrelay.transfer.cuda_runtime import DeviceFailed, ExportedEvent, ExportedMemory

PADDING_NUM_BYTES = 4096
"""Before each exported memory in its allocation, as an allocator leaves it."""


def open_gate() -> threading.Event:
    """Cleared, whoever comes by waits until it is set again."""
    gate = threading.Event()
    gate.set()
    return gate


class ScriptedMachine:
    """Allocations and events by handle, and who has mapped what."""

    def __init__(self) -> None:
        self.allocations: dict[bytes, tuple[bytes, int]] = {}
        self.mapped: list[int] = []
        """One entry for each time; CUDA counts them, too."""
        self.events: dict[bytes, int] = {}
        self.num_recorded: dict[int, int] = {}
        self.streams: dict[int, ScriptedStream] = {}
        self._numbers = itertools.count(1)

    def number(self) -> int:
        return next(self._numbers)

    def handle(self) -> bytes:
        return self.number().to_bytes(64, "big")


class ScriptedStream:
    """Work in order, done by whoever synchronizes."""

    def __init__(self, cuda: "ScriptedCuda") -> None:
        self.pointer = cuda.machine.number()
        self.waited_for: list[int] = []
        self._cuda = cuda
        self._work: list[Callable[[], None]] = []
        cuda.machine.streams[self.pointer] = self

    def enqueue(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def copy(self, *, target: int, source: int, num_bytes: int) -> None:
        self._cuda.require_device()
        self._cuda.num_copies += 1
        if self._cuda.num_copies == self._cuda.fail_at_copy:
            raise DeviceFailed("cudaErrorInvalidValue: scripted")
        self.enqueue(lambda: self._copied(target, source, num_bytes))

    def wait_for(self, event: int) -> None:
        self._cuda.require_device()
        self.waited_for.append(event)

    def synchronize(self) -> None:
        self._cuda.require_device()
        while self._work:
            self._work.pop(0)()
        if self._cuda.is_broken:
            raise DeviceFailed("cudaErrorLaunchFailure: scripted")

    def close(self) -> None:
        del self._cuda.machine.streams[self.pointer]

    def _copied(self, target: int, source: int, num_bytes: int) -> None:
        self._cuda.copying.set()
        self._cuda.copies.wait()
        ctypes.memmove(target, source, num_bytes)


class ScriptedCuda:
    """See `CudaApi`."""

    def __init__(self, machine: ScriptedMachine, *, process: str, device: str = "gpu-0") -> None:
        self.machine = machine
        self.copies = open_gate()
        self.copying = threading.Event()
        """Somebody is at the gate, or has passed it."""
        self.maps = open_gate()
        self.num_copies = 0
        self.fail_at_copy = 0
        self.is_broken = False
        self.is_exportable = True
        self.is_reachable = True
        self._process = process.encode().ljust(16, b".")[:16]
        self.uuid = device
        self._in_use = threading.local()

    def use_device(self) -> None:
        self._in_use.is_ours = True

    def require_device(self) -> None:
        assert getattr(self._in_use, "is_ours", False), "this thread uses no device"

    def device_uuid(self) -> str:
        return self.uuid

    def process_token(self) -> bytes:
        return self._process

    def open_stream(self) -> ScriptedStream:
        self.require_device()
        return ScriptedStream(self)

    def export_memory(self, pointer: int, num_bytes: int) -> ExportedMemory:
        self.require_device()
        if not self.is_exportable:
            raise DeviceFailed("cudaErrorInvalidValue: scripted")
        handle = self.machine.handle()
        self.machine.allocations[handle] = (self._process, pointer - PADDING_NUM_BYTES)
        return ExportedMemory(handle=handle, offset=PADDING_NUM_BYTES)

    def map_memory(self, handle: bytes) -> int:
        self.require_device()
        self.maps.wait()
        process, begin = self.machine.allocations[handle]
        assert process != self._process, "CUDA crashes or refuses, depending on its version"
        if not self.is_reachable:
            raise DeviceFailed("cudaErrorMapBufferObjectFailed: scripted")
        self.machine.mapped.append(begin)
        return begin

    def unmap_memory(self, pointer: int) -> None:
        self.require_device()
        self.machine.mapped.remove(pointer)

    def export_event(self) -> ExportedEvent:
        event, handle = self.machine.number(), self.machine.handle()
        self.machine.events[handle] = event
        self.machine.num_recorded[event] = 0
        return ExportedEvent(event=event, handle=handle)

    def import_event(self, handle: bytes) -> int:
        self.require_device()
        return self.machine.events[handle]

    def record(self, event: int, stream: int) -> None:
        self.machine.num_recorded[event] += 1

    def close_event(self, event: int) -> None:
        self.require_device()
