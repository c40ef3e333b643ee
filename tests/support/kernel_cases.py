"""Inputs for kernels, on whatever device they run, and how near two answers must be."""

import os
from dataclasses import dataclass

import torch

from kvrelay.kernels.lang import HAS_TRITON

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, in float32: the interpreter computes no products of bfloat16."""

HAS_DEVICE = HAS_TRITON and not IS_INTERPRETED and torch.cuda.is_available()

NEITHER = "needs a CUDA device and triton, or TRITON_INTERPRET=1 to interpret kernels on the CPU"

DEVICE = torch.device("cuda" if HAS_DEVICE else "cpu")
DTYPE = torch.bfloat16 if HAS_DEVICE else torch.float32

NEAR = 2e-2 if HAS_DEVICE else 2e-5
"""Of the reference's largest value. bfloat16 rounds at 4e-3, float32 sums differ by order."""


def noise(*shape: int, seed: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_near(ours: torch.Tensor, reference: torch.Tensor, near: float = NEAR) -> None:
    """NaN is near nothing, and equal only to itself in the same place."""
    assert ours.shape == reference.shape
    torch.testing.assert_close(ours.isnan(), reference.isnan())
    ours, reference = ours.float().nan_to_num(), reference.float().nan_to_num()
    largest = reference.abs().amax().clamp_min(1e-6)
    error = ((ours - reference).abs().amax() / largest).item()
    assert error <= near, f"off by {error:.2e} of the largest value"


@dataclass(frozen=True)
class PagedKv:
    """Sequences of given lengths in one layer of a cache; everything else in it is NaN."""

    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor  # [num_sequences, max_blocks], in no order


def paged_kv(
    lengths: list[int], *, block_size: int, num_kv_heads: int, head_dim: int, seed: int
) -> PagedKv:
    counts = [-(-length // block_size) for length in lengths]
    num_blocks = sum(counts) + 3
    cache = torch.full(
        (num_blocks, 2, 2, block_size, num_kv_heads, head_dim), torch.nan, device=DEVICE
    ).to(DTYPE)
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for i, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        blocks, order = order[:count], order[count:]
        tables[i, :count] = blocks
        kv = noise(count * block_size, 2, num_kv_heads, head_dim, seed=seed + i)
        kv[length:] = torch.nan
        cache[blocks.to(DEVICE), 1] = kv.view(
            count, block_size, 2, num_kv_heads, head_dim
        ).transpose(1, 2)
    return PagedKv(cache[:, 1, 0], cache[:, 1, 1], tables.to(DEVICE))
