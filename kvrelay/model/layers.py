"""The row-wise parts of a layer: each row's result depends on that row alone, bit for bit.

Sums of two roundings are never fused into one (`addcmul` and its like), because whether they
are may depend on where in memory a row lies.
"""

import math

import torch
from torch.nn import functional

from kvrelay.model.spec import RopeSpec

ROW_MULTIPLE = {torch.bfloat16: 2, torch.float32: 8}
"""Rows that `linear` must be given at a time. Measured: a float32 product keeps a row's bits
for multiples of 8 rows; a bfloat16 product for any number above one, and a single row is
summed in another order."""

_TABLE_MULTIPLE = 256


def padded_rows(num_rows: int, dtype: torch.dtype) -> int:
    """`num_rows` or the least more that `linear` keeps rows equal for."""
    multiple = ROW_MULTIPLE[dtype]
    return -(-num_rows // multiple) * multiple


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Both float32; over the last dimension."""
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of [num_rows, 2 * intermediate_size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.dtype == torch.float32:
        # The fused float32 silu rounds differently at the odd end of a buffer.
        gate = gate.contiguous()
        return gate / (torch.exp(-gate) + 1.0) * up
    return functional.silu(gate) * up


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of every head.

    Args:
        x: [num_rows, heads, head_dim], float32.
        cos: [num_rows, 1, head_dim], from `rope_table`.
        sin: like `cos`.
    """
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), dim=-1)
    return x * cos + swapped * sin


def rope_table(rope: RopeSpec, *, head_dim: int, num_positions: int) -> torch.Tensor:
    """[num_positions, 2, head_dim] float32: cosines, and sines with the first half negated."""
    # Whole vectors only, so that a position's values do not depend on the table's length.
    length = -(-num_positions // _TABLE_MULTIPLE) * _TABLE_MULTIPLE
    positions = torch.arange(length, dtype=torch.float32)
    angles = positions[:, None] * _frequencies(rope, head_dim)[None, :]
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    table = torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)), dim=1)
    return table[:num_positions]


def _frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[head_dim / 2], float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, plain, head_dim)
    return plain


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Short waves stay, long ones are stretched, those between are blended."""
    wavelengths = 2 * math.pi / plain
    low, high = rope.low_freq_factor, rope.high_freq_factor
    blend = (rope.original_max_position / wavelengths - low) / (high - low)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


def _yarn(rope: RopeSpec, plain: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Source: YaRN (Peng et al. 2023), section 3.2."""

    def dim_of(num_turns: float) -> float:
        turns = rope.original_max_position / (num_turns * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return plain / rope.factor * ramp + plain * (1 - ramp)
