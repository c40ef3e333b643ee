"""K and V of single slots, written and read as floats whatever the cache keeps of them.

A row is the K, or the V, of all heads in one layer and slot. Rows are numbered as they lie in a
cache of values alone: block by block, in a block layer by layer, K before V, slot by slot.
"""

from typing import Protocol

import torch

from kvrelay.kv import numbers
from kvrelay.kv.cache import KvCache


class KvRows(Protocol):
    def write(self, rows: torch.Tensor, kv: torch.Tensor) -> None:
        """Keep `kv` [len(rows), num_kv_heads, head_dim] at `rows`, int64."""
        ...

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows), num_kv_heads, head_dim], of the cache's dtype or float32.

        The next read overwrites them: fresh memory for each would cost more than the copy.
        """
        ...


def kv_rows(cache: KvCache) -> KvRows:
    return _QuantizedRows(cache) if cache.layout.is_quantized else _PlainRows(cache)


def kv_suffix(kv_dtype: str, dtype: str) -> str:
    """The KV's part in a name of numerics: none where it is kept as it is computed."""
    return "" if kv_dtype == dtype else f"-kv-{kv_dtype}"


class _PlainRows:
    def __init__(self, cache: KvCache) -> None:
        heads, dim = cache.layout.num_kv_heads, cache.layout.head_dim
        self._rows = cache.tensor.view(-1, heads * dim)
        self._shape = (-1, heads, dim)
        self._last_read = self._rows[:0]

    def write(self, rows: torch.Tensor, kv: torch.Tensor) -> None:
        self._rows.index_copy_(0, rows, kv.reshape(len(rows), -1).to(self._rows.dtype))

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        if len(rows) > len(self._last_read):
            self._last_read = self._rows.new_empty(len(rows), self._rows.shape[1])
        found = self._last_read[: len(rows)]
        torch.index_select(self._rows, 0, rows, out=found)
        return found.view(self._shape)


class _QuantizedRows:
    """Scales lie between the values of two blocks, so rows are found by block and place in it."""

    def __init__(self, cache: KvCache) -> None:
        layout = cache.layout
        self._dtype = layout.dtype
        self._rows_of_block = layout.num_layers * 2 * layout.block_size
        heads, dim = layout.num_kv_heads, layout.head_dim
        values, scales = cache.values, cache.scales
        self._value_dtype = values.dtype
        # As bytes: torch does not index all that it computes with.
        self._values = values.view(torch.uint8).view(
            cache.num_blocks, self._rows_of_block, heads, dim
        )
        self._scales = (
            None if scales is None else scales.view(cache.num_blocks, self._rows_of_block, heads)
        )

    def write(self, rows: torch.Tensor, kv: torch.Tensor) -> None:
        at = self._places(rows)
        values, scales = numbers.kept(kv, self._dtype)
        self._values[at] = values.view(torch.uint8)
        if self._scales is not None:
            assert scales is not None
            self._scales[at] = scales

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        at = self._places(rows)
        values = self._values[at].view(self._value_dtype)
        return numbers.read(values, None if self._scales is None else self._scales[at])

    def _places(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = rows.div(self._rows_of_block, rounding_mode="floor")
        return blocks, rows - blocks * self._rows_of_block
