"""Attention of prompt rows over paged KV, by tiles of queries.

Keys are read at absolute positions, in tiles of fixed size and ascending order. A key that a
row may not see adds an exact zero to it. So a row's bits depend on that row alone: a prompt
may be cut anywhere, and its chunks may share a step with any others.

Source: FlashAttention (Dao et al. 2022), algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvrelay.kernels.lang import jit, power_of_2, tl

QUERY_TILE = 128
"""Prompt rows of one program."""

KEY_TILE = 64
"""Keys of one product. Part of the numerics."""

LOG2E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class QueryTiles:
    """Up to `QUERY_TILE` consecutive rows of one prompt each; all [num_tiles], int32."""

    tables: torch.Tensor
    """Which block table."""

    rows: torch.Tensor
    """The first of its rows."""

    lengths: torch.Tensor
    positions: torch.Tensor
    """Where in the prompt its first row is."""

    @property
    def num_tiles(self) -> int:
        return len(self.tables)


def query_tiles(runs: Sequence[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """Cut runs of (table, first row, number of rows, first position) into tiles of the same."""
    return [
        (table, row + offset, min(QUERY_TILE, num_rows - offset), position + offset)
        for table, row, num_rows, position in runs
        for offset in range(0, num_rows, QUERY_TILE)
    ]


@jit()
def _prompt_kernel(
    q,
    k_cache,
    v_cache,
    block_tables,
    tile_tables,
    tile_rows,
    tile_lengths,
    tile_positions,
    out,
    scale,
    table_stride,
    cache_block_stride,
    cache_slot_stride,
    cache_head_stride,
    row_stride,
    group_size,
    block_size,
    window,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    KEY_TILE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    tile = tl.program_id(0)
    head = tl.program_id(1)
    first_row = tl.load(tile_rows + tile)
    num_rows = tl.load(tile_lengths + tile)
    first_position = tl.load(tile_positions + tile)
    table = block_tables + tl.load(tile_tables + tile).to(tl.int64) * table_stride
    offset = tl.arange(0, QUERY_TILE)
    dim = tl.arange(0, DIM)
    row = (first_row + offset).to(tl.int64)
    has_row = offset < num_rows
    has_dim = dim < HEAD_DIM
    q_at = q + row[:, None] * row_stride + head * HEAD_DIM + dim[None, :]
    queries = tl.load(q_at, mask=has_row[:, None] & has_dim[None, :], other=0.0)
    end = first_position + num_rows
    # Rows past the tile's last stand in for it, so that they see something.
    position = tl.minimum(first_position + offset, end - 1)
    begin = 0
    if HAS_WINDOW:
        begin = tl.maximum(first_position - window + 1, 0) // KEY_TILE * KEY_TILE
    head_offset = (head // group_size) * cache_head_stride
    top = tl.full((QUERY_TILE,), -1e30, dtype=tl.float32)
    total = tl.zeros((QUERY_TILE,), dtype=tl.float32)
    values = tl.zeros((QUERY_TILE, DIM), dtype=tl.float32)
    for first_key in range(begin, end, KEY_TILE):
        key = first_key + tl.arange(0, KEY_TILE)
        has_key = key < end
        block = tl.load(table + key // block_size, mask=has_key, other=0).to(tl.int64)
        slot = block * cache_block_stride + (key % block_size) * cache_slot_stride + head_offset
        # What is not written yet may be anything, even NaN: it is not read.
        k = tl.load(
            k_cache + slot[None, :] + dim[:, None],
            mask=has_key[None, :] & has_dim[:, None],
            other=0.0,
        )
        scores = tl.dot(queries, k, input_precision="ieee") * scale
        seen = key[None, :] <= position[:, None]
        if HAS_WINDOW:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.where(seen, tl.exp2(scores - new_top[:, None]), 0.0)
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
    values = values / total[:, None]
    at = out + row[:, None] * row_stride + head * HEAD_DIM + dim[None, :]
    tl.store(at, values.to(out.dtype.element_ty), mask=has_row[:, None] & has_dim[None, :])


def prompt_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: QueryTiles,
    *,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """Each row attends to its prompt up to itself, whose KV is already written.

    Args:
        q: [num_rows, num_heads, head_dim], contiguous.
        k_cache: [num_blocks, block_size, num_kv_heads, head_dim], last dimension contiguous;
            one layer of the cache.
        v_cache: as `k_cache`, of the same strides.
        block_tables: [num_tables, max_blocks], int32, rows contiguous.
        tiles: every row that is to be computed is in one.
        scale: what scores are multiplied by.
        window: tokens a row sees, itself included; None for all.
        out: like `q`; written where there are tiles.
    """
    _, num_heads, head_dim = q.shape
    assert k_cache.stride() == v_cache.stride()
    dim = max(16, power_of_2(head_dim))
    _prompt_kernel[(tiles.num_tiles, num_heads)](
        q,
        k_cache,
        v_cache,
        block_tables,
        tiles.tables,
        tiles.rows,
        tiles.lengths,
        tiles.positions,
        out,
        scale * LOG2E,
        block_tables.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        q.stride(0),
        num_heads // k_cache.shape[2],
        k_cache.shape[1],
        window or 0,
        HEAD_DIM=head_dim,
        DIM=dim,
        QUERY_TILE=QUERY_TILE,
        KEY_TILE=KEY_TILE,
        HAS_WINDOW=window is not None,
        num_warps=8,
        num_stages=2,
    )


def prompt_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: QueryTiles,
    *,
    scale: float,
    window: int | None,
    out: torch.Tensor,
) -> None:
    """See `prompt_attention`."""
    columns = (tiles.tables, tiles.rows, tiles.lengths, tiles.positions)
    for table, row, num_rows, start in zip(*(c.tolist() for c in columns), strict=True):
        positions = torch.arange(start, start + num_rows, device=q.device)
        rows = slice(row, row + num_rows)
        k = gathered(k_cache, block_tables[table], start + num_rows)
        v = gathered(v_cache, block_tables[table], start + num_rows)
        out[rows] = attended(q[rows], k, v, positions, scale=scale, window=window)


def gathered(cache: torch.Tensor, table: torch.Tensor, num_keys: int) -> torch.Tensor:
    """[num_keys, num_kv_heads, head_dim] of one sequence."""
    keys = torch.arange(num_keys, device=cache.device)
    return cache[table[keys // cache.shape[1]].long(), keys % cache.shape[1]]


def attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Softmax over all keys at once, in float32. Like `q`."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    keys = torch.arange(len(k), device=q.device)
    hidden = keys[None, :] > positions[:, None]
    if window is not None:
        hidden |= keys[None, :] <= positions[:, None] - window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
