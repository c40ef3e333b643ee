"""The KV of one worker on a device, and room for it in host memory for whoever moves it there.

    1. blocks are computed on the device, or land there
    2. those that a transport of the host is about to move are copied with `to_host`, and it reads
       them there, as it does on a machine without a device
    3. blocks that such a transport has filled go to the device with `landed`, before anybody
       computes with them

The device's side is what counts. The host's is what it was when somebody last copied or pulled.
"""

from collections.abc import Iterable, Iterator, Sequence

import structlog
import torch

from kvrelay.kv.cache import KvCache, values_of
from kvrelay.kv.layout import KvLayout

log = structlog.get_logger(__name__)


class DeviceCache(KvCache):
    """Owns the memory on both sides; each takes `num_bytes`.

    `tensor`, `bytes` and what else a `KvCache` has are the host's side. On a CUDA device it is
    page-locked where the system allows it, so that copies run beside the computation.
    """

    has_device = True

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        shareable: bool,
        device: torch.device,
        staging_num_bytes: int = 0,
    ) -> None:
        super().__init__(
            layout, num_blocks, shareable=shareable, staging_num_bytes=staging_num_bytes
        )
        self.device = device
        self._device_memory: torch.Tensor | None = torch.zeros(
            self.num_bytes, dtype=torch.uint8, device=device
        )
        self._to_host = self._to_device = None
        self._locked_at: int | None = None
        if device.type == "cuda":
            self._to_host = torch.cuda.Stream(device)
            self._to_device = torch.cuda.Stream(device)
            self._locked_at = _page_lock(self._open)

    @property
    def on_device(self) -> torch.Tensor:
        """[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], contiguous.

        Of a layout that is not quantized, as `tensor`.
        """
        assert not self.layout.is_quantized, self.layout.dtype
        return values_of(self.device_bytes, self.layout, self.num_blocks)

    @property
    def device_bytes(self) -> torch.Tensor:
        """[num_bytes], uint8, the whole memory on the device: blocks, then staging."""
        assert self._device_memory is not None, "the cache is closed"
        return self._device_memory

    def to_host(self, blocks: Iterable[int]) -> None:
        """Copy blocks to the host; they are there on return. For any thread.

        Their step has ended, or their landing: whoever took it waited for the device then. So
        what is launched now comes after all that wrote to them, in whichever stream that was,
        and beside what is being computed.
        """
        if self._to_host is None:
            self._copy(self._open, self.device_bytes, blocks)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._to_host):
            self._copy(self._open, self.device_bytes, blocks)
            self._to_host.synchronize()

    def lanes64(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        from kvrelay.kernels.digest import lanes64_ranges

        return lanes64_ranges(self.device_bytes, ranges)

    def landed(self, blocks: Iterable[int]) -> None:
        """Copy blocks that a pull has filled to the device; they are there on return.

        For any thread: the blocks are their landing sequence's, so nothing computes with them.
        """
        if self._to_device is None:
            self._copy(self.device_bytes, self._open, blocks)
            return
        with torch.cuda.device(self.device), torch.cuda.stream(self._to_device):
            self._copy(self.device_bytes, self._open, blocks)
            self._to_device.synchronize()

    def close(self) -> None:
        """Let go of both sides. Safe to repeat."""
        if self._locked_at is not None:
            _page_unlock(self._locked_at)
            self._locked_at = None
        self._device_memory = None
        super().close()

    def _copy(self, target: torch.Tensor, source: torch.Tensor, blocks: Iterable[int]) -> None:
        each = self.layout.block_num_bytes
        for first, last in ((first * each, last * each) for first, last in runs_of(blocks)):
            target[first:last].copy_(source[first:last], non_blocking=True)


def runs_of(blocks: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of neighbours, each block once, in ascending order."""
    first = last = -1
    for block in sorted(set(blocks)):
        if block != last:
            if last > first:
                yield first, last
            first = block
        last = block + 1
    if last > first:
        yield first, last


def _page_lock(memory: torch.Tensor) -> int | None:
    """Where the locked memory begins; None where the system does not allow it."""
    code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    if code != 0:
        log.warning("kv.not_page_locked", cuda_error=code, num_bytes=memory.nbytes)
        return None
    return memory.data_ptr()


def _page_unlock(address: int) -> None:
    code = int(torch.cuda.cudart().cudaHostUnregister(address))
    if code != 0:
        log.warning("kv.not_unlocked", cuda_error=code)
