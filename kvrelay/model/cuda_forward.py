"""The forward pass on a device, as one list of kernels that either path goes through.

The residual stream is float32 and changes in place; a product leaves partial sums, which the
next norm, rotation or activation adds up. The paths differ in their products and in how rows
attend, and in nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from kvrelay.kernels.few_rows import MAX_ROWS, num_parts
from kvrelay.kernels.generation_attention import split_sums
from kvrelay.kernels.lang import powers_of_2
from kvrelay.kernels.matrix import Matrix, pack
from kvrelay.kernels.norm import sum_of_parts
from kvrelay.kernels.ops import Ops
from kvrelay.kernels.prompt_attention import QueryTiles
from kvrelay.model.cuda_weights import DeviceLayer, DeviceWeights, Product
from kvrelay.model.spec import ModelSpec

Multiply = Callable[[torch.Tensor, Product], torch.Tensor]
"""[num_rows, in_features] to [num_parts, num_rows, out_features]."""

Attend = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Layer, q [num_rows, num_heads, head_dim], and where the outcome goes, like q."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRows:
    """Rows and where their KV goes; all on the device."""

    token_ids: torch.Tensor  # [num_rows], int32
    positions: torch.Tensor  # [num_rows], int32; negative for padding
    row_tables: torch.Tensor  # [num_rows], int32
    block_tables: torch.Tensor  # [num_tables, max_blocks], int32


class Forward:
    """Weights, cache and kernels, without state of its own."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: DeviceWeights,
        cache: torch.Tensor,
        ops: Ops,
        *,
        rows_tile: int = 0,
    ) -> None:
        """`rows_tile`: see `few_rows`; 0 lets it follow from the number of rows."""
        self._spec = spec
        self._weights = weights
        self._ops = ops
        self._dtype = cache.dtype
        self._rows_tile = rows_tile
        self._max_rows = rows_tile or MAX_ROWS
        # [num_blocks, block_size, num_kv_heads, head_dim] of each layer
        self._kv = [(cache[:, i, 0], cache[:, i, 1]) for i in range(spec.num_layers)]
        self._scale = spec.head_dim**-0.5
        # The first token of a request is chosen with the prompt's numerics.
        self._prompt_head = pack(weights.head.prompt, None, kind="plain")

    def warm_up(self) -> None:
        """Compile the head of prompts for any number of rows; the rest is warm with one step."""
        hidden = self._weights.head.in_features
        for num_rows in powers_of_2(self._max_rows):
            device = self._weights.norm.device
            x = torch.zeros(num_rows, hidden, dtype=self._dtype, device=device)
            self._few_by(x, self._prompt_head)

    def generation(self, rows: PlacedRows, *, num_splits: int) -> torch.Tensor:
        """Logits [num_rows, vocab_size], float32, of rows that each go on with one sequence."""
        spec = self._spec
        num_rows = len(rows.token_ids)
        sums = split_sums(
            num_rows, spec.num_heads, num_splits, spec.head_dim, rows.token_ids.device
        )

        def attend(layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
            self._ops.generation_attention(
                q,
                *self._kv[layer],
                rows.block_tables,
                rows.row_tables,
                rows.positions,
                sums,
                scale=self._scale,
                window=spec.sliding_window,
                out=out,
            )

        residual, said = self._layers(rows, self._few, attend)
        return self._logits(residual, said, self._weights.head.generation)

    def prompt(self, rows: PlacedRows, tiles: QueryTiles, last_rows: torch.Tensor) -> torch.Tensor:
        """Logits [len(last_rows), vocab_size], float32, of some of the rows."""

        def attend(layer: int, q: torch.Tensor, out: torch.Tensor) -> None:
            self._ops.prompt_attention(
                q,
                *self._kv[layer],
                rows.block_tables,
                tiles,
                scale=self._scale,
                window=self._spec.sliding_window,
                out=out,
            )

        residual, said = self._layers(rows, self._many, attend)
        if len(last_rows) == 0:
            return residual.new_empty(0, self._spec.vocab_size)
        return self._logits(
            residual.index_select(0, last_rows),
            said.index_select(1, last_rows),
            self._prompt_head,
        )

    def _layers(
        self, rows: PlacedRows, multiply: Multiply, attend: Attend
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream, and what the last layer adds to it."""
        residual = functional.embedding(rows.token_ids, self._weights.embed).float()
        shape = (len(residual), self._spec.num_heads, self._spec.head_dim)
        # Nobody writes the rows of padding; as zeros they stay finite.
        q = torch.zeros(shape, dtype=self._dtype, device=residual.device)
        seen = torch.zeros_like(q)
        said: torch.Tensor | None = None
        for index, layer in enumerate(self._weights.layers):
            x = self._norm(residual, said, layer.input_norm)
            self._place(index, layer, multiply(x, layer.qkv), rows, q)
            attend(index, q, seen)
            said = multiply(seen.flatten(1), layer.out)
            x = self._norm(residual, said, layer.post_norm)
            gate_up = multiply(x, layer.gate_up)
            inner = x.new_empty(len(x), layer.down.in_features)
            self._ops.silu_mul(gate_up, out=inner)
            said = multiply(inner, layer.down)
        assert said is not None
        return residual, said

    def _norm(
        self, residual: torch.Tensor, said: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(residual, dtype=self._dtype)
        self._ops.add_rms_norm(residual, said, weight, eps=self._spec.rms_norm_eps, out=out)
        return out

    def _place(
        self, index: int, layer: DeviceLayer, qkv: torch.Tensor, rows: PlacedRows, q: torch.Tensor
    ) -> None:
        """Queries to `q`, keys and values to the cache."""
        self._ops.rope_write(
            qkv,
            rows.positions,
            self._weights.rope,
            rows.block_tables,
            rows.row_tables,
            *self._kv[index],
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            eps=self._spec.rms_norm_eps,
            q_out=q,
        )

    def _few(self, x: torch.Tensor, product: Product) -> torch.Tensor:
        return self._few_by(x, product.generation)

    def _few_by(self, x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
        shape = (num_parts(matrix), len(x), matrix.out_features)
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
        self._ops.few_rows(x, matrix, out=out, rows_tile=self._rows_tile)
        return out

    def _many(self, x: torch.Tensor, product: Product) -> torch.Tensor:
        out = x.new_empty(1, len(x), product.out_features)
        self._ops.many_rows(x, product.prompt, product.bias, out=out[0])
        return out

    def _logits(self, residual: torch.Tensor, said: torch.Tensor, head: Matrix) -> torch.Tensor:
        x = self._norm(residual, said, self._weights.norm)
        parts = [sum_of_parts(self._few_by(rows, head)) for rows in x.split(self._max_rows)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
