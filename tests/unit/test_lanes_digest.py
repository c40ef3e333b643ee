"""lanes64 is what its definition says, and sees what it promises to see."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.kernels.digest import lanes64, lanes64_ranges

WORD = 1 << 64


def by_definition(data: bytes) -> int:
    """As the module's docstring writes it, one word after the other."""

    def mix(x: int) -> int:
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 % WORD
        x ^= x >> 32
        x = x * 0xD6E8FEB86659FD93 % WORD
        return x ^ x >> 32

    step = 0x9E3779B97F4A7C15
    words = [int.from_bytes(data[i : i + 8], "little") for i in range(0, len(data), 8)]
    total = sum(mix((word + (i + 1) * step) % WORD) for i, word in enumerate(words))
    return mix((total + len(data) * step) % WORD)


def noise(num_bytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)


def test_the_digest_is_known():
    """Other builds and devices compute the same 64 bits."""
    assert lanes64(np.arange(64, dtype=np.uint8)) == 0xBAE0237525EFDD27


@pytest.mark.parametrize("num_bytes", [0, 16, 48, 131_056, 131_072, 131_088, 400_016])
def test_the_digest_is_its_definition(num_bytes):
    """Whatever the host takes at once."""
    data = noise(num_bytes)
    assert lanes64(data) == by_definition(data.tobytes())


@given(data=st.binary(max_size=25).map(lambda piece: piece * 16))
def test_any_bytes_are_digested_by_definition(data):
    """Zeros, repetitions and all."""
    assert lanes64(np.frombuffer(data, np.uint8)) == by_definition(data)


@pytest.mark.parametrize("fill", ["zeros", "ones", "noise"])
def test_every_flipped_bit_shows(fill):
    """For certain; here each of a small block, whose digests are all different, too."""
    data = {"zeros": np.zeros(256, np.uint8), "ones": np.full(256, 255, np.uint8)}.get(fill)
    data = noise(256) if data is None else data
    seen = {lanes64(data)}
    for bit in range(len(data) * 8):
        data[bit // 8] ^= 1 << bit % 8
        seen.add(lanes64(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 1 + len(data) * 8


def test_a_hundred_thousand_changes_of_a_few_bits_show():
    """One to eight bits, anywhere in a block."""
    random = np.random.default_rng(7)
    data = noise(512)
    clean = lanes64(data)
    for count in random.integers(1, 9, 100_000).tolist():
        bits = random.choice(len(data) * 8, count, replace=False, shuffle=False)
        masks = (1 << bits % 8).astype(np.uint8)
        np.bitwise_xor.at(data, bits // 8, masks)
        assert lanes64(data) != clean
        np.bitwise_xor.at(data, bits // 8, masks)
    assert lanes64(data) == clean


def test_every_pair_of_flipped_bits_of_weight_shows():
    """The highest bits of two words, which plain sums and products are blind to."""
    data = noise(256)
    words = data.view(np.uint64)
    clean = lanes64(data)
    for high in (63, 62, 31):
        for first in range(len(words)):
            for second in range(first):
                words[first] ^= np.uint64(1 << high)
                words[second] ^= np.uint64(1 << high)
                assert lanes64(data) != clean
                words[first] ^= np.uint64(1 << high)
                words[second] ^= np.uint64(1 << high)


@pytest.mark.parametrize("each_num_bytes", [8, 16, 64, 1024])
def test_pieces_that_change_places_show(each_num_bytes):
    """Words, and longer pieces; neighbours or not."""
    data = noise(4096)
    clean = lanes64(data)
    pieces = data.reshape(-1, each_num_bytes)
    random = np.random.default_rng(1)
    for _ in range(300):
        first, second = random.choice(len(pieces), 2, replace=False)
        pieces[[first, second]] = pieces[[second, first]]
        assert lanes64(data) != clean
        pieces[[first, second]] = pieces[[second, first]]


def test_bytes_that_moved_or_went_missing_show():
    """Shifted by a word, cut short, or followed by zeros."""
    data = noise(1024)
    zeros = np.zeros(16, np.uint8)
    others = [np.roll(data, 8), data[:-16], np.concatenate((data, zeros)), data[::-1].copy()]
    assert len({lanes64(each) for each in (data, *others)}) == 5


def test_zeros_of_each_length_have_a_digest_of_their_own():
    """Memory that nobody wrote is not all alike."""
    digests = {lanes64(np.zeros(16 * i, np.uint8)) for i in range(500)}
    assert len(digests) == 500


def test_ranges_of_odd_length_are_refused():
    """A device reads 16 bytes at once."""
    with pytest.raises(AssertionError, match="24"):
        lanes64(np.zeros(24, np.uint8))


def test_ranges_of_one_memory_are_digested_each():
    """In the order given; none have none."""
    data = noise(4096)
    ranges = [(1024, 512), (0, 512), (1024, 512)]
    digests = lanes64_ranges(torch.from_numpy(data), ranges)
    assert digests == [lanes64(data[offset : offset + size]) for offset, size in ranges]
    assert lanes64_ranges(torch.from_numpy(data), []) == []
