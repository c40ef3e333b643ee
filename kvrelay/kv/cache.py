"""The KV tensor of one worker, in memory that another process may map.

One run of bytes per block, so a handoff copies whole blocks. When shareable, the memory is
an anonymous file of fixed size: whoever is passed its descriptor maps the same pages.
"""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.kv.layout import KvLayout

TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_MADV_POPULATE_WRITE = 23
"""Of <linux/mman.h>, since 5.14."""


class KvCache:
    """Owns the memory until `close`; views taken of `tensor` keep only the pages alive.

    Memory is on the CPU and starts as zeros.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, *, shareable: bool) -> None:
        assert num_blocks > 0
        self.layout = layout
        self.num_blocks = num_blocks
        self.num_bytes = num_blocks * layout.block_num_bytes
        self._fd = _sealed_memory(self.num_bytes) if shareable else None
        flat = _bytes(self.num_bytes) if self._fd is None else _mapped(self._fd, self.num_bytes)
        self._blocks: npt.NDArray[np.uint8] | None
        self._blocks = flat.numpy().reshape(num_blocks, layout.block_num_bytes)
        self._tensor: torch.Tensor | None
        self._tensor = flat.view(TORCH_DTYPES[layout.dtype]).view(num_blocks, *layout.block_shape)

    @property
    def tensor(self) -> torch.Tensor:
        """[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim], contiguous."""
        assert self._tensor is not None, "the cache is closed"
        return self._tensor

    @property
    def fd(self) -> int | None:
        """Descriptor of the whole cache, owned here; None if it is not shareable."""
        return self._fd

    def populate(self) -> None:
        """Take all of the memory now. For a thread, at the start; it takes a second per GiB or so.

        Otherwise the machine finds each page when it is first written: a pull then takes ten
        times as long, and a machine that is short of memory fails in the middle of a stream.
        """
        flat = self.tensor.view(torch.uint8).flatten()
        first = flat.data_ptr()
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + self.num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        if end > begin and libc.madvise(begin, end - begin, _MADV_POPULATE_WRITE) != 0:
            # An older kernel: a byte of each page does it, too.
            flat[:: mmap.PAGESIZE].zero_()

    def block_bytes(self, block_id: int) -> memoryview:
        """Exactly that block's bytes, writable, without a copy."""
        assert self._blocks is not None, "the cache is closed"
        assert 0 <= block_id < self.num_blocks, block_id
        return memoryview(self._blocks[block_id])

    def landed(self, blocks: Iterable[int]) -> None:
        """A pull has filled and somebody verified these blocks. Call before any is computed with.

        This memory is what is computed with, so there is nothing to do. For a thread.
        """

    def close(self) -> None:
        """Close the descriptor and let go of the memory. Safe to repeat."""
        self._blocks = self._tensor = None
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


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
