"""The prompt path's product: many rows, so its speed is that of the matrix units.

One program computes one tile of the result, over all inputs in ascending order. The tile's
shape is fixed, so where in a chunk a row lies, and how long the chunk is, change nothing in
what is summed for it: a prompt may be cut anywhere.
"""

import torch

from kvrelay.kernels.lang import jit, tl

BLOCK_M = 128
BLOCK_N = 256
BLOCK_K = 64
"""Inputs of one product. Part of the numerics."""

NUM_WARPS = 8
NUM_STAGES = 3
FEW_OUTPUTS = 2048
"""Fewer than this are multiplied in narrower tiles, or too few programs would share the work."""

GROUP_M = 8
"""Tiles of rows that walk along the outputs together, so that they find each other's weights
in the cache."""


@jit(varying=("num_rows",))
def _many_rows_kernel(
    x,
    weight,
    bias,
    out,
    num_rows,
    in_features,
    out_features,
    x_row_stride,
    weight_row_stride,
    out_row_stride,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    program = tl.program_id(0)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    tiles_n = tl.cdiv(out_features, BLOCK_N)
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = tl.minimum(tiles_m - first_m, GROUP_M)
    tile_m = first_m + (program % (GROUP_M * tiles_n)) % group_m
    tile_n = (program % (GROUP_M * tiles_n)) // group_m
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows and columns past the end read the last one, and are not stored.
    safe_row = tl.minimum(row, num_rows - 1).to(tl.int64)
    safe_column = tl.minimum(column, out_features - 1).to(tl.int64)
    rows = x + safe_row[:, None] * x_row_stride + inner[None, :]
    weights = weight + safe_column[None, :] * weight_row_stride + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, in_features, BLOCK_K):
        if EVEN_K:
            a = tl.load(rows + k)
            b = tl.load(weights + k)
        else:
            has_k = k + inner < in_features
            a = tl.load(rows + k, mask=has_k[None, :], other=0.0)
            b = tl.load(weights + k, mask=has_k[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + safe_column).to(tl.float32)[None, :]
    at = out + row.to(tl.int64)[:, None] * out_row_stride + column[None, :]
    inside = (row < num_rows)[:, None] & (column < out_features)[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


def many_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, out: torch.Tensor
) -> None:
    """`x @ weight.T + bias`.

    Args:
        x: [num_rows, in_features], last dimension contiguous.
        weight: [out_features, in_features], contiguous.
        bias: [out_features] or None.
        out: [num_rows, out_features], last dimension contiguous; written.
    """
    num_rows, in_features = x.shape
    out_features = len(weight)
    is_narrow = out_features < FEW_OUTPUTS or x.dtype == torch.float32
    block_n = 64 if is_narrow else BLOCK_N
    tiles = -(-num_rows // BLOCK_M) * -(-out_features // block_n)
    _many_rows_kernel[(tiles,)](
        x,
        weight,
        x if bias is None else bias,
        out,
        num_rows,
        in_features,
        out_features,
        x.stride(0),
        weight.stride(0),
        out.stride(0),
        HAS_BIAS=bias is not None,
        EVEN_K=in_features % BLOCK_K == 0,
        BLOCK_M=BLOCK_M,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        GROUP_M=GROUP_M,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


def many_rows_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, out: torch.Tensor
) -> None:
    """See `many_rows`."""
    out.copy_(torch.nn.functional.linear(x, weight, bias))


SLAB = 512


def slab_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, out: torch.Tensor
) -> None:
    """As `many_rows`, by the library's product of exactly `SLAB` rows at a time.

    A library chooses its kernel by the number of rows, so a row's bits can be its own only if
    that number never changes: what a step lacks is computed for nothing.
    """
    for first in range(0, len(x), SLAB):
        rows = x[first : first + SLAB]
        num_rows = len(rows)
        if num_rows < SLAB:
            rows = torch.nn.functional.pad(rows, (0, 0, 0, SLAB - num_rows))
        said = torch.nn.functional.linear(rows, weight, bias)
        out[first : first + num_rows] = said[:num_rows]
