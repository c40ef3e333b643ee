"""The generation path's product: few rows, so its speed is that of reading the weights.

A program reads `BLOCK_N` output rows of the matrix over one part of the inputs and multiplies
them with all rows of the batch at once. How the inputs are cut into parts follows from the
matrix alone, every part is summed in ascending order, and parts are left for the reader to add.
So a row's bits depend on that row alone: other rows are other columns of the same products.
"""

from collections.abc import Mapping

import torch

from kvrelay.kernels.lang import jit, power_of_2, tl
from kvrelay.kernels.matrix import Kind, Matrix, unpack

BLOCK_N = 64
BLOCK_K = 64
"""Inputs of one product where no group of scales says otherwise. Part of the numerics."""

MIN_ROWS = 16
MAX_ROWS = 128
"""Rows of one product: the batch, rounded up to a power of two between these."""

ENOUGH_PROGRAMS = 256
"""Programs that keep the memory of a large device busy: twice its multiprocessors or so."""

MIN_PART = 1024
"""Fewest inputs worth a part of their own."""

MAX_STAGES = 8

KINDS: Mapping[Kind, int] = {"plain": 0, "fp8": 1, "int8": 2, "int4": 3}
_BITS: Mapping[Kind, int] = {"plain": 16, "fp8": 8, "int8": 8, "int4": 4}


@jit()
def _from_4_bits(bits, DTYPE: tl.constexpr):
    """0 to 15 as -8 to 7."""
    if tl.bfloat16 == DTYPE:
        # The last bits of bfloat16's numbers from 128 on count ones: no conversion is needed.
        return (bits | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full((), 136.0, tl.bfloat16)
    return (bits - 8).to(DTYPE)


@jit(varying=("num_rows",))
def _few_rows_kernel(
    x,
    data,
    scale,
    bias,
    out,
    num_rows,
    in_features,
    out_features,
    part_size,
    x_row_stride,
    data_row_stride,
    scale_row_stride,
    out_part_stride,
    out_row_stride,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    part = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    has_column = column < out_features
    has_row = row < num_rows
    weights = data + column.to(tl.int64)[:, None] * data_row_stride
    rows = x + row[None, :] * x_row_stride
    first = part * part_size
    last = tl.minimum(first + part_size, in_features)
    total = tl.zeros((BLOCK_N, ROWS), dtype=tl.float32)
    if KIND == 3:
        half = tl.arange(0, BLOCK_K // 2)
        for k in range(first, last, BLOCK_K):
            packed = tl.load(weights + k // 2 + half[None, :], mask=has_column[:, None], other=0)
            packed = packed.to(tl.int16)
            x_low = tl.load(rows + k + half[:, None], mask=has_row[None, :], other=0.0)
            x_high = tl.load(
                rows + k + BLOCK_K // 2 + half[:, None], mask=has_row[None, :], other=0.0
            )
            low = _from_4_bits(packed & 15, x_low.dtype)
            high = _from_4_bits(packed >> 4, x_low.dtype)
            product = tl.dot(low, x_low, input_precision="ieee")
            product += tl.dot(high, x_high, input_precision="ieee")
            at = scale + column * scale_row_stride + k // BLOCK_K
            total += product * tl.load(at, mask=has_column, other=0.0)[:, None]
    else:
        inner = tl.arange(0, BLOCK_K)
        for k in range(first, last, BLOCK_K):
            if EVEN_K:
                w = tl.load(weights + k + inner[None, :], mask=has_column[:, None], other=0.0)
                v = tl.load(rows + k + inner[:, None], mask=has_row[None, :], other=0.0)
            else:
                has_k = k + inner < last
                w = tl.load(
                    weights + k + inner[None, :],
                    mask=has_column[:, None] & has_k[None, :],
                    other=0.0,
                )
                v = tl.load(
                    rows + k + inner[:, None], mask=has_row[None, :] & has_k[:, None], other=0.0
                )
            if KIND == 2:
                product = tl.dot(w.to(v.dtype), v, input_precision="ieee")
                at = scale + column * scale_row_stride + k // BLOCK_K
                total += product * tl.load(at, mask=has_column, other=0.0)[:, None]
            else:
                total = tl.dot(w.to(v.dtype), v, total, input_precision="ieee")
    if KIND == 1:
        total *= tl.load(scale + column, mask=has_column, other=0.0)[:, None]
    if HAS_BIAS:
        given = tl.load(bias + column, mask=has_column & (part == 0), other=0.0)
        total += given.to(tl.float32)[:, None]
    at = out + part * out_part_stride + row[None, :] * out_row_stride + column[:, None]
    tl.store(at, total, mask=has_column[:, None] & has_row[None, :])


def few_rows(x: torch.Tensor, matrix: Matrix, *, out: torch.Tensor, rows_tile: int = 0) -> None:
    """Partial sums of `x @ matrix.T + bias`.

    Args:
        x: [num_rows, in_features], at most `MAX_ROWS` rows, last dimension contiguous.
        matrix: read once.
        out: [num_parts(matrix), num_rows, out_features], float32, last dimension contiguous;
            written.
        rows_tile: rows of one product, where it shall not follow from `num_rows`.
    """
    num_rows = len(x)
    assert 0 < num_rows <= MAX_ROWS, num_rows
    parts, part_size = split_of(matrix)
    assert len(out) == parts, (len(out), parts)
    block_k = matrix.group or BLOCK_K
    tile = rows_tile or max(MIN_ROWS, power_of_2(num_rows))
    _few_rows_kernel[(-(-matrix.out_features // BLOCK_N), parts)](
        x,
        matrix.data,
        x if matrix.scale is None else matrix.scale,
        x if matrix.bias is None else matrix.bias,
        out,
        num_rows,
        matrix.in_features,
        matrix.out_features,
        part_size,
        x.stride(0),
        matrix.data.stride(0),
        0 if matrix.scale is None else matrix.scale.stride(0),
        out.stride(0),
        out.stride(1),
        KIND=KINDS[matrix.kind],
        HAS_BIAS=matrix.bias is not None,
        EVEN_K=matrix.in_features % block_k == 0,
        ROWS=tile,
        BLOCK_N=BLOCK_N,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=stages_of(matrix.kind, tile, block_k),
    )


def few_rows_reference(
    x: torch.Tensor, matrix: Matrix, *, out: torch.Tensor, rows_tile: int = 0
) -> None:
    """See `few_rows`; the tile changes nothing here."""
    parts, part_size = split_of(matrix)
    weight = unpack(matrix).to(x.dtype)
    for part in range(parts):
        k = slice(part * part_size, (part + 1) * part_size)
        out[part] = torch.nn.functional.linear(x[:, k], weight[:, k]).float()
    if matrix.bias is not None:
        out[0] += matrix.bias.float()


def num_parts(matrix: Matrix) -> int:
    return split_of(matrix)[0]


def split_of(matrix: Matrix) -> tuple[int, int]:
    """Parts of the inputs, and how many inputs each has but the last, which may have fewer."""
    block_k = matrix.group or BLOCK_K
    programs = -(-matrix.out_features // BLOCK_N)
    parts = 1
    while parts * programs < ENOUGH_PROGRAMS and matrix.in_features >= 2 * parts * MIN_PART:
        parts *= 2
    part_size = -(-matrix.in_features // (parts * block_k)) * block_k
    return -(-matrix.in_features // part_size), part_size


def stages_of(kind: Kind, rows_tile: int, block_k: int) -> int:
    """Tiles in flight: enough to hide the memory's latency, with room for two programs on a
    multiprocessor, or four where rows are few.
    """
    tile_num_bytes = BLOCK_N * block_k * _BITS[kind] // 8 + rows_tile * block_k * 2
    room_num_bytes = (52 << 10) if rows_tile == MIN_ROWS else (80 << 10)
    return min(MAX_STAGES, max(3, room_num_bytes // tile_num_bytes))
