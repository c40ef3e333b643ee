"""A model's weights on the device, each matrix as either path reads it.

Prompts are computed with the model's own dtype. Generated tokens are computed with the same
tensors, or with matrices of fewer bits that are made of them here, beside them.
"""

from dataclasses import dataclass

import torch

from kvrelay.kernels.matrix import Kind, Matrix, pack
from kvrelay.model.layers import rope_table
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import LayerWeights, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One matrix: `prompt` has the model's dtype, `generation` maybe fewer bits."""

    prompt: torch.Tensor  # [out_features, in_features]
    bias: torch.Tensor | None
    generation: Matrix

    @property
    def in_features(self) -> int:
        return self.prompt.shape[1]

    @property
    def out_features(self) -> int:
        return self.prompt.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLayer:
    """Norms are float32."""

    input_norm: torch.Tensor
    qkv: Product
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    out: Product
    post_norm: torch.Tensor
    gate_up: Product
    down: Product


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceWeights:
    embed: torch.Tensor  # [vocab_size, hidden_size]
    layers: tuple[DeviceLayer, ...]
    norm: torch.Tensor
    head: Product
    rope: torch.Tensor  # [num_positions, 2, head_dim], float32

    @property
    def step_num_bytes(self) -> int:
        """What one step of the generation path has to read, whatever its rows."""
        matrices = [
            product.generation
            for layer in self.layers
            for product in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        return sum(matrix.num_bytes for matrix in (*matrices, self.head.generation))


def device_weights(
    spec: ModelSpec, weights: Weights, *, kind: Kind, num_positions: int, device: torch.device
) -> DeviceWeights:
    """`weights` on the device; layer by layer, so that nothing is there twice for long."""
    embed = weights.embed.to(device)
    head = embed if weights.head is weights.embed else weights.head.to(device)
    rope = rope_table(spec.rope, head_dim=spec.head_dim, num_positions=num_positions)
    return DeviceWeights(
        embed=embed,
        layers=tuple(_layer(layer, kind, device) for layer in weights.layers),
        norm=weights.norm.to(device),
        # Four bits are too few for the choice between all tokens.
        head=_product(head, None, "int8" if kind == "int4" else kind, device),
        rope=rope.to(device),
    )


def _layer(weights: LayerWeights, kind: Kind, device: torch.device) -> DeviceLayer:
    def norm(weight: torch.Tensor | None) -> torch.Tensor | None:
        return None if weight is None else weight.to(device)

    return DeviceLayer(
        input_norm=weights.input_norm.to(device),
        qkv=_product(weights.qkv, weights.qkv_bias, kind, device),
        q_norm=norm(weights.q_norm),
        k_norm=norm(weights.k_norm),
        out=_product(weights.out, weights.out_bias, kind, device),
        post_norm=weights.post_norm.to(device),
        gate_up=_product(weights.gate_up, weights.gate_up_bias, kind, device),
        down=_product(weights.down, weights.down_bias, kind, device),
    )


def _product(
    matrix: torch.Tensor, bias: torch.Tensor | None, kind: Kind, device: torch.device
) -> Product:
    there = matrix.to(device)
    bias_there = None if bias is None else bias.to(device)
    return Product(prompt=there, bias=bias_there, generation=pack(there, bias_there, kind=kind))
