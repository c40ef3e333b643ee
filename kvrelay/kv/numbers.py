"""How numbers of K and V are kept in fewer bytes than they were computed with, and read again.

Definition of the bytes that every engine and every wire form has: see `KvLayout`.
"""

import numpy as np
import torch

FP8_MAX = 448.0
INT8_MAX = 127

# torch converts them one by one, which takes five times as long as a look into a table.
_FP8_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def kept(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a cache of `dtype` keeps of `x`.

    Args:
        x: [..., num_kv_heads, head_dim], floats.
        dtype: of a `KvLayout`.

    Returns:
        values: like `x`, of the cache's dtype.
        scales: [..., num_kv_heads], bfloat16, or None for all but int8.
    """
    if dtype == "fp8":
        return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), None
    if dtype == "int8":
        return _int8(x.float())
    return x.to({"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]), None


def read(values: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """The numbers that are kept, float32; exact, and the same wherever it is done."""
    if values.dtype == torch.float8_e4m3fn:
        return torch.from_numpy(np.take(_FP8_NUMBERS, values.view(torch.uint8).numpy()))
    if scales is None:
        return values.float()
    return torch.mul(values, scales.float().unsqueeze(-1))


def _int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    largest = x.abs().amax(dim=-1)
    # A tensor divides where a number might be multiplied with by its inverse.
    scales = (largest / torch.full_like(largest, INT8_MAX)).bfloat16()
    by = scales.float()
    by = torch.where(by > 0, by, torch.inf)  # what no scale can hold is 0
    whole = (x / by.unsqueeze(-1)).round_().clamp_(-INT8_MAX, INT8_MAX)
    if not bool(largest.isfinite().all()):
        whole.nan_to_num_(0.0)  # what is no number keeps that in its scale
    return whole.to(torch.int8), scales
