"""The KV of one worker, in memory that another process may map.

One run of bytes per block, so a handoff copies whole blocks. When shareable, the memory is
an anonymous file of fixed size: whoever is passed its descriptor maps the same pages.
"""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.kv.layout import KvLayout

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

GENERATION_NUM_BYTES = 4

_MADV_POPULATE_WRITE = 23
"""Of <linux/mman.h>, since 5.14."""


class KvCache:
    """Owns the memory until `close`; views taken of it keep only the pages alive.

    `num_blocks` blocks; then `staging_num_bytes` bytes in which blocks are put that travel in
    another form; then the blocks' generations, so that whoever maps the memory can see whether
    a block that it has read was still the same. Memory is on the CPU and starts as zeros.
    """

    def __init__(
        self, layout: KvLayout, num_blocks: int, *, shareable: bool, staging_num_bytes: int = 0
    ) -> None:
        assert num_blocks > 0
        assert staging_num_bytes >= 0
        self.layout = layout
        self.num_blocks = num_blocks
        self.staging_offset = num_blocks * layout.block_num_bytes
        self.generations_offset = -(-(self.staging_offset + staging_num_bytes) // 8) * 8
        self.num_bytes = self.generations_offset + num_blocks * GENERATION_NUM_BYTES
        self._fd = _sealed_memory(self.num_bytes) if shareable else None
        self._memory: torch.Tensor | None
        self._memory = (
            _bytes(self.num_bytes) if self._fd is None else _mapped(self._fd, self.num_bytes)
        )

    @property
    def tensor(self) -> torch.Tensor:
        """[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], contiguous.

        Of a layout that is not quantized: else `values` and `scales` are meant.
        """
        assert not self.layout.is_quantized, self.layout.dtype
        return self.values

    @property
    def values(self) -> torch.Tensor:
        """As `tensor`, of any dtype; blocks may lie further apart than their values are long."""
        return values_of(self._open, self.layout, self.num_blocks)

    @property
    def scales(self) -> torch.Tensor | None:
        """[num_blocks, num_layers, 2, block_size, num_kv_heads], strided bfloat16; for int8."""
        return scales_of(self._open, self.layout, self.num_blocks)

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """[num_bytes], the whole memory: blocks, then staging."""
        flat: npt.NDArray[np.uint8] = self._open.numpy()
        return flat

    @property
    def generations(self) -> memoryview:
        """One for each block, 32 bits."""
        return self.range_bytes(
            self.generations_offset, self.num_blocks * GENERATION_NUM_BYTES
        ).cast("I")

    @property
    def _open(self) -> torch.Tensor:
        assert self._memory is not None, "the cache is closed"
        return self._memory

    @property
    def fd(self) -> int | None:
        """Descriptor of the whole cache, owned here; None if it is not shareable."""
        return self._fd

    has_device = False
    """Whether something else than this memory is computed with."""

    def populate(self) -> None:
        """Take the memory of all blocks now. For a thread, at the start; about a second per GiB.

        Otherwise the machine finds each page when it is first written: a pull then takes ten
        times as long, and a machine that is short of memory fails in the middle of a stream.
        """
        flat = self._open
        first = flat.data_ptr()
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + self.staging_offset) // mmap.PAGESIZE * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if end > begin and libc.madvise(begin, end - begin, _MADV_POPULATE_WRITE) != 0:
            # An older kernel: a byte of each page does it, too.
            flat[: self.staging_offset : mmap.PAGESIZE].zero_()

    def block_bytes(self, block_id: int) -> memoryview:
        """Exactly that block's bytes, writable, without a copy."""
        assert 0 <= block_id < self.num_blocks, block_id
        num_bytes = self.layout.block_num_bytes
        return self.range_bytes(block_id * num_bytes, num_bytes)

    def range_bytes(self, offset: int, num_bytes: int) -> memoryview:
        """Any bytes of the memory, staging included, writable, without a copy."""
        assert 0 <= offset <= offset + num_bytes <= self.num_bytes, (offset, num_bytes)
        return self.bytes[offset : offset + num_bytes].data

    def lanes64(self, ranges: Sequence[tuple[int, int]]) -> list[int]:
        """Digests of (offset, number of bytes), see `kvrelay.kernels.digest`, of what is computed
        with. For a thread.
        """
        from kvrelay.kernels.digest import lanes64  # a host rarely needs it, and it loads triton

        return [lanes64(self.bytes[at : at + num_bytes]) for at, num_bytes in ranges]

    def to_host(self, blocks: Iterable[int]) -> None:
        """Have this memory hold these blocks as they are computed with. Call before any is read
        here that is about to be moved.

        This memory is what is computed with, so there is nothing to do. For a thread.
        """

    def landed(self, blocks: Iterable[int]) -> None:
        """A pull has filled and somebody verified these blocks. Call before any is computed with.

        This memory is what is computed with, so there is nothing to do. For a thread.
        """

    def close(self) -> None:
        """Close the descriptor and let go of the memory. Safe to repeat."""
        self._memory = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def values_of(memory: torch.Tensor, layout: KvLayout, num_blocks: int) -> torch.Tensor:
    """The values of blocks that lie at the beginning of `memory`, uint8, on any device."""
    return (
        _blocks_of(memory, layout, num_blocks, 0, layout.values_num_bytes)
        .view(TORCH_DTYPES[layout.dtype])
        .view(num_blocks, *layout.block_shape)
    )


def scales_of(memory: torch.Tensor, layout: KvLayout, num_blocks: int) -> torch.Tensor | None:
    """As `values_of`; None where the layout has no scales."""
    if not layout.has_scales:
        return None
    first, last = layout.values_num_bytes, layout.block_num_bytes
    scales = _blocks_of(memory, layout, num_blocks, first, last).view(torch.bfloat16)
    return scales.view(num_blocks, *layout.scales_shape)


def _blocks_of(
    memory: torch.Tensor, layout: KvLayout, num_blocks: int, first: int, last: int
) -> torch.Tensor:
    """[num_blocks, last - first]: these bytes of each block."""
    blocks = memory[: num_blocks * layout.block_num_bytes].view(num_blocks, -1)
    return blocks[:, first:last]


def _bytes(num_bytes: int) -> torch.Tensor:
    return torch.zeros(num_bytes, dtype=torch.uint8)


def _sealed_memory(num_bytes: int) -> int:
    """A descriptor of anonymous memory whose size nobody can change any more."""
    fd = os.memfd_create("kvrelay-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError:
        os.close(fd)
        raise
    return fd


def _mapped(fd: int, num_bytes: int) -> torch.Tensor:
    # torch maps by path and keeps no descriptor, where Python's mmap would keep a second one.
    return torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=num_bytes, dtype=torch.uint8)
