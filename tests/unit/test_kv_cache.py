"""The memory of a KV cache: its shape, its blocks, its sharing and its end."""

import mmap
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout

LAYOUT = KvLayout(num_layers=2, block_size=4, num_kv_heads=3, head_dim=8, dtype="bfloat16")


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("shareable", [True, False])
def test_a_cache_has_the_layouts_shape_and_starts_as_zeros(shareable: bool) -> None:
    """[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
    cache = KvCache(LAYOUT, 5, shareable=shareable)
    assert cache.tensor.shape == (5, 2, 2, 4, 3, 8)
    assert cache.tensor.dtype == torch.bfloat16
    assert cache.staging_offset == 5 * LAYOUT.block_num_bytes == cache.tensor.nbytes
    assert cache.num_bytes == len(cache.bytes) >= cache.staging_offset
    assert not cache.tensor.any()
    assert (cache.fd is not None) == shareable
    cache.close()


@pytest.mark.parametrize("shareable", [True, False])
def test_block_bytes_are_that_block_without_a_copy(shareable: bool) -> None:
    """Writing through the view changes that block of the tensor and no other."""
    cache = KvCache(LAYOUT, 3, shareable=shareable)
    view = cache.block_bytes(1)
    assert (view.nbytes, view.readonly, view.format) == (LAYOUT.block_num_bytes, False, "B")
    view[:] = b"\x3f\x80" * (len(view) // 2)
    assert cache.tensor[1].any()
    assert not cache.tensor[0].any()
    assert not cache.tensor[2].any()
    cache.tensor[1].zero_()
    assert bytes(view) == bytes(len(view))
    cache.close()


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [("float32", 1536), ("bfloat16", 768), ("fp8", 384), ("int8", 384 + 96)],
)
def test_a_block_takes_its_values_and_their_scales(dtype: str, num_bytes: int) -> None:
    """384 values; and for int8 48 scales of two bytes, after them."""
    layout = replace(LAYOUT, dtype=dtype)
    assert layout.block_num_bytes == num_bytes
    assert layout.values_num_bytes == 384 * DTYPE_NUM_BYTES[dtype]
    assert layout.has_scales == (dtype == "int8")
    cache = KvCache(layout, 3, shareable=False)
    assert cache.values.shape == (3, 2, 2, 4, 3, 8)
    for block in range(3):
        cache.values[block].view(torch.uint8).fill_(16 + block)
        if cache.scales is not None:
            cache.scales[block].view(torch.uint8).fill_(32 + block)
    for block in range(3):
        raw = bytes(cache.block_bytes(block))
        first = layout.values_num_bytes
        assert raw[:first] == bytes([16 + block]) * first
        assert raw[first:] == bytes([32 + block]) * (num_bytes - first)
    cache.close()


def test_int8_has_scales_and_no_other_dtype_has() -> None:
    """[num_blocks, num_layers, 2, block_size, num_kv_heads]."""
    for dtype in DTYPE_NUM_BYTES:
        cache = KvCache(replace(LAYOUT, dtype=dtype), 5, shareable=False)
        if dtype == "int8":
            assert cache.scales is not None
            assert (cache.scales.shape, cache.scales.dtype) == ((5, 2, 2, 4, 3), torch.bfloat16)
        else:
            assert cache.scales is None
        cache.close()


def test_numbers_of_quantized_kv_are_not_taken_for_kv() -> None:
    """They mean nothing without their scales, or are of no dtype that products take."""
    cache = KvCache(replace(LAYOUT, dtype="int8"), 1, shareable=False)
    with pytest.raises(AssertionError):
        _ = cache.tensor
    cache.close()


def test_staging_lies_behind_the_blocks_in_the_same_memory() -> None:
    """So whoever maps the blocks has it, too."""
    cache = KvCache(LAYOUT, 2, shareable=True, staging_num_bytes=100)
    assert cache.staging_offset == 2 * LAYOUT.block_num_bytes
    assert cache.num_bytes >= cache.staging_offset + 100
    last = cache.staging_offset + 98
    cache.range_bytes(last, 2)[:] = b"ab"
    assert cache.fd is not None
    with mmap.mmap(cache.fd, cache.num_bytes, prot=mmap.PROT_READ) as other:
        assert other[last - 1 : last + 2] == b"\0ab"
    assert not cache.tensor.any()
    for offset, num_bytes in [(-1, 2), (cache.num_bytes - 1, 2), (0, -1)]:
        with pytest.raises(AssertionError):
            cache.range_bytes(offset, num_bytes)
    cache.close()


def test_a_device_has_the_same_memory() -> None:
    """Blocks of any dtype go back and forth whole; staging is on both sides."""
    layout = replace(LAYOUT, dtype="int8")
    cache = DeviceCache(layout, 3, shareable=True, staging_num_bytes=64, device=torch.device("cpu"))
    assert cache.device_bytes.shape == (cache.num_bytes,)
    cache.device_bytes.fill_(7)
    cache.to_host([1])
    assert bytes(cache.block_bytes(1)) == b"\7" * layout.block_num_bytes
    assert not cache.bytes[: layout.block_num_bytes].any()
    cache.block_bytes(2)[:] = b"\5" * layout.block_num_bytes
    cache.landed([2])
    both = cache.device_bytes[2 * layout.block_num_bytes :][: layout.block_num_bytes + 64]
    assert both.tolist() == [5] * layout.block_num_bytes + [7] * 64
    cache.close()


def test_another_mapping_of_the_descriptor_sees_the_same_bytes() -> None:
    """What another process would map is the cache itself."""
    cache = KvCache(LAYOUT, 2, shareable=True)
    assert cache.fd is not None
    cache.block_bytes(1)[0] = 42
    with mmap.mmap(cache.fd, cache.num_bytes, prot=mmap.PROT_READ) as other:
        assert other[LAYOUT.block_num_bytes] == 42
    cache.close()


def test_nobody_can_resize_a_shared_cache() -> None:
    """A peer that shrank it would crash us on the next read."""
    cache = KvCache(LAYOUT, 2, shareable=True)
    assert cache.fd is not None
    for num_bytes in (0, cache.num_bytes * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(cache.fd, num_bytes)
    cache.close()


def test_close_leaves_no_descriptor_even_while_views_live() -> None:
    """Views keep the pages, not the descriptor; closing twice is harmless."""
    before = num_fds()
    cache = KvCache(LAYOUT, 2, shareable=True)
    tensor, view = cache.tensor, cache.block_bytes(0)
    assert num_fds() == before + 1
    cache.close()
    cache.close()
    assert num_fds() == before
    assert cache.fd is None
    view[0] = 1
    assert tensor.view(torch.uint8).flatten()[0] == 1


def test_a_block_that_is_not_there_is_a_bug() -> None:
    """Ids outside the cache never reach memory."""
    cache = KvCache(LAYOUT, 2, shareable=False)
    for block_id in (-1, 2):
        with pytest.raises(AssertionError):
            cache.block_bytes(block_id)
    cache.close()


@pytest.mark.parametrize("shareable", [True, False])
def test_populated_memory_is_there_and_still_zero(shareable: bool) -> None:
    """No page is left to be found when the first pull writes it."""
    cache = KvCache(LAYOUT, 64, shareable=shareable)
    cache.populate()
    assert not cache.tensor.any()
    if cache.fd is not None:
        # A page that is begun may be left.
        assert os.fstat(cache.fd).st_blocks * 512 > cache.num_bytes - mmap.PAGESIZE
    cache.close()
