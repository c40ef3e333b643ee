"""A digest of bytes that a device takes at the speed of its memory: lanes64.

Definition. The bytes are 64-bit words, little-endian, w[0] .. w[n - 1]. All sums and products
are modulo 2 ** 64, and >> brings in zeros.

    mix(x)   x ^= x >> 32;  x *= M;  x ^= x >> 32;  x *= M;  x ^= x >> 32
    sum      of mix(w[i] + (i + 1) * STEP), over all i
    lanes64  mix(sum + 8 * n * STEP)

`mix` and adding a constant can be undone, so **any change within one word shows, for certain**:
one term of the sum is another, and with it the sum. Two words that change places, and anything
else that changes more than one word, shows but for a chance of about 2 ** -64, as long as it was
not made with the constants in mind: this is no defence against a peer that forges. A sum has no
order, so any number of lanes may add in any order.

Source: the mixer is Degski's 64-bit finalizer; positions are told apart as in a Weyl sequence.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.kernels.aside import aside
from kvrelay.kernels.lang import jit, power_of_2, tl

WORD_NUM_BYTES = 8

ALIGNMENT_NUM_BYTES = 16
"""Ranges begin at multiples of it and are multiples of it long."""

_M = 0xD6E8FEB86659FD93
_STEP = 0x9E3779B97F4A7C15

_CHUNK = 1 << 14
"""Words that the host mixes at once, so that they stay near the processor."""

TILE = 2048
"""Words that one program reads at once."""

TILES_PER_PROGRAM = 4  # so that a lane's sum goes round more often than it is put together


def lanes64(data: npt.NDArray[np.uint8]) -> int:
    """Of one range, on the host. For a thread.

    Args:
        data: [num_bytes], contiguous.
    """
    assert len(data) % ALIGNMENT_NUM_BYTES == 0, len(data)
    words = data.view("<u8")
    total = 0
    steps = np.arange(1, min(_CHUNK, len(words)) + 1, dtype=np.uint64) * np.uint64(_STEP)
    for first in range(0, len(words), _CHUNK):
        chunk = words[first : first + _CHUNK]
        mixed = chunk + steps[: len(chunk)]
        mixed += np.uint64(first * _STEP % (1 << 64))
        _mix(mixed)
        total += int(mixed.sum())
    last = np.array([(total + len(data) * _STEP) % (1 << 64)], dtype=np.uint64)
    _mix(last)
    return int(last[0])


def _mix(x: npt.NDArray[np.uint64]) -> None:
    """In place."""
    half = np.uint64(32)
    folded = x >> half
    x ^= folded
    for _ in range(2):
        x *= np.uint64(_M)
        np.right_shift(x, half, out=folded)
        x ^= folded


@jit()
def _mixed(x):
    x ^= x >> 32
    x *= 0xD6E8FEB86659FD93
    x ^= x >> 32
    x *= 0xD6E8FEB86659FD93
    x ^= x >> 32
    return x


@jit()
def _sum_kernel(words, offsets, sums, num_words, TILE: tl.constexpr, NUM_TILES: tl.constexpr):
    part = tl.program_id(0)
    block = tl.program_id(1)
    # Word by word beginning at a multiple of 16 bytes, so that they are read in pairs.
    at = words + tl.multiple_of(tl.load(offsets + block) // 8, 2)
    total = tl.zeros((TILE,), tl.uint64)
    for tile in range(part * NUM_TILES, (part + 1) * NUM_TILES):
        word = tile * TILE + tl.arange(0, TILE)
        inside = word < num_words
        x = tl.load(at + word, mask=inside, other=0).to(tl.uint64, bitcast=True)
        x += (word + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
        total += tl.where(inside, _mixed(x), 0)
    said = tl.sum(total, axis=0).to(tl.int64, bitcast=True)
    tl.store(sums + block * tl.num_programs(0) + part, said)


@jit()
def _finish_kernel(sums, out, num_words, NUM_PARTS: tl.constexpr, PARTS: tl.constexpr):
    block = tl.program_id(0)
    part = tl.arange(0, PARTS)
    said = tl.load(sums + block * NUM_PARTS + part, mask=part < NUM_PARTS, other=0)
    total = tl.sum(said.to(tl.uint64, bitcast=True), axis=0)
    length = tl.full((), 8, tl.uint64) * num_words.to(tl.uint64) * 0x9E3779B97F4A7C15
    tl.store(out + block, _mixed(total + length).to(tl.int64, bitcast=True))


def lanes64_blocks(memory: torch.Tensor, offsets: Sequence[int], num_bytes: int) -> torch.Tensor:
    """Of ranges of one length, on the device, in the order of its current stream.

    Args:
        memory: [any], uint8, contiguous.
        offsets: where each range begins, in bytes.
        num_bytes: of each range.

    Returns:
        [len(offsets)], int64, with the digests' bits; see `unsigned`.
    """
    _check(memory, offsets, num_bytes)
    digests = torch.empty(len(offsets), dtype=torch.int64, device=memory.device)
    if not offsets:
        return digests
    num_words = num_bytes // WORD_NUM_BYTES
    num_parts = max(1, -(-num_words // (TILE * TILES_PER_PROGRAM)))
    sums = torch.empty(len(offsets), num_parts, dtype=torch.int64, device=memory.device)
    words = memory[: memory.numel() // WORD_NUM_BYTES * WORD_NUM_BYTES].view(torch.int64)
    begins = torch.tensor(offsets, dtype=torch.int64).to(memory.device, non_blocking=True)
    _sum_kernel[(num_parts, len(offsets))](
        words, begins, sums, num_words, TILE=TILE, NUM_TILES=TILES_PER_PROGRAM
    )
    _finish_kernel[(len(offsets),)](
        sums, digests, num_words, NUM_PARTS=num_parts, PARTS=power_of_2(num_parts)
    )
    return digests


def lanes64_blocks_reference(
    memory: torch.Tensor, offsets: Sequence[int], num_bytes: int
) -> torch.Tensor:
    """See `lanes64_blocks`."""
    _check(memory, offsets, num_bytes)
    data = memory.cpu().numpy()
    found = [lanes64(data[offset : offset + num_bytes]) for offset in offsets]
    return torch.from_numpy(np.array(found, dtype=np.uint64).view(np.int64)).to(memory.device)


def lanes64_ranges(memory: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> list[int]:
    """Of (offset, number of bytes) in memory on any device, as `lanes64` gives them. For a thread.

    It waits for nothing that was launched before, as `aside` says.
    """
    if not ranges:
        return []
    lengths = {num_bytes for _, num_bytes in ranges}
    assert len(lengths) == 1, lengths  # blocks of one layout
    op = lanes64_blocks if memory.is_cuda else lanes64_blocks_reference
    with aside(memory.device):
        return unsigned(op(memory, [offset for offset, _ in ranges], lengths.pop()))


def unsigned(digests: torch.Tensor) -> list[int]:
    """As `lanes64` gives them. Waits for the device."""
    return [digest % (1 << 64) for digest in digests.tolist()]


def _check(memory: torch.Tensor, offsets: Sequence[int], num_bytes: int) -> None:
    assert num_bytes % ALIGNMENT_NUM_BYTES == 0, num_bytes
    assert all(offset % ALIGNMENT_NUM_BYTES == 0 for offset in offsets), offsets
    assert min(offsets, default=0) >= 0, offsets
    assert max(offsets, default=0) + num_bytes <= memory.numel(), (offsets, memory.numel())
