"""Attention of generated rows over paged KV, by splits of the keys.

A split has a fixed size at a fixed position, whatever the batch: a long row has many and fills
the device with them, a short one has few. Splits are put together in ascending order, so a
row's bits depend on that row alone.

Source: Flash-Decoding (Dao et al. 2023); differs in that the split does not follow the load.
"""

from dataclasses import dataclass

import torch

from kvrelay.kernels.lang import jit, power_of_2, tl
from kvrelay.kernels.prompt_attention import LOG2E, attended, gathered

KEY_TILE = 64
"""Keys of one product."""

SPLIT = 256
"""Keys of one program."""

COMBINE = 16
"""Splits put together at a time. All three are part of the numerics."""


@dataclass(frozen=True, slots=True)
class SplitSums:
    """What splits leave for being put together; float32."""

    tops: torch.Tensor  # [num_rows, num_heads, num_splits]
    totals: torch.Tensor  # like `tops`
    values: torch.Tensor  # [num_rows, num_heads, num_splits, head_dim]


def split_sums(
    num_rows: int, num_heads: int, num_splits: int, head_dim: int, device: torch.device
) -> SplitSums:
    """Room for rows of up to `num_splits * SPLIT` keys."""
    shape = (num_rows, num_heads, num_splits)
    tops = torch.empty(shape, dtype=torch.float32, device=device)
    values = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
    return SplitSums(tops, torch.empty_like(tops), values)


@jit(varying=("num_splits",))
def _split_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    row_tables,
    positions,
    tops,
    totals,
    values_out,
    scale,
    num_splits,
    table_stride,
    cache_block_stride,
    cache_slot_stride,
    cache_head_stride,
    num_heads,
    group_size,
    block_size,
    window,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    position = tl.load(positions + row)
    num_keys = position + 1
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, num_keys)
    if HAS_WINDOW:
        begin = tl.maximum(begin, tl.maximum(num_keys - window, 0) // KEY_TILE * KEY_TILE)
    if begin >= end:
        return
    member = tl.arange(0, GROUP)
    dim = tl.arange(0, DIM)
    has_member = member < group_size
    has_dim = dim < HEAD_DIM
    head = row * num_heads + kv_head * group_size + member
    inside = has_member[:, None] & has_dim[None, :]
    queries = tl.load(q + head[:, None] * HEAD_DIM + dim[None, :], mask=inside, other=0.0)
    table = block_tables + tl.load(row_tables + row).to(tl.int64) * table_stride
    head_offset = kv_head * cache_head_stride
    top = tl.full((GROUP,), -1e30, dtype=tl.float32)
    total = tl.zeros((GROUP,), dtype=tl.float32)
    values = tl.zeros((GROUP, DIM), dtype=tl.float32)
    for first_key in range(begin, end, KEY_TILE):
        key = first_key + tl.arange(0, KEY_TILE)
        has_key = key < num_keys
        block = tl.load(table + key // block_size, mask=has_key, other=0).to(tl.int64)
        slot = block * cache_block_stride + (key % block_size) * cache_slot_stride + head_offset
        k = tl.load(
            k_cache + slot[None, :] + dim[:, None],
            mask=has_key[None, :] & has_dim[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, k, input_precision="ieee") * scale
        seen = has_key
        if HAS_WINDOW:
            seen = seen & (key > position - window)
        scores = tl.where(seen[None, :], scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(seen[None, :], tl.exp2(scores - new_top[:, None]), 0.0)
        fade = tl.exp2(top - new_top)
        v = tl.load(
            v_cache + slot[:, None] + dim[None, :],
            mask=has_key[:, None] & has_dim[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(weights, axis=1)
        values = values * fade[:, None]
        values = tl.dot(weights.to(v.dtype), v, values, input_precision="ieee")
        top = new_top
    at = head * num_splits + split
    tl.store(tops + at, top, mask=has_member)
    tl.store(totals + at, total, mask=has_member)
    tl.store(values_out + at[:, None] * HEAD_DIM + dim[None, :], values, mask=inside)


@jit(varying=("num_splits",))
def _combine_kernel(
    tops,
    totals,
    values_in,
    positions,
    out,
    num_splits,
    num_heads,
    window,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = row * num_heads + tl.program_id(1)
    num_keys = tl.load(positions + row) + 1
    if num_keys <= 0:
        return
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(num_keys - window, 0) // SPLIT
    last = tl.cdiv(num_keys, SPLIT)
    dim = tl.arange(0, DIM)
    has_dim = dim < HEAD_DIM
    top = -1e30
    total = 0.0
    values = tl.zeros((DIM,), dtype=tl.float32)
    for begin in range(first // COMBINE * COMBINE, last, COMBINE):
        split = begin + tl.arange(0, COMBINE)
        written = (split >= first) & (split < last)
        at = head * num_splits + split
        tile_tops = tl.load(tops + at, mask=written, other=-1e30)
        tile_totals = tl.load(totals + at, mask=written, other=0.0)
        tile_values = tl.load(
            values_in + at[:, None] * HEAD_DIM + dim[None, :],
            mask=written[:, None] & has_dim[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tile_tops, axis=0))
        fade = tl.exp2(top - new_top)
        share = tl.where(written, tl.exp2(tile_tops - new_top), 0.0)
        total = total * fade + tl.sum(tile_totals * share, axis=0)
        values = values * fade + tl.sum(tile_values * share[:, None], axis=0)
        top = new_top
    at = out + head * HEAD_DIM + dim
    tl.store(at, (values / total).to(out.dtype.element_ty), mask=has_dim)


def generation_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_tables: torch.Tensor,
    positions: torch.Tensor,
    sums: SplitSums,
    *,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Each row attends to its sequence up to itself, whose KV is already written.

    Args:
        q: [num_rows, num_heads, head_dim], contiguous.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], last dimension contiguous;
            one layer of the cache.
        v_cache: as `k_cache`, of the same strides.
        block_tables: [num_tables, max_blocks], int32, rows contiguous.
        row_tables: [num_rows], int32: which table a row's blocks are in.
        positions: [num_rows], int32; negative for padding, of which nothing is computed.
        sums: room for the longest row; overwritten.
        scale: what scores are multiplied by.
        window: tokens a row sees, itself included; None for all.
        out: like `q`; rows of padding are left as they are.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[2]
    num_splits = sums.tops.shape[2]
    assert k_cache.stride() == v_cache.stride()
    group = num_heads // num_kv_heads
    dim = max(16, power_of_2(head_dim))
    _split_kernel[(num_rows, num_kv_heads, num_splits)](
        q,
        k_cache,
        v_cache,
        block_tables,
        row_tables,
        positions,
        sums.tops,
        sums.totals,
        sums.values,
        scale * LOG2E,
        num_splits,
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        num_heads,
        group,
        k_cache.shape[1],
        window or 0,
        HEAD_DIM=head_dim,
        DIM=dim,
        GROUP=max(16, power_of_2(group)),
        KEY_TILE=KEY_TILE,
        SPLIT=SPLIT,
        HAS_WINDOW=window is not None,
        num_warps=4,
        num_stages=3,
    )
    _combine_kernel[(num_rows, num_heads)](
        sums.tops,
        sums.totals,
        sums.values,
        positions,
        out,
        num_splits,
        num_heads,
        window or 0,
        HEAD_DIM=head_dim,
        DIM=dim,
        SPLIT=SPLIT,
        COMBINE=COMBINE,
        HAS_WINDOW=window is not None,
        num_warps=4,
    )


def generation_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    row_tables: torch.Tensor,
    positions: torch.Tensor,
    sums: SplitSums,
    *,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """See `generation_attention`; needs no sums."""
    places = zip(row_tables.tolist(), positions.tolist(), strict=True)
    for row, (table, position) in enumerate(places):
        if position < 0:
            continue
        at = positions[row : row + 1]
        k = gathered(k_cache, block_tables[table], position + 1)
        v = gathered(v_cache, block_tables[table], position + 1)
        out[row : row + 1] = attended(q[row : row + 1], k, v, at, scale=scale, window=window)
