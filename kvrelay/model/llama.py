"""The forward pass of the whole Llama family, with attention left to the caller.

The residual stream, norms, rotary embedding and attention are float32; matrix products are
of the weights' dtype. Where KV lives, and which rows see which, is `Attend`'s business, so
serving and the reference share every line here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from kvrelay.model import layers
from kvrelay.model.linear import Linear
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import LayerWeights, Weights


class Attend(Protocol):
    """Keeps the rows' KV and lets each row attend to what it may see."""

    def __call__(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """All rows of one layer.

        Args:
            layer: its index.
            q: [num_rows, num_heads, head_dim], float32, scaled.
            kv: [num_rows, 2, num_kv_heads, head_dim], of the model's dtype.

        Returns:
            Like `q`.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer's weights, ready to compute with."""

    input_norm: torch.Tensor  # [hidden_size]
    qkv: Linear
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    out: Linear
    post_norm: torch.Tensor  # [hidden_size]
    gate_up: Linear
    down: Linear


class Llama:
    """Weights and what follows from the spec, without state.

    `weights` may be dropped afterwards: the matrices are kept as the CPU likes them.
    """

    def __init__(self, spec: ModelSpec, weights: Weights, *, num_positions: int) -> None:
        assert len(weights.layers) == spec.num_layers
        self.spec = spec
        self._embed = weights.embed
        self._layers = tuple(_layer(layer) for layer in weights.layers)
        self._norm = weights.norm
        self._head = Linear(weights.head)
        self._rope = layers.rope_table(
            spec.rope, head_dim=spec.head_dim, num_positions=num_positions
        )

    @property
    def products(self) -> Mapping[str, Linear]:
        """One of each kind: those of the first layer, and the head."""
        layer = self._layers[0]
        return {
            "qkv": layer.qkv,
            "out": layer.out,
            "gate_up": layer.gate_up,
            "down": layer.down,
            "head": self._head,
        }

    def hidden(
        self, token_ids: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Every row through every layer.

        Args:
            token_ids: [num_rows], int64; `layers.padded_rows` of them.
            positions: like `token_ids`.
            attend: called once per layer, in order.

        Returns:
            [num_rows, hidden_size], float32, before the last norm.
        """
        cos, sin = self._rope.index_select(0, positions).unsqueeze(2).unbind(1)
        x = functional.embedding(token_ids, self._embed).float()
        for index, layer in enumerate(self._layers):
            q, kv = self._qkv(layer, x, cos, sin)
            seen = attend(index, q, kv).flatten(1).to(layer.out.dtype)
            x = x + layer.out(seen)
            x = x + self._mlp(layer, x)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_rows, vocab_size], float32, of rows that `hidden` returned, padded like its."""
        x = layers.rms_norm(hidden, self._norm, self.spec.rms_norm_eps)
        return self._head(x.to(self._head.dtype)).float()

    def _qkv(
        self, layer: Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        spec = self.spec
        num_q, num_kv = spec.num_heads, spec.num_kv_heads
        x = layers.rms_norm(x, layer.input_norm, spec.rms_norm_eps).to(layer.qkv.dtype)
        qkv = layer.qkv(x)
        qkv = qkv.view(len(x), num_q + 2 * num_kv, spec.head_dim)
        qk = qkv[:, : num_q + num_kv].float()
        if layer.q_norm is not None and layer.k_norm is not None:
            q = layers.rms_norm(qk[:, :num_q], layer.q_norm, spec.rms_norm_eps)
            k = layers.rms_norm(qk[:, num_q:], layer.k_norm, spec.rms_norm_eps)
            qk = torch.cat((q, k), dim=1)
        qk = layers.rotate(qk, cos, sin)
        kv = torch.cat((qk[:, num_q:].to(qkv.dtype), qkv[:, num_q + num_kv :]), dim=1)
        q = qk[:, :num_q] * spec.head_dim**-0.5
        return q, kv.view(len(x), 2, num_kv, spec.head_dim)

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        x = layers.rms_norm(x, layer.post_norm, self.spec.rms_norm_eps).to(layer.down.dtype)
        return layer.down(layers.swiglu(layer.gate_up(x)))


def _layer(weights: LayerWeights) -> Layer:
    return Layer(
        input_norm=weights.input_norm,
        qkv=Linear(weights.qkv, weights.qkv_bias),
        q_norm=weights.q_norm,
        k_norm=weights.k_norm,
        out=Linear(weights.out, weights.out_bias),
        post_norm=weights.post_norm,
        gate_up=Linear(weights.gate_up, weights.gate_up_bias),
        down=Linear(weights.down, weights.down_bias),
    )
