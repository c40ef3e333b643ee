"""GGUF tensors, renamed and unpermuted: dequantized to a Hugging Face checkpoint, and as blocks.

The checkpoint is what a prompt is computed with. The blocks, a third of its size or less, are
what tokens are generated with, where memory is what bounds the speed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from kvrelay.errors import ModelInvalid
from kvrelay.store.gguf_config import ROPE_FREQS
from kvrelay.store.gguf_file import GgufFile
from kvrelay.store.progress import Progress
from kvrelay.store.safetensors_file import Written, write_bfloat16, write_bytes

KEPT_TYPES = frozenset({"Q4_0", "Q4_1", "Q8_0"})
"""Kinds of blocks that are kept. All hold 32 values of one row; others are only dequantized."""

Item = TypeVar("Item", bound=np.generic)


def write_weights(
    file: GgufFile, config: dict[str, Any], path: Path, *, progress: Progress
) -> Written:
    """Write every tensor of `file` as bfloat16 safetensors under its Hugging Face name.

    Raises:
        ModelInvalid: a tensor is missing, unknown, of another shape or not finite.
    """
    names = tensor_names(file, config)
    expected = _expected_shapes(config)
    check_tensors(file, names, expected)
    shapes = {hf_name: expected[hf_name] for hf_name in names.values()}
    total_bytes = sum(2 * int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    progress.begin("converting weights", total_bytes=total_bytes)

    def tensors() -> Iterator[npt.NDArray[np.float32]]:
        for gguf_name in names:
            yield _tensor(file, gguf_name, config)
            progress.advance(2 * int(np.prod(file.shape(gguf_name), dtype=np.int64)))

    return write_bfloat16(path, shapes, tensors())


def write_blocks(
    file: GgufFile, config: dict[str, Any], path: Path, *, progress: Progress
) -> Written | None:
    """Write the blocks of every matrix of a kept type, unchanged but for the order of rows.

    Each becomes bytes of [out_features, num_blocks * block_bytes] under its Hugging Face name,
    its type in the header's metadata. None, and no file, if there is no such matrix. `file`
    must have passed `write_weights`.
    """
    kept = {
        name: hf_name
        for name, hf_name in tensor_names(file, config).items()
        if file.type_of(name) in KEPT_TYPES and len(file.shape(name)) == 2
    }
    if not kept:
        return None
    shapes = {hf_name: file.blocks(name).shape for name, hf_name in kept.items()}
    progress.begin(
        "keeping quantized blocks", total_bytes=sum(file.blocks(name).nbytes for name in kept)
    )

    def matrices() -> Iterator[npt.NDArray[np.uint8]]:
        for name in kept:
            blocks = file.blocks(name)
            yield _in_order(file, name, config, blocks)
            progress.advance(blocks.nbytes)

    metadata = {hf_name: file.type_of(name) for name, hf_name in kept.items()}
    return write_bytes(path, shapes, matrices(), metadata=metadata)


def tensor_names(file: GgufFile, config: dict[str, Any]) -> dict[str, str]:
    """GGUF name to Hugging Face name of every tensor this model must have."""
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for layer in range(config["num_hidden_layers"]):
        for gguf_part, hf_part in _layer_parts(file.arch, config).items():
            names[f"blk.{layer}.{gguf_part}"] = f"model.layers.{layer}.{hf_part}"
    names["output_norm.weight"] = "model.norm.weight"
    if not config["tie_word_embeddings"]:
        names["output.weight"] = "lm_head.weight"
    return names


def check_tensors(
    file: GgufFile, names: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Hold the file's tensors to exactly `names`, each of its shape."""
    for missing in sorted(names.keys() - file.tensors.keys()):
        raise ModelInvalid(file.path, f"tensor {missing} is missing")
    for spare in sorted(file.tensors.keys() - names.keys() - {ROPE_FREQS}):
        raise ModelInvalid(file.path, f"tensor {spare} has no place in a {file.arch} model")
    for gguf_name, hf_name in names.items():
        if file.shape(gguf_name) != shapes[hf_name]:
            raise ModelInvalid(
                file.path,
                f"tensor {gguf_name} is {file.shape(gguf_name)}, wanted {shapes[hf_name]}",
            )


def unpermute(values: npt.NDArray[Item], num_heads: int) -> npt.NDArray[Item]:
    """Rows of q or k from GGUF's interleaved rope order back to halves.

    Within a head, GGUF keeps the two members of a rotated pair side by side, Hugging Face
    half a head apart.

    Args:
        values: [num_heads * head_dim, ...].
        num_heads: of q, or the KV heads of k.
    """
    rows, *rest = values.shape
    pairs = rows // num_heads // 2
    return values.reshape(num_heads, pairs, 2, *rest).swapaxes(1, 2).reshape(values.shape)


def _tensor(file: GgufFile, name: str, config: dict[str, Any]) -> npt.NDArray[np.float32]:
    values = file.dequantize(name)
    if not np.isfinite(values).all():
        raise ModelInvalid(file.path, f"tensor {name} holds values that are not finite")
    return _in_order(file, name, config, values)


def _in_order(
    file: GgufFile, name: str, config: dict[str, Any], values: npt.NDArray[Item]
) -> npt.NDArray[Item]:
    """The rows of a tensor in the order Hugging Face has them."""
    # Only `llama` files are permuted; the Qwen ones keep the halves.
    if file.arch == "llama" and ".attn_q." in name:
        return unpermute(values, config["num_attention_heads"])
    if file.arch == "llama" and ".attn_k." in name:
        return unpermute(values, config["num_key_value_heads"])
    return values


def _layer_parts(arch: str, config: dict[str, Any]) -> dict[str, str]:
    parts = {
        "attn_norm.weight": "input_layernorm.weight",
        "attn_q.weight": "self_attn.q_proj.weight",
        "attn_k.weight": "self_attn.k_proj.weight",
        "attn_v.weight": "self_attn.v_proj.weight",
        "attn_output.weight": "self_attn.o_proj.weight",
        "ffn_norm.weight": "post_attention_layernorm.weight",
        "ffn_gate.weight": "mlp.gate_proj.weight",
        "ffn_up.weight": "mlp.up_proj.weight",
        "ffn_down.weight": "mlp.down_proj.weight",
    }
    if arch == "qwen2" or config.get("attention_bias"):
        parts["attn_q.bias"] = "self_attn.q_proj.bias"
        parts["attn_k.bias"] = "self_attn.k_proj.bias"
        parts["attn_v.bias"] = "self_attn.v_proj.bias"
    if arch != "qwen2" and config.get("attention_bias"):
        parts["attn_output.bias"] = "self_attn.o_proj.bias"
    if arch == "qwen3":
        parts["attn_q_norm.weight"] = "self_attn.q_norm.weight"
        parts["attn_k_norm.weight"] = "self_attn.k_norm.weight"
    return parts


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hugging Face name to shape, for every tensor such a model could have."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim, vocab = config["head_dim"], config["vocab_size"]
    q_rows = config["num_attention_heads"] * head_dim
    kv_rows = config["num_key_value_heads"] * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_rows, hidden),
        "self_attn.k_proj.weight": (kv_rows, hidden),
        "self_attn.v_proj.weight": (kv_rows, hidden),
        "self_attn.o_proj.weight": (hidden, q_rows),
        "self_attn.q_proj.bias": (q_rows,),
        "self_attn.k_proj.bias": (kv_rows,),
        "self_attn.v_proj.bias": (kv_rows,),
        "self_attn.o_proj.bias": (hidden,),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{part}": shape for part, shape in layer.items()}
    return shapes
