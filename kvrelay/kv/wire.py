"""KV on its way: blocks of one layout written again as blocks of another, in the same memory.

A holder packs its blocks into wire blocks in its staging; a puller unpacks wire blocks from its
staging into slots of its own blocks. Both are one operation, a `Rewrite` of a range of tokens
from blocks to blocks, whose dtypes and block sizes may differ. It is a function of bytes: the
same everywhere, on the host (here) and on a device (`kvrelay.kernels.wire`), but for the bits of
what is no number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from kvrelay.kv import numbers
from kvrelay.kv.cache import KvCache, scales_of, values_of
from kvrelay.kv.layout import KvLayout
from kvrelay.types import BlockId


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Neighbouring tokens of one handoff, in blocks that lie anywhere in one memory."""

    layout: KvLayout
    offsets: Sequence[int]
    """Where each block begins, in bytes."""

    first_token: int = 0
    """Which token of the handoff is in the first slot of the first block."""

    def __post_init__(self) -> None:
        assert min(self.offsets, default=0) >= 0

    @property
    def end_token(self) -> int:
        return self.first_token + len(self.offsets) * self.layout.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrite:
    """The KV of tokens [first_token, end_token), from `source` to `target`; no others' slots."""

    source: Blocks
    target: Blocks
    first_token: int
    end_token: int

    def __post_init__(self) -> None:
        of, to = self.source.layout, self.target.layout
        assert (of.num_layers, of.num_kv_heads, of.head_dim) == (
            *(to.num_layers, to.num_kv_heads, to.head_dim),
        ), (of, to)
        for side in (self.source, self.target):
            assert side.first_token <= self.first_token <= self.end_token <= side.end_token, self


def packing(
    own: KvLayout, blocks: Sequence[BlockId], wire: KvLayout, target_offsets: Sequence[int]
) -> Rewrite:
    """Whole blocks of a cache as wire blocks at `target_offsets`, one for one."""
    assert own.block_size == wire.block_size, (own, wire)
    assert len(blocks) == len(target_offsets), (len(blocks), len(target_offsets))
    return Rewrite(
        source=Blocks(layout=own, offsets=_offsets(own, blocks)),
        target=Blocks(layout=wire, offsets=target_offsets),
        first_token=0,
        end_token=len(blocks) * own.block_size,
    )


def unpacking(
    own: KvLayout,
    wire: KvLayout,
    sources: Sequence[int],
    *,
    first_wire_index: int,
    block_table: Sequence[BlockId],
    first_token: int,
    end_token: int,
) -> Rewrite:
    """Tokens of landed wire blocks in the slots that `block_table` gives them.

    Args:
        own: of the cache.
        wire: of the wire blocks.
        sources: where consecutive wire blocks of the handoff begin, in bytes.
        first_wire_index: of the first of them in the handoff.
        block_table: own blocks of the handoff, from its first token on.
        first_token: in the handoff.
        end_token: likewise; what a wire block has from there on stays behind.
    """
    first_slot = first_wire_index * wire.block_size
    return Rewrite(
        source=Blocks(layout=wire, offsets=sources, first_token=first_slot),
        target=Blocks(layout=own, offsets=_offsets(own, block_table)),
        first_token=first_token,
        end_token=end_token,
    )


def pack(
    cache: KvCache, blocks: Sequence[BlockId], wire: KvLayout, target_offsets: Sequence[int]
) -> None:
    """Write `blocks` as wire blocks into the staging of `cache`. For a thread."""
    assert all(0 <= block < cache.num_blocks for block in blocks), blocks
    assert min(target_offsets, default=cache.num_bytes) >= cache.staging_offset, target_offsets
    rewrite(_memory(cache), packing(cache.layout, blocks, wire, target_offsets))


def unpack(
    cache: KvCache,
    wire: KvLayout,
    sources: Sequence[int],
    *,
    first_wire_index: int,
    block_table: Sequence[BlockId],
    first_token: int,
    end_token: int,
) -> None:
    """See `unpacking`; from anywhere in the memory of `cache` into its blocks. For a thread."""
    assert all(0 <= block < cache.num_blocks for block in block_table), block_table
    what = unpacking(
        cache.layout,
        wire,
        sources,
        first_wire_index=first_wire_index,
        block_table=block_table,
        first_token=first_token,
        end_token=end_token,
    )
    rewrite(_memory(cache), what)


def rewrite(memory: torch.Tensor, what: Rewrite) -> None:
    """Carry out a rewrite in place.

    Source and target may not overlap. As a torch operation does, it lets other threads run.

    Args:
        memory: [num_bytes], uint8, of a host.
        what: of blocks that lie in it, each where its dtype may lie.
    """
    for run in runs(what):
        # [num_layers, 2, num_tokens, num_kv_heads, head_dim], and scales without the last
        values, scales = _slots(memory, what.source, run.source_block, run.source_slot, run)
        to, to_scales = _slots(memory, what.target, run.target_block, run.target_slot, run)
        if what.source.layout.dtype != what.target.layout.dtype:
            kept = numbers.kept(numbers.read(values, scales), what.target.layout.dtype)
            values, scales = kept
        to.copy_(values)
        if to_scales is not None:
            assert scales is not None
            to_scales.copy_(scales)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Tokens that are neighbours on both sides: in one source block and in one target block."""

    source_block: int
    source_slot: int
    target_block: int
    target_slot: int
    num_tokens: int


def runs(what: Rewrite) -> Iterator[Run]:
    """The longest runs that make up a rewrite, in order."""
    token = what.first_token
    while token < what.end_token:
        source_block, source_slot = _place(what.source, token)
        target_block, target_slot = _place(what.target, token)
        num_tokens = min(
            what.end_token - token,
            what.source.layout.block_size - source_slot,
            what.target.layout.block_size - target_slot,
        )
        yield Run(
            source_block=source_block,
            source_slot=source_slot,
            target_block=target_block,
            target_slot=target_slot,
            num_tokens=num_tokens,
        )
        token += num_tokens


def _place(side: Blocks, token: int) -> tuple[int, int]:
    return divmod(token - side.first_token, side.layout.block_size)


def _slots(
    memory: torch.Tensor, side: Blocks, block: int, first_slot: int, run: Run
) -> tuple[torch.Tensor, torch.Tensor | None]:
    offset, layout = side.offsets[block], side.layout
    there = memory[offset : offset + layout.block_num_bytes]
    slots = slice(first_slot, first_slot + run.num_tokens)
    values, scales = values_of(there, layout, 1), scales_of(there, layout, 1)
    return values[0, :, :, slots], None if scales is None else scales[0, :, :, slots]


def _offsets(layout: KvLayout, blocks: Sequence[BlockId]) -> list[int]:
    return [block * layout.block_num_bytes for block in blocks]


def _memory(cache: KvCache) -> torch.Tensor:
    return torch.from_numpy(cache.bytes)
