"""Where blocks lie that travel in another form than they are kept in. Pure.

Each block of a cache has a place of its own for every dtype it can be packed to. So packing needs
no allocation and cannot run out, two handoffs that share a block pack it to the same bytes at the
same place, and a place changes its content only when its block does, which the fence finds out.
Memory that nobody packs into is never touched, and costs nothing where pages come on demand.

What lands in another form than it will be kept in comes after that, in the landing area.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace

from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout

PACKED_DTYPES = ("fp8", "int8")
"""What blocks of a wider dtype can be packed to."""

_ALIGNMENT = 4096


class StagingPlan:
    """The staging of one cache, as offsets from the beginning of its memory."""

    def __init__(
        self,
        layout: KvLayout,
        num_blocks: int,
        *,
        packs_to: Collection[str] = PACKED_DTYPES,
        landing_num_bytes: int,
    ) -> None:
        self._layouts: Mapping[str, KvLayout] = {
            dtype: replace(layout, dtype=dtype)
            for dtype in PACKED_DTYPES
            if dtype in packs_to and DTYPE_NUM_BYTES[dtype] < DTYPE_NUM_BYTES[layout.dtype]
        }
        self._first_offsets: dict[str, int] = {}
        start = end = num_blocks * layout.block_num_bytes
        for dtype, packed in self._layouts.items():
            self._first_offsets[dtype] = end = _aligned(end)
            end += num_blocks * packed.block_num_bytes
        self.landing_offset = _aligned(end)
        self.landing_num_bytes = landing_num_bytes
        self.num_bytes = self.landing_offset + landing_num_bytes - start
        """To ask for when the cache is made."""

    def can_pack_to(self, dtype: str) -> bool:
        return dtype in self._layouts

    def offset(self, block: int, dtype: str) -> int:
        """Where `block` lies when it is packed to `dtype`."""
        return self._first_offsets[dtype] + block * self._layouts[dtype].block_num_bytes


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
