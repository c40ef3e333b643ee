"""Blocks to rewrite, in every dtype, with what is hardest to round in them."""

import torch

from kvrelay.kv import numbers, wire
from kvrelay.kv.cache import scales_of, values_of
from kvrelay.kv.layout import KvLayout

DTYPES = ("bfloat16", "float32", "fp8", "int8")

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 2, 3, 24


def layout(dtype: str, *, block_size: int) -> KvLayout:
    return KvLayout(
        num_layers=NUM_LAYERS,
        block_size=block_size,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )


def awkward(*shape: int, seed: int) -> torch.Tensor:
    """Rows of any size, from ones that no scale can hold to ones beyond fp8; and zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    powers = torch.randint(-150, 40, (*shape[:-1], 1), generator=generator)
    common = torch.randint(-9, 10, (*shape[:-1], 1), generator=generator)
    rare = torch.rand((*shape[:-1], 1), generator=generator) < 0.2
    x = torch.ldexp(x, torch.where(rare, powers, common).float())
    halves = torch.randint(-40, 41, shape, generator=generator) / 2  # halfway between numbers
    x = torch.where(~rare & (torch.rand(shape, generator=generator) < 0.2), halves, x)
    return torch.where(torch.rand((*shape[:-1], 1), generator=generator) < 0.05, 0.0, x)


def fill(memory: torch.Tensor, side: wire.Blocks, *, seed: int) -> None:
    """Awkward numbers in these blocks of `memory`."""
    for i, offset in enumerate(side.offsets):
        block = memory[offset : offset + side.layout.block_num_bytes]
        x = awkward(*side.layout.block_shape, seed=seed + i)
        values, scales = numbers.kept(x, side.layout.dtype)
        values_of(block, side.layout, 1)[0].copy_(values)
        if scales is not None:
            scales_of(block, side.layout, 1)[0].copy_(scales)


def shuffled(num_blocks: int, *, each_num_bytes: int, first: int, seed: int) -> list[int]:
    """Where blocks that lie side by side begin, in no order."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))
    return [first + int(i) * each_num_bytes for i in order]


def case(
    source: KvLayout, target: KvLayout, *, first_token: int, end_token: int, seed: int
) -> tuple[torch.Tensor, wire.Rewrite]:
    """A rewrite, and memory that has its source and noise wherever else."""
    first = first_token // source.block_size
    num_sources = source.num_blocks_for(end_token) - first
    num_targets = target.num_blocks_for(end_token) + 1
    sources = shuffled(num_sources + 1, each_num_bytes=source.block_num_bytes, first=0, seed=seed)
    begin = (num_sources + 1) * source.block_num_bytes
    targets = shuffled(num_targets, each_num_bytes=target.block_num_bytes, first=begin, seed=seed)
    what = wire.Rewrite(
        source=wire.Blocks(
            layout=source, offsets=sources[:-1], first_token=first * source.block_size
        ),
        target=wire.Blocks(layout=target, offsets=targets),
        first_token=first_token,
        end_token=end_token,
    )
    generator = torch.Generator().manual_seed(seed)
    num_bytes = begin + num_targets * target.block_num_bytes
    memory = torch.randint(0, 127, (num_bytes,), dtype=torch.uint8, generator=generator)
    fill(memory, what.source, seed=seed)
    return memory, what
