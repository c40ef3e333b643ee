"""Makes bytes that have landed be others, in every way that a broken transfer could.

For tests, and for developers who want to see that it is found.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.transfer.base import BlockCopy
from kvrelay.transfer.chaos_spec import Damage


class Landing:
    """Where a pull puts its blocks, to read and to write, on whichever side that is."""

    def __init__(self, cache: KvCache, copies: Sequence[BlockCopy], *, is_on_device: bool) -> None:
        self._cache = cache
        self._copies = copies
        self._is_on_device = is_on_device

    def __len__(self) -> int:
        return len(self._copies)

    def only(self, i: int) -> "Landing":
        """Copy number `i` alone."""
        return Landing(self._cache, self._copies[i : i + 1], is_on_device=self._is_on_device)

    def read(self, i: int) -> bytes:
        """What is at the place of copy number `i` now."""
        copy = self._copies[i]
        if self._is_on_device:
            return self._on_device(copy).cpu().numpy().tobytes()
        return bytes(self._cache.range_bytes(copy.target_offset, copy.num_bytes))

    def write(self, i: int, data: bytes) -> None:
        """`data` is as long as the copy is."""
        copy = self._copies[i]
        if self._is_on_device:
            self._on_device(copy).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
            return
        self._cache.range_bytes(copy.target_offset, copy.num_bytes)[:] = data

    def _on_device(self, copy: BlockCopy) -> torch.Tensor:
        assert isinstance(self._cache, DeviceCache)
        return self._cache.device_bytes[copy.target_offset : copy.target_offset + copy.num_bytes]


def damage(
    landing: Landing,
    kind: Damage,
    rng: random.Random,
    *,
    before: Sequence[bytes],
    earlier: bytes,
) -> None:
    """Damage what has landed; at least one byte is another afterwards.

    Args:
        landing: of at least one copy, whose bytes are the holder's.
        kind: of damage.
        rng: decides which block and which bytes.
        before: what was at each place before the pull.
        earlier: a block that an earlier pull brought, or nothing.
    """
    i = rng.randrange(len(landing))
    right = landing.read(i)
    wrong = _WRONG[kind](right, rng) if kind in _WRONG else b""
    if kind is Damage.STALE:
        wrong = before[i]
    elif kind is Damage.SWAPPED and len(landing) > 1:
        other = (i + rng.randrange(1, len(landing))) % len(landing)
        wrong = landing.read(other)
        landing.write(other, right)
    elif kind is Damage.SWAPPED:
        wrong = earlier
    if len(wrong) != len(right) or wrong == right:
        wrong = _flipped(right, rng, 1)  # what was there is right, so there is nothing to swap
    landing.write(i, wrong)


def _flipped(data: bytes, rng: random.Random, num_bits: int) -> bytes:
    flipped = bytearray(data)
    for bit in rng.sample(range(8 * len(data)), min(num_bits, 8 * len(data))):
        flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def _overwritten(data: bytes, rng: random.Random) -> bytes:
    first = rng.randrange(len(data))
    num_bytes = rng.randint(1, len(data) - first)
    return data[:first] + rng.randbytes(num_bytes) + data[first + num_bytes :]


_WRONG: Mapping[Damage, Callable[[bytes, random.Random], bytes]] = {
    Damage.BIT: lambda data, rng: _flipped(data, rng, 1),
    Damage.BITS: lambda data, rng: _flipped(data, rng, rng.randint(2, 64)),
    Damage.RUN: _overwritten,
    Damage.BLOCK: lambda data, rng: rng.randbytes(len(data)),
}
