"""silu(gate) * up, from the partial sums of the product that made both."""

import torch

from kvrelay.kernels.lang import jit, power_of_2, tl
from kvrelay.kernels.norm import sum_of_parts

MAX_BLOCK = 2048


@jit()
def _silu_mul_kernel(
    parts,
    out,
    part_stride,
    row_stride,
    inner_size,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < inner_size
    at = parts + row * row_stride + column
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at + inner_size, mask=inside, other=0.0).to(tl.float32)
    for part in tl.static_range(1, NUM_PARTS):
        more = at + part * part_stride
        gate += tl.load(more, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(more + inner_size, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * inner_size + column, product.to(out.dtype.element_ty), mask=inside)


def silu_mul(parts: torch.Tensor, *, out: torch.Tensor) -> None:
    """Activate what the gate and up product said.

    Args:
        parts: [num_parts, num_rows, 2 * intermediate_size], gate first; last dimension contiguous.
        out: [num_rows, intermediate_size], contiguous; written.
    """
    num_rows, inner_size = out.shape
    block = min(MAX_BLOCK, power_of_2(inner_size))
    _silu_mul_kernel[(num_rows, -(-inner_size // block))](
        parts,
        out,
        parts.stride(0),
        parts.stride(1),
        inner_size,
        NUM_PARTS=len(parts),
        BLOCK=block,
        num_warps=4,
    )


def silu_mul_reference(parts: torch.Tensor, *, out: torch.Tensor) -> None:
    """See `silu_mul`."""
    gate, up = sum_of_parts(parts).chunk(2, dim=-1)
    out.copy_(gate / (1.0 + torch.exp(-gate)) * up)
