"""Attention over paged KV in which a row's bits depend on that row alone.

Keys are read in tiles of `KEY_TILE` at absolute positions, each tile is one product of fixed
shape in float32, and tiles are put together in ascending order. So neither the other rows of
the batch nor where a chunk begins can change the order in which anything is summed. A tile
that a row may not see adds an exact zero to it, and may as well be skipped.

Source: online softmax as in FlashAttention (Dao et al. 2022), algorithm 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.model.kv_rows import kv_rows
from kvrelay.model.spec import ModelSpec

KEY_TILE = 128
QUERY_TILE = 64
"""Prompt rows of one product. Both are part of the numerics: another value, other bits."""

MAX_PAIRS = 32
"""Pairs of row and key tile read at a time on the generation path: they fit the CPU cache."""

HIDDEN = -1e30
"""Added to a score that must not be seen: absorbs it whole, yet stays finite."""

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptTile:
    """Up to `QUERY_TILE` prompt rows `[first, last)` of one run and the key tiles they see."""

    first: int
    last: int
    first_key_tile: int
    last_key_tile: int
    masks: dict[int, torch.Tensor]
    """Key tile to [QUERY_TILE * group, KEY_TILE] of 0 and `HIDDEN`; others are seen whole."""


@dataclass(frozen=True, slots=True)
class PromptPlan:
    """One run of prompt rows, `[first, last)` of the step's rows."""

    first: int
    last: int
    slots: torch.Tensor  # [2 * key tiles * KEY_TILE], of layer 0
    tiles: tuple[PromptTile, ...]


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """Rows `[0, num_rows)` of the step, most key tiles first; pairs are ordered by tile."""

    num_rows: int
    pair_bounds: tuple[int, ...]
    """Pairs of the t-th tile are `[pair_bounds[t], pair_bounds[t + 1])`: rows `[0, n)`."""

    row_of_pair: torch.Tensor  # [num_pairs]
    slabs: tuple[tuple[slice, torch.Tensor], ...]
    """At most `MAX_PAIRS` pairs, and their slots in layer 0: [2 * pairs * KEY_TILE]."""

    mask: torch.Tensor  # [num_pairs, 1, 1, KEY_TILE]


class PagedAttention:
    """Reads the KV of one cache. Plans are made once per step, for all layers.

    What the cache keeps of a row is all that anybody attends to, the row itself included.
    """

    def __init__(self, spec: ModelSpec, cache: KvCache) -> None:
        layout = cache.layout
        assert layout.num_kv_heads == spec.num_kv_heads
        assert layout.head_dim == spec.head_dim
        self._spec = spec
        self._layout = layout
        self._rows = kv_rows(cache)
        self._group = _padded_group(spec.group_size)
        self._read_kv = torch.empty(0, spec.num_kv_heads, spec.head_dim, dtype=torch.float32)

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Put `kv` [num_rows, 2, num_kv_heads, head_dim] where `write_slots` said."""
        self._rows.write(slots + self._layer_offset(layer), kv.flatten(0, 1))

    def write_slots(self, slots: Slots) -> torch.Tensor:
        """[num_rows * 2] rows of K and V in layer 0, from the slots of layer 0."""
        return torch.from_numpy(
            np.stack((slots, slots + self._layout.block_size), axis=1).reshape(-1)
        )

    def plan_prompt(
        self, block_table: Sequence[int], *, start: int, num_rows: int, first: int
    ) -> PromptPlan:
        """Rows `[first, first + num_rows)` of the step are positions from `start` on."""
        end = start + num_rows
        num_key_tiles = -(-end // KEY_TILE)
        positions = np.arange(num_key_tiles * KEY_TILE)
        # What is not written yet may be anything, even NaN; the first token stands in for it.
        slots = slots_of(self._layout, block_table, np.where(positions < end, positions, 0))
        tiles = tuple(
            self._prompt_tile(start, offset, min(offset + QUERY_TILE, num_rows))
            for offset in range(0, num_rows, QUERY_TILE)
        )
        return PromptPlan(first, first + num_rows, self._both(slots), tiles)

    def plan_generation(
        self, block_tables: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> GenerationPlan:
        """Rows must come with the most key tiles first (`num_tiles_seen`)."""
        counts = [num_tiles_seen(position) for position in positions]
        assert all(a >= b for a, b in pairwise(counts))
        by_tile = [sum(count > t for count in counts) for t in range(counts[0])]
        row_of_pair = np.concatenate([np.arange(n) for n in by_tile])
        tile_of_pair = np.repeat(np.arange(counts[0]), by_tile)
        keys = tile_of_pair[:, None] * KEY_TILE + np.arange(KEY_TILE)  # [num_pairs, KEY_TILE]
        limit = np.asarray(positions)[row_of_pair][:, None]
        seen = keys <= limit
        slots = np.empty_like(keys)
        for row, table in enumerate(block_tables):
            pairs = row_of_pair == row
            readable = np.where(seen[pairs], keys[pairs], 0)
            slots[pairs] = slots_of(self._layout, table, readable)
        if self._spec.sliding_window is not None:
            seen &= keys > limit - self._spec.sliding_window
        mask = np.where(seen, np.float32(0.0), np.float32(HIDDEN))
        return GenerationPlan(
            num_rows=len(positions),
            pair_bounds=(0, *np.cumsum(by_tile).tolist()),
            row_of_pair=torch.from_numpy(row_of_pair),
            slabs=tuple(
                (slice(lo, lo + MAX_PAIRS), self._both(slots[lo : lo + MAX_PAIRS]))
                for lo in range(0, len(slots), MAX_PAIRS)
            ),
            mask=torch.from_numpy(mask)[:, None, None, :],
        )

    def prompt(self, layer: int, q: torch.Tensor, plan: PromptPlan) -> torch.Tensor:
        """Attention of one run of prompt rows, whose KV is already written.

        Args:
            layer: its index.
            q: [num_rows of the run, num_heads, head_dim], float32, scaled.
            plan: of that run.

        Returns:
            Like `q`.
        """
        heads, dim = self._spec.num_kv_heads, self._spec.head_dim
        k, v = self._read(layer, plan.slots)
        padded = q.new_zeros(len(plan.tiles) * QUERY_TILE, heads, self._spec.group_size, dim)
        padded[: len(q)] = q.view(len(q), heads, -1, dim)
        tiles = padded.view(len(plan.tiles), QUERY_TILE, heads, -1, dim).transpose(1, 2)
        tiles = tiles.reshape(len(plan.tiles), heads, -1, dim)  # rows of a group side by side
        out = torch.empty_like(tiles)
        for i, tile in enumerate(plan.tiles):
            out[i] = _flash(tiles[i], k, v, tile)
        out = out.view(len(plan.tiles), heads, QUERY_TILE, -1, dim).transpose(1, 2)
        return out.reshape(-1, self._spec.num_heads, dim)[: len(q)]

    def generation(self, layer: int, q: torch.Tensor, plan: GenerationPlan) -> torch.Tensor:
        """Attention of generated tokens, whose KV is already written. As `prompt`."""
        heads, dim = self._spec.num_kv_heads, self._spec.head_dim
        q = q.view(plan.num_rows, heads, -1, dim)
        if self._group != self._spec.group_size:
            q = torch.nn.functional.pad(q, (0, 0, 0, self._group - self._spec.group_size))
        num_pairs = len(plan.row_of_pair)
        top = q.new_empty(num_pairs, heads, self._group, 1)
        total = torch.empty_like(top)
        values = q.new_empty(num_pairs, heads, self._group, dim)
        for pairs, slots in plan.slabs:
            k, v = self._read(layer, slots)
            queries = q.index_select(0, plan.row_of_pair[pairs])
            _pairs(queries, k, v, plan.mask[pairs], out=(top[pairs], total[pairs], values[pairs]))
        out = _combined(plan, top, total, values)
        return out[:, :, : self._spec.group_size].reshape(plan.num_rows, -1, dim)

    def _read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each [num_tiles, num_kv_heads, KEY_TILE, head_dim], float32, contiguous.

        The next read overwrites them: fresh memory for each would cost more than the copy.
        """
        heads, dim = self._spec.num_kv_heads, self._spec.head_dim
        if len(slots) > len(self._read_kv):
            self._read_kv = self._read_kv.new_empty(len(slots), heads, dim)
        rows = self._rows.read(slots + self._layer_offset(layer))
        stored = rows.view(2, -1, KEY_TILE, heads, dim).transpose(2, 3)
        k, v = self._read_kv[: len(slots)].view(stored.shape).copy_(stored)
        return k, v

    def _both(self, slots: Slots) -> torch.Tensor:
        """K and V rows of `slots`: all of K, then all of V."""
        return torch.from_numpy(np.stack((slots, slots + self._layout.block_size)).reshape(-1))

    def _layer_offset(self, layer: int) -> int:
        return layer * 2 * self._layout.block_size

    def _prompt_tile(self, start: int, first: int, last: int) -> PromptTile:
        """Query rows `[first, last)` of a run whose first row is position `start`."""
        oldest, newest = start + first, start + last - 1
        window = self._spec.sliding_window
        first_key = 0 if window is None else max(0, oldest - window + 1)
        masks: dict[int, torch.Tensor] = {}
        for t in range(first_key // KEY_TILE, num_tiles_seen(newest)):
            # Rows past `last` are padding; a position keeps their arithmetic finite.
            rows = torch.arange(oldest, oldest + QUERY_TILE)[:, None]
            keys = torch.arange(t * KEY_TILE, (t + 1) * KEY_TILE)[None, :]
            seen = keys <= rows
            if window is not None:
                seen &= keys > rows - window
            if not bool(seen.all()):
                mask = torch.zeros(seen.shape).masked_fill_(~seen, HIDDEN)
                masks[t] = mask.repeat_interleave(self._spec.group_size, dim=0)
        return PromptTile(first, last, first_key // KEY_TILE, num_tiles_seen(newest), masks)


def num_tiles_seen(position: int) -> int:
    """Key tiles up to and with the token at `position`."""
    return position // KEY_TILE + 1


def slots_of(
    layout: KvLayout, block_table: Sequence[int], positions: npt.NDArray[np.int64]
) -> Slots:
    """Rows of a cache where the K of layer 0 at `positions` lie; V is one block_size on."""
    table = np.asarray(block_table, dtype=np.int64)
    block, offset = np.divmod(positions, layout.block_size)
    slots: Slots = table[block] * (layout.num_layers * 2 * layout.block_size) + offset
    return slots


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: PromptTile) -> torch.Tensor:
    """[num_kv_heads, QUERY_TILE * group, head_dim] over the key tiles, oldest first."""
    top = total = values = torch.empty(0)
    for t in range(tile.first_key_tile, tile.last_key_tile):
        scores = torch.bmm(q, k[t].transpose(1, 2))
        if t in tile.masks:
            scores += tile.masks[t]
        tile_top = scores.amax(dim=-1, keepdim=True)
        if t == tile.first_key_tile:
            top = tile_top
            weights = scores.sub_(top).exp_()
            total, values = weights.sum(dim=-1, keepdim=True), torch.bmm(weights, v[t])
            continue
        new_top = torch.maximum(top, tile_top)
        weights = scores.sub_(new_top).exp_()
        fade = (top - new_top).exp_()
        total.mul_(fade).add_(weights.sum(dim=-1, keepdim=True))
        values.mul_(fade).add_(torch.bmm(weights, v[t]))
        top = new_top
    return values / total


def _pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Each pair by itself: its highest score, sum of weights and weighted values.

    Args:
        q: [num_pairs, num_kv_heads, group, head_dim].
        k: [num_pairs, num_kv_heads, KEY_TILE, head_dim].
        v: like `k`.
        mask: [num_pairs, 1, 1, KEY_TILE].
        out: each [num_pairs, num_kv_heads, group, 1 or head_dim], contiguous.
    """
    top, total, values = out
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    scores = scores.view(*q.shape[:3], KEY_TILE).add_(mask)
    torch.amax(scores, dim=-1, keepdim=True, out=top)
    weights = scores.sub_(top).exp_()
    torch.sum(weights, dim=-1, keepdim=True, out=total)
    torch.bmm(weights.flatten(0, 1), v.flatten(0, 1), out=values.flatten(0, 1))


def _combined(
    plan: GenerationPlan, top: torch.Tensor, total: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """Rows from their pairs, oldest tile first."""
    bounds = list(pairwise(plan.pair_bounds))
    if len(bounds) == 1:
        return values / total
    highest = top[: plan.num_rows].clone()
    for lo, hi in bounds[1:]:
        highest[: hi - lo] = torch.maximum(highest[: hi - lo], top[lo:hi])
    fade = (top - highest.index_select(0, plan.row_of_pair)).exp_()
    total, values = total * fade, values * fade
    row_total, row_values = total[: plan.num_rows], values[: plan.num_rows]
    for lo, hi in bounds[1:]:
        row_total[: hi - lo] += total[lo:hi]
        row_values[: hi - lo] += values[lo:hi]
    return row_values / row_total


def _padded_group(group_size: int) -> int:
    """Rows per product of the generation path.

    Measured: a product of 5, 6, 7, 9, 10 or 11 rows alone is split over threads and then
    differs from the same one among others; 1 to 4 and multiples of 4 never are.
    """
    return group_size if group_size <= 4 else -(-group_size // 4) * 4
