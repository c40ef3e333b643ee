"""Between the qkv product and attention: head norms, rotation, and KV into its block.

One program per row and head. A row whose position is negative is padding: nothing of it is
written to the cache.
"""

import torch

from kvrelay.kernels.lang import jit, power_of_2, tl
from kvrelay.kernels.norm import sum_of_parts


@jit()
def _sum_parts(at, part_stride, inside, NUM_PARTS: tl.constexpr):
    total = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        total += tl.load(at + part * part_stride, mask=inside, other=0.0).to(tl.float32)
    return total


@jit()
def _rope_write_kernel(
    parts,
    positions,
    rope,
    block_tables,
    row_tables,
    q_norm,
    k_norm,
    q_out,
    k_cache,
    v_cache,
    eps,
    part_stride,
    row_stride,
    table_stride,
    cache_block_stride,
    cache_slot_stride,
    cache_head_stride,
    num_q_heads,
    num_kv_heads,
    block_size,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    HAS_HEAD_NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    position = tl.load(positions + row).to(tl.int64)
    if position < 0:
        return
    # A head is read as its two halves, which rotation pairs.
    column = tl.arange(0, HALF)
    inside = column < HEAD_DIM // 2
    low = column
    high = column + HEAD_DIM // 2
    at = parts + row * row_stride + head * HEAD_DIM
    x_low = _sum_parts(at + low, part_stride, inside, NUM_PARTS)
    x_high = _sum_parts(at + high, part_stride, inside, NUM_PARTS)
    if head < num_q_heads + num_kv_heads:
        if HAS_HEAD_NORM:
            mean = (tl.sum(x_low * x_low, axis=0) + tl.sum(x_high * x_high, axis=0)) / HEAD_DIM
            shrink = 1.0 / tl.sqrt(mean + eps)
            norm = q_norm
            if head >= num_q_heads:
                norm = k_norm
            x_low = x_low * shrink * tl.load(norm + low, mask=inside, other=0.0)
            x_high = x_high * shrink * tl.load(norm + high, mask=inside, other=0.0)
        # The table holds cosines, then sines whose first half is negated.
        angle = rope + position * 2 * HEAD_DIM
        cos_low = tl.load(angle + low, mask=inside, other=0.0)
        cos_high = tl.load(angle + high, mask=inside, other=0.0)
        sin_low = tl.load(angle + HEAD_DIM + low, mask=inside, other=0.0)
        sin_high = tl.load(angle + HEAD_DIM + high, mask=inside, other=0.0)
        turned_low = x_low * cos_low + x_high * sin_low
        x_high = x_high * cos_high + x_low * sin_high
        x_low = turned_low
    if head < num_q_heads:
        to = q_out + (row * num_q_heads + head) * HEAD_DIM
        tl.store(to + low, x_low.to(q_out.dtype.element_ty), mask=inside)
        tl.store(to + high, x_high.to(q_out.dtype.element_ty), mask=inside)
    else:
        table = tl.load(row_tables + row).to(tl.int64)
        block = tl.load(block_tables + table * table_stride + position // block_size).to(tl.int64)
        slot = block * cache_block_stride + (position % block_size) * cache_slot_stride
        kv_head = head - num_q_heads
        if kv_head < num_kv_heads:
            to = k_cache + slot + kv_head * cache_head_stride
        else:
            to = v_cache + slot + (kv_head - num_kv_heads) * cache_head_stride
        tl.store(to + low, x_low.to(k_cache.dtype.element_ty), mask=inside)
        tl.store(to + high, x_high.to(k_cache.dtype.element_ty), mask=inside)


def rope_write(
    parts: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    block_tables: torch.Tensor,
    row_tables: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    q_out: torch.Tensor,
) -> None:
    """Queries to `q_out`, keys and values into their slots of one layer.

    Args:
        parts: [num_parts, num_rows, (num_heads + 2 * num_kv_heads) * head_dim], the last
            dimension contiguous; q, then k, then v.
        positions: [num_rows], int32; negative for padding.
        rope: [num_positions, 2, head_dim], float32, from `layers.rope_table`.
        block_tables: [num_tables, max_blocks], int32, rows contiguous.
        row_tables: [num_rows], int32: which table a row's blocks are in.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], last dimension contiguous;
            one layer of the cache.
        v_cache: as `k_cache`, of the same strides.
        q_norm: [head_dim], float32; None for models that do not norm heads.
        k_norm: as `q_norm`.
        eps: of the head norms.
        q_out: [num_rows, num_heads, head_dim], contiguous; rows of padding are left as they are.
    """
    num_rows, num_q_heads, head_dim = q_out.shape
    num_kv_heads = k_cache.shape[2]
    assert k_cache.stride() == v_cache.stride()
    _rope_write_kernel[(num_rows, num_q_heads + 2 * num_kv_heads)](
        parts,
        positions,
        rope,
        block_tables,
        row_tables,
        rope if q_norm is None else q_norm,
        rope if k_norm is None else k_norm,
        q_out,
        k_cache,
        v_cache,
        eps,
        parts.stride(0),
        parts.stride(1),
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        num_q_heads,
        num_kv_heads,
        k_cache.shape[1],
        HEAD_DIM=head_dim,
        HALF=power_of_2(head_dim // 2),
        NUM_PARTS=len(parts),
        HAS_HEAD_NORM=q_norm is not None,
        num_warps=1,
    )


def rope_write_reference(
    parts: torch.Tensor,
    positions: torch.Tensor,
    rope: torch.Tensor,
    block_tables: torch.Tensor,
    row_tables: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    q_out: torch.Tensor,
) -> None:
    """See `rope_write`."""
    num_rows, num_q_heads, head_dim = q_out.shape
    num_kv_heads, block_size = k_cache.shape[2], k_cache.shape[1]
    real = torch.nonzero(positions >= 0).flatten()
    at = positions[real].long()
    x = sum_of_parts(parts).view(num_rows, -1, head_dim)[real]
    q, k, v = x.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    if q_norm is not None and k_norm is not None:
        q = torch.nn.functional.rms_norm(q, (head_dim,), q_norm, eps)
        k = torch.nn.functional.rms_norm(k, (head_dim,), k_norm, eps)
    cos, sin = rope[at].unsqueeze(2).unbind(1)
    q_out[real] = _rotated(q, cos, sin).to(q_out.dtype)
    blocks = block_tables[row_tables[real].long(), at // block_size].long()
    k_cache[blocks, at % block_size] = _rotated(k, cos, sin).to(k_cache.dtype)
    v_cache[blocks, at % block_size] = v.to(v_cache.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin
