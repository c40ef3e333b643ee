"""Copies between device memories, for a thread: so many bytes at a time, and never one too late."""

from collections.abc import Callable, Iterator, Sequence

from kvrelay.errors import KvCorrupt, QuiescenceLost
from kvrelay.transfer.base import BlockCopy, RemoteHold
from kvrelay.transfer.cuda_ipc_map import MappedDevice
from kvrelay.transfer.cuda_runtime import CudaApi, CudaStream, DeviceFailed
from kvrelay.transfer.runs import Run

WINDOW_NUM_BYTES = 128 << 20
"""Most bytes enqueued between two looks at whether the pull is still wanted: 0.1 ms within one
device, 6 ms over PCIe."""


def check_sources(source: MappedDevice, copies: Sequence[BlockCopy], remote: RemoteHold) -> None:
    """Refuse ranges that the holder does not have."""
    for copy in copies:
        if not 0 <= copy.source_offset <= source.num_bytes - copy.num_bytes:
            raise KvCorrupt(
                f"{copy.num_bytes} bytes at {copy.source_offset} announced by {remote.worker_id}, "
                f"which has {source.num_bytes}"
            )


def copy_runs(
    cuda: CudaApi,
    stream: CudaStream,
    runs: Sequence[Run],
    *,
    source: MappedDevice,
    target: int,
    is_unwanted: Callable[[], bool],
) -> bool:
    """Copy into the memory that begins at `target`; whether all was copied. For a thread.

    When this returns or raises, nothing is being copied.

    Raises:
        QuiescenceLost: or nobody can tell.
    """
    cuda.use_device()
    try:
        stream.wait_for(source.written)
        for window in _windows(runs):
            if is_unwanted():
                return False
            for run in window:
                stream.copy(
                    target=target + run.target_offset,
                    source=source.begin + run.source_offset,
                    num_bytes=run.num_bytes,
                )
            stream.synchronize()
    except DeviceFailed:
        try:
            stream.synchronize()
        except DeviceFailed as error:
            raise QuiescenceLost(f"a stream that fails to end: {error}") from error
        raise
    return True


def _windows(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """`runs` in order, so many at a time that they have about `WINDOW_NUM_BYTES`."""
    window: list[Run] = []
    num_bytes = 0
    for run in runs:
        if window and num_bytes + run.num_bytes > WINDOW_NUM_BYTES:
            yield window
            window, num_bytes = [], 0
        window.append(run)
        num_bytes += run.num_bytes
    if window:
        yield window
