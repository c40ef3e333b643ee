"""Loading weights: every tensor in its place, every flaw by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrelay.errors import ModelInvalid
from kvrelay.model.spec import ModelSpec, spec_of
from kvrelay.model.weights import LayerWeights, load_weights

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
SPEC = spec_of(CONFIG)

LAYER = "model.layers.1."


def tensors_of(spec: ModelSpec) -> dict[str, torch.Tensor]:
    """A checkpoint of random values."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {
        "model.embed_tokens.weight": random(20, 16),
        "model.norm.weight": random(16),
        "lm_head.weight": random(20, 16),
    }
    for i in range(spec.num_layers):
        tensors |= {
            f"model.layers.{i}.input_layernorm.weight": random(16),
            f"model.layers.{i}.self_attn.q_proj.weight": random(16, 16),
            f"model.layers.{i}.self_attn.k_proj.weight": random(8, 16),
            f"model.layers.{i}.self_attn.v_proj.weight": random(8, 16),
            f"model.layers.{i}.self_attn.o_proj.weight": random(16, 16),
            f"model.layers.{i}.post_attention_layernorm.weight": random(16),
            f"model.layers.{i}.mlp.gate_proj.weight": random(24, 16),
            f"model.layers.{i}.mlp.up_proj.weight": random(24, 16),
            f"model.layers.{i}.mlp.down_proj.weight": random(16, 24),
        }
    return tensors


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    save_file(tensors_of(SPEC), tmp_path / "model.safetensors")
    return tmp_path


def shard(model_dir: Path) -> None:
    """Split the checkpoint into two files and an index."""
    path = model_dir / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, model_dir / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))


def test_parts_are_fused_in_order(model_dir: Path) -> None:
    """q, k, v and gate, up lie one after the other."""
    weights = load_weights(model_dir, SPEC, dtype=torch.float32)
    tensors, layer = tensors_of(SPEC), weights.layers[1]
    parts = [tensors[f"{LAYER}self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(layer.qkv, torch.cat(parts))
    parts = [tensors[f"{LAYER}mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(layer.gate_up, torch.cat(parts))
    assert torch.equal(weights.head, tensors["lm_head.weight"])
    assert layer.qkv_bias is layer.q_norm is None


def test_matrices_take_the_dtype_asked_for_and_norms_stay_float32(model_dir: Path) -> None:
    """bfloat16 halves what is read per step; norms are too small to matter."""
    weights = load_weights(model_dir, SPEC, dtype=torch.bfloat16)
    layer = weights.layers[0]
    assert weights.dtype == layer.qkv.dtype == layer.down.dtype == torch.bfloat16
    assert weights.norm.dtype == layer.input_norm.dtype == torch.float32


def test_shards_load_as_one_file_does(model_dir: Path) -> None:
    """The index says where each tensor is."""
    whole = load_weights(model_dir, SPEC, dtype=torch.float32)
    shard(model_dir)
    parts = load_weights(model_dir, SPEC, dtype=torch.float32)
    assert torch.equal(whole.embed, parts.embed)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        for name in LayerWeights.__dataclass_fields__:
            x, y = getattr(a, name), getattr(b, name)
            assert x is y is None or torch.equal(x, y)


def test_a_tied_head_is_the_embedding(model_dir: Path) -> None:
    """One tensor serves both, and a stored copy of it is ignored."""
    tied = spec_of(CONFIG | {"tie_word_embeddings": True})
    weights = load_weights(model_dir, tied, dtype=torch.float32)
    assert weights.head is weights.embed
    untied = load_weights(model_dir, SPEC, dtype=torch.float32)
    assert untied.num_bytes == weights.num_bytes + weights.embed.nbytes


Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda t: t.pop(f"{LAYER}mlp.up_proj.weight"), "up_proj.weight"),
        (lambda t: t.update({f"{LAYER}extra.weight": torch.zeros(3)}), "extra.weight"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(17)}), r"norm\.weight.*17.*16"),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(16, dtype=torch.int32)}),
            r"norm\.weight.*int32",
        ),
    ],
)
def test_a_wrong_tensor_is_refused_by_name(
    model_dir: Path, damage: Callable[[Tensors], object], named: str
) -> None:
    """Missing, spare, of another shape, not a float."""
    tensors = tensors_of(SPEC)
    damage(tensors)
    save_file(tensors, model_dir / "model.safetensors")
    with pytest.raises(ModelInvalid, match=named):
        load_weights(model_dir, SPEC, dtype=torch.float32)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused_by_name(model_dir: Path, keep: int) -> None:
    """Cut anywhere, it is damaged."""
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelInvalid, match=r"model\.safetensors"):
        load_weights(model_dir, SPEC, dtype=torch.float32)


def test_a_missing_file_is_refused_by_name(model_dir: Path) -> None:
    """A whole checkpoint, or one of its shards."""
    shard(model_dir)
    (model_dir / "b.safetensors").unlink()
    with pytest.raises(ModelInvalid, match=r"b\.safetensors"):
        load_weights(model_dir, SPEC, dtype=torch.float32)
    (model_dir / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelInvalid, match=r"model\.safetensors"):
        load_weights(model_dir, SPEC, dtype=torch.float32)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"x": "../a"}}',
        '{"weight_map": {"x": 3}}',
    ],
)
def test_a_bad_index_is_refused_by_name(model_dir: Path, index: str) -> None:
    """Not JSON, not an index, or pointing out of the directory."""
    (model_dir / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelInvalid, match=r"model\.safetensors\.index\.json"):
        load_weights(model_dir, SPEC, dtype=torch.float32)


def test_a_tensor_in_another_shard_than_announced_is_refused(model_dir: Path) -> None:
    """An index that lies about one tensor is not believed about the others."""
    shard(model_dir)
    path = model_dir / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "a.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelInvalid, match=r"model\.norm\.weight"):
        load_weights(model_dir, SPEC, dtype=torch.float32)
