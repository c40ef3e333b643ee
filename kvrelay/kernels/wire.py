"""KV on its way, on the device: `kvrelay.kv.wire.rewrite` for memory that lies there.

One program per tile of rows, a row being one slot and head of one layer, K or V. Numbers of 16
and 8 bits are made and read with integers alone, and divided as IEEE says: bit for bit what the
host makes of them, whatever the device, but for the bits of what is no number.
"""

from collections.abc import Sequence

import torch

from kvrelay.kernels.aside import aside
from kvrelay.kernels.lang import jit, power_of_2, tl
from kvrelay.kv import wire
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import KvLayout
from kvrelay.types import BlockId

TILE = 4096
"""Values that one program rewrites."""

OFFSET_MULTIPLE = 16
"""Of bytes: where every block on a device begins, so that its rows are read in wide words."""

CODES = {"bfloat16": 0, "float32": 1, "fp8": 2, "int8": 3}

# The type that a kernel sees each dtype as.
_SEEN_AS = {
    "bfloat16": torch.int16,
    "float32": torch.float32,
    "fp8": torch.uint8,
    "int8": torch.int8,
}


@jit()
def _rounded(x):
    """To whole numbers, halves to even; for |x| below 2 ** 22."""
    return (x + 12582912.0) - 12582912.0


@jit()
def _from_bfloat16(bits):
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@jit()
def _to_bfloat16(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@jit()
def _from_fp8(byte):
    bits = byte.to(tl.int32)
    size = bits & 0x7F
    # Below 2 ** -6 there is no exponent; above, it counts from 7 where float32's does from 127.
    small = size.to(tl.float32) * 0.001953125
    large = ((size << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    x = tl.where(size < 8, small, large)
    x = tl.where(size == 0x7F, float("nan"), x)
    # Not by a subtraction: of zeros there are two.
    return (x.to(tl.int32, bitcast=True) | ((bits & 0x80) << 24)).to(tl.float32, bitcast=True)


@jit()
def _to_fp8(x):
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    held = tl.minimum(size, 0x43E00000)  # 448.0
    small = _rounded(held.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    large = ((held + 0x7FFFF + ((held >> 20) & 1)) >> 20) - (120 << 3)
    byte = tl.where(held < 0x3C800000, small, large)  # 2 ** -6
    byte = tl.where(size > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@jit()
def _int8_scale(x):
    """Of each row, as bfloat16's bits."""
    # Sizes of floats are ordered as their bits are, and what is no number comes last.
    size = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    largest = size.to(tl.float32, bitcast=True)
    return _to_bfloat16(tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32)))


@jit()
def _to_int8(x, scale):
    divides = (scale > 0) & (scale < float("inf"))
    by = tl.where(divides, scale, 1.0)
    whole = tl.div_rn(x, tl.broadcast_to(by[:, None], x.shape))
    whole = tl.where(divides[:, None], whole, 0.0)
    return _rounded(tl.minimum(tl.maximum(whole, -127.0), 127.0)).to(tl.int8)


@jit()
def _read(seen, scale_bits, CODE: tl.constexpr):
    if CODE == 0:
        x = _from_bfloat16(seen)
    elif CODE == 1:
        x = seen
    elif CODE == 2:
        x = _from_fp8(seen)
    else:
        x = seen.to(tl.float32) * _from_bfloat16(scale_bits)[:, None]
    return x


@jit(varying=("first_token", "end_token", "source_first", "target_first"))
def _rewrite_kernel(
    source,
    source_scales,
    target,
    target_scales,
    source_offsets,
    target_offsets,
    first_token,
    end_token,
    source_first,
    target_first,
    source_block_size,
    target_block_size,
    source_values_num_bytes,
    target_values_num_bytes,
    num_heads,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    SOURCE_NUM_BYTES: tl.constexpr,
    TARGET_NUM_BYTES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
):
    plane = tl.program_id(1)  # one layer's K or V
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = first_token + row // num_heads
    head = row % num_heads
    is_row = token < end_token
    source_slot = token - source_first
    target_slot = token - target_first
    source_at = tl.load(source_offsets + source_slot // source_block_size, mask=is_row, other=0)
    target_at = tl.load(target_offsets + target_slot // target_block_size, mask=is_row, other=0)
    source_at = tl.multiple_of(source_at, 16)
    target_at = tl.multiple_of(target_at, 16)
    source_row = (plane * source_block_size + source_slot % source_block_size) * num_heads + head
    target_row = (plane * target_block_size + target_slot % target_block_size) * num_heads + head

    column = tl.arange(0, DIM)
    inside = is_row[:, None] & (column < HEAD_DIM)[None, :]
    read_at = (source_at // SOURCE_NUM_BYTES + source_row * HEAD_DIM)[:, None] + column[None, :]
    write_at = (target_at // TARGET_NUM_BYTES + target_row * HEAD_DIM)[:, None] + column[None, :]
    seen = tl.load(source + read_at, mask=inside, other=0)
    scale_bits = tl.zeros((ROWS,), tl.int16)
    if SOURCE == 3:
        scales_at = (source_at + source_values_num_bytes) // 2 + source_row
        scale_bits = tl.load(source_scales + scales_at, mask=is_row, other=0)

    if SOURCE == TARGET:
        said = seen
    else:
        x = _read(seen, scale_bits, SOURCE)
        if TARGET == 0:
            said = _to_bfloat16(x)
        elif TARGET == 1:
            said = x
        elif TARGET == 2:
            said = _to_fp8(x)
        else:
            scale_bits = _int8_scale(x)
            said = _to_int8(x, _from_bfloat16(scale_bits))
    tl.store(target + write_at, said, mask=inside)
    if TARGET == 3:
        scales_at = (target_at + target_values_num_bytes) // 2 + target_row
        tl.store(target_scales + scales_at, scale_bits, mask=is_row)


def pack(
    cache: DeviceCache, blocks: Sequence[BlockId], layout: KvLayout, target_offsets: Sequence[int]
) -> None:
    """As `kvrelay.kv.wire.pack`, on the device's side; done on return. For a thread."""
    assert min(target_offsets, default=cache.num_bytes) >= cache.staging_offset, target_offsets
    _carry_out(cache, wire.packing(cache.layout, blocks, layout, target_offsets))


def unpack(
    cache: DeviceCache,
    layout: KvLayout,
    sources: Sequence[int],
    *,
    first_wire_index: int,
    block_table: Sequence[BlockId],
    first_token: int,
    end_token: int,
) -> None:
    """As `kvrelay.kv.wire.unpack`, on the device's side; done on return. For a thread."""
    what = wire.unpacking(
        cache.layout,
        layout,
        sources,
        first_wire_index=first_wire_index,
        block_table=block_table,
        first_token=first_token,
        end_token=end_token,
    )
    _carry_out(cache, what)


def _carry_out(cache: DeviceCache, what: wire.Rewrite) -> None:
    with aside(cache.device):
        op = rewrite if cache.device.type == "cuda" else rewrite_reference
        op(cache.device_bytes, what)


def rewrite(memory: torch.Tensor, what: wire.Rewrite) -> None:
    """Carry out a rewrite in place, in the order of the device's current stream.

    Args:
        memory: [num_bytes], uint8, contiguous, on a device.
        what: of blocks that lie in it, each at a multiple of `OFFSET_MULTIPLE` bytes. Source and
            target may not overlap.
    """
    source, target = what.source, what.target
    num_rows = (what.end_token - what.first_token) * source.layout.num_kv_heads
    if num_rows == 0:
        return
    for side in (source, target):
        assert all(offset % OFFSET_MULTIPLE == 0 for offset in side.offsets), side
        assert max(side.offsets) + side.layout.block_num_bytes <= memory.numel(), side
    dim = power_of_2(source.layout.head_dim)
    rows = max(1, TILE // dim)
    scales = _seen(memory, torch.int16)
    _rewrite_kernel[(-(-num_rows // rows), source.layout.num_layers * 2)](
        _seen(memory, _SEEN_AS[source.layout.dtype]),
        scales,
        _seen(memory, _SEEN_AS[target.layout.dtype]),
        scales,
        _offsets(source, memory.device),
        _offsets(target, memory.device),
        what.first_token,
        what.end_token,
        source.first_token,
        target.first_token,
        source.layout.block_size,
        target.layout.block_size,
        source.layout.values_num_bytes,
        target.layout.values_num_bytes,
        source.layout.num_kv_heads,
        SOURCE=CODES[source.layout.dtype],
        TARGET=CODES[target.layout.dtype],
        SOURCE_NUM_BYTES=_num_bytes(source.layout),
        TARGET_NUM_BYTES=_num_bytes(target.layout),
        HEAD_DIM=source.layout.head_dim,
        DIM=dim,
        ROWS=rows,
    )


def rewrite_reference(memory: torch.Tensor, what: wire.Rewrite) -> None:
    """See `rewrite`; for memory of a host, where it is what services call."""
    wire.rewrite(memory, what)


def _seen(memory: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`memory` as numbers of `dtype`, without what a last one lacks."""
    return memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)


def _offsets(side: wire.Blocks, device: torch.device) -> torch.Tensor:
    return torch.tensor(side.offsets, dtype=torch.int64).to(device, non_blocking=True)


def _num_bytes(layout: KvLayout) -> int:
    return _SEEN_AS[layout.dtype].itemsize
