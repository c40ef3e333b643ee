"""The memory of a KV cache: its shape, its blocks, its sharing and its end."""

import mmap
import os
from pathlib import Path

import pytest
import torch

from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout

LAYOUT = KvLayout(num_layers=2, block_size=4, num_kv_heads=3, head_dim=8, dtype="bfloat16")


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("shareable", [True, False])
def test_a_cache_has_the_layouts_shape_and_starts_as_zeros(shareable: bool) -> None:
    """[num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
    cache = KvCache(LAYOUT, 5, shareable=shareable)
    assert cache.tensor.shape == (5, 2, 2, 4, 3, 8)
    assert cache.tensor.dtype == torch.bfloat16
    assert cache.num_bytes == 5 * LAYOUT.block_num_bytes == cache.tensor.nbytes
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
        assert os.fstat(cache.fd).st_blocks * 512 >= cache.num_bytes
    cache.close()
