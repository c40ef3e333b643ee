"""The model that is measured: a checkpoint, or random weights of an 8B Llama's shape."""

import dataclasses
from pathlib import Path

import torch

from kvrelay.model.spec import ModelSpec, read_spec, spec_of
from kvrelay.model.weights import LayerWeights, Weights, load_weights

EIGHT_B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}

TINY = EIGHT_B | {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 256,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}

_STD = 0.02


def model_of(
    model_dir: Path | None, *, is_tiny: bool, device: torch.device
) -> tuple[str, ModelSpec, Weights]:
    """A name for the report, and the model. Random weights are made where they are used."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if model_dir is not None:
        spec = read_spec(model_dir)
        return model_dir.name, spec, load_weights(model_dir, spec, dtype=dtype)
    spec = spec_of(TINY if is_tiny else EIGHT_B)
    name = "tiny Llama, random weights" if is_tiny else "8B Llama shape, random weights"
    return name, spec, random_weights(spec, dtype, device)


def random_weights(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Weights:
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        empty = torch.empty(rows, columns, dtype=dtype, device=device)
        return empty.normal_(0.0, _STD, generator=generator)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.float32, device=device)

    hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
    absent = {
        field.name: None
        for field in dataclasses.fields(LayerWeights)
        if field.name.endswith("_bias") or field.name in ("q_norm", "k_norm")
    }

    def layer() -> LayerWeights:
        return LayerWeights(
            **absent,
            input_norm=ones(hidden),
            qkv=matrix((spec.num_heads + 2 * spec.num_kv_heads) * dim, hidden),
            out=matrix(hidden, spec.num_heads * dim),
            post_norm=ones(hidden),
            gate_up=matrix(2 * inner, hidden),
            down=matrix(hidden, inner),
        )

    return Weights(
        embed=matrix(spec.vocab_size, hidden),
        layers=tuple(layer() for _ in range(spec.num_layers)),
        norm=ones(hidden),
        head=matrix(spec.vocab_size, hidden),
    )


def matmul_params(spec: ModelSpec) -> int:
    """Weights that every token is multiplied with, the head aside."""
    qkv = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    out = spec.num_heads * spec.head_dim
    per_layer = spec.hidden_size * (qkv + out + 3 * spec.intermediate_size)
    return per_layer * spec.num_layers


def prefill_flop(spec: ModelSpec, num_tokens: int) -> float:
    """Of one prompt: products, causal attention, and the head of its last row."""
    attention = 2 * num_tokens**2 * spec.num_heads * spec.head_dim * spec.num_layers
    head = 2 * spec.vocab_size * spec.hidden_size
    return 2.0 * matmul_params(spec) * num_tokens + attention + head


def kv_num_bytes(spec: ModelSpec, num_tokens: int, element_size: int) -> int:
    return 2 * num_tokens * spec.num_layers * spec.num_kv_heads * spec.head_dim * element_size
