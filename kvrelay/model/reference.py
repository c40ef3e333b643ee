"""The model without blocks, batches or tiles: what tests hold the runner's answers against.

It shares the layers with the runner, and nothing of paging, planning or tiled attention.
Its logits are close to the runner's, not bit-equal: it sums in another order.
"""

from collections.abc import Sequence

import torch

from kvrelay.model import layers
from kvrelay.model.llama import Llama
from kvrelay.model.sampler import sample
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import Weights
from kvrelay.types import SamplingParams


class Reference:
    """One sequence at a time, its KV contiguous."""

    def __init__(self, spec: ModelSpec, weights: Weights, *, num_positions: int) -> None:
        self._spec = spec
        self._dtype = weights.dtype
        self._model = Llama(spec, weights, num_positions=num_positions)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Teacher-forced: row i chooses token i + 1. [len(token_ids), vocab_size], float32."""
        kv = self._empty_kv()
        return self._extend(kv, token_ids)

    @torch.inference_mode()
    def generate(
        self, prompt: Sequence[int], *, num_tokens: int, params: SamplingParams
    ) -> list[int]:
        """The first `num_tokens` tokens after `prompt`; no token stops it."""
        kv = self._empty_kv()
        output: list[int] = []
        tokens = list(prompt)
        while len(output) < num_tokens:
            logits = self._extend(kv, tokens)[-1:]
            position = len(prompt) + len(output)
            tokens = sample(logits, [params], [position])
            output += tokens
        return output

    def _empty_kv(self) -> list[torch.Tensor]:
        shape = (0, 2, self._spec.num_kv_heads, self._spec.head_dim)
        return [torch.empty(shape, dtype=self._dtype) for _ in range(self._spec.num_layers)]

    def _extend(self, cache: list[torch.Tensor], token_ids: Sequence[int]) -> torch.Tensor:
        """Logits of `token_ids` after what `cache` holds; appends theirs to it."""
        start, num_rows = len(cache[0]), len(token_ids)
        padding = layers.padded_rows(num_rows, self._dtype) - num_rows
        positions = torch.arange(start, start + num_rows)

        def attend(layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            cache[layer] = torch.cat((cache[layer], kv[:num_rows]))
            out = torch.zeros_like(q)
            out[:num_rows] = self._attention(q[:num_rows], cache[layer], positions)
            return out

        hidden = self._model.hidden(
            torch.tensor([*token_ids, *[0] * padding]),
            torch.cat((positions, positions.new_zeros(padding))),
            attend,
        )
        return self._model.logits(hidden)[:num_rows]

    def _attention(
        self, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Softmax over all keys at once."""
        k, v = kv.float().repeat_interleave(self._spec.group_size, dim=2).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k)
        keys = torch.arange(len(kv))
        hidden = keys[None, :] > positions[:, None]
        if self._spec.sliding_window is not None:
            hidden |= keys[None, :] <= positions[:, None] - self._spec.sliding_window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v)
