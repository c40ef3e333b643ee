"""The residual stream: what a product said is added, and the sum normed for the next product.

A product of the generation path leaves its partial sums; whoever reads them adds them, oldest
first, so that no kernel runs only to put them together.
"""

import torch

from kvrelay.kernels.lang import jit, power_of_2, tl


@jit()
def _add_rms_norm_kernel(
    residual,
    parts,
    weight,
    out,
    eps,
    parts_part_stride,
    parts_row_stride,
    hidden_size,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < hidden_size
    x = tl.load(residual + row * hidden_size + column, mask=inside, other=0.0)
    if NUM_PARTS > 0:
        at = parts + row * parts_row_stride + column
        said = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        for part in tl.static_range(1, NUM_PARTS):
            said += tl.load(at + part * parts_part_stride, mask=inside, other=0.0).to(tl.float32)
        x += said
        tl.store(residual + row * hidden_size + column, x, mask=inside)
    mean = tl.sum(x * x, axis=0) / hidden_size
    scale = tl.load(weight + column, mask=inside, other=0.0)
    normed = x * (1.0 / tl.sqrt(mean + eps)) * scale
    tl.store(out + row * hidden_size + column, normed.to(out.dtype.element_ty), mask=inside)


def add_rms_norm(
    residual: torch.Tensor,
    parts: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float,
    out: torch.Tensor,
) -> None:
    """`residual += parts.sum(0)`, then `out = rms_norm(residual) * weight`.

    Args:
        residual: [num_rows, hidden_size], float32, contiguous; written in place.
        parts: [num_parts, num_rows, hidden_size], last dimension contiguous; None adds nothing.
        weight: [hidden_size], float32.
        eps: of the norm.
        out: [num_rows, hidden_size], contiguous; written.
    """
    num_rows, hidden_size = residual.shape
    block = power_of_2(hidden_size)
    given = residual[None] if parts is None else parts
    _add_rms_norm_kernel[(num_rows,)](
        residual,
        given,
        weight,
        out,
        eps,
        given.stride(0),
        given.stride(1),
        hidden_size,
        NUM_PARTS=0 if parts is None else len(parts),
        BLOCK=block,
        num_warps=min(16, max(4, block // 256)),
    )


def add_rms_norm_reference(
    residual: torch.Tensor,
    parts: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    eps: float,
    out: torch.Tensor,
) -> None:
    """See `add_rms_norm`."""
    if parts is not None:
        residual += sum_of_parts(parts)
    normed = torch.nn.functional.rms_norm(residual, residual.shape[-1:], weight, eps)
    out.copy_(normed)


def sum_of_parts(parts: torch.Tensor) -> torch.Tensor:
    """Float32, the first part first, as the kernels add them."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total
