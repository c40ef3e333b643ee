"""GGUF metadata, said again as a Hugging Face `config.json`.

Whatever would change the mathematics and cannot be said there is refused by name:
a model that loads must be the model its author meant.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kvrelay.errors import ModelInvalid
from kvrelay.store.gguf_file import GgufFile

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
"""GGUF architecture to (model_type, class). Mistral is `llama` in GGUF."""

ROPE_FREQS = "rope_freqs.weight"

_UNDERSTOOD = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "vocab_size",
    }
)

_HARMLESS_VALUES: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.attn_factor": (1.0,),
    "tensor_data_layout": ("Meta AI original pth", "reference"),
    "use_parallel_residual": (False,),
}


def model_config(file: GgufFile) -> dict[str, Any]:
    """The `config.json` of the model in `file`.

    Raises:
        ModelInvalid: an architecture, a setting or a rope scaling kvrelay does not know.
    """
    if file.arch not in ARCHITECTURES:
        raise ModelInvalid(
            file.path, f"architecture {file.arch} is not one of {', '.join(ARCHITECTURES)}"
        )
    num_parts = file.get("split.count", int, 1)
    if num_parts > 1:
        raise ModelInvalid(
            file.path, f"is one of {num_parts} parts; merge them into one file first"
        )
    _refuse_unknown_settings(file)
    model_type, class_name = ARCHITECTURES[file.arch]
    num_heads = _int(file, "attention.head_count")
    hidden_size = _int(file, "embedding_length")
    head_dim = _int(file, "attention.key_length", hidden_size // num_heads)
    _require_equal(file, "attention.value_length", head_dim)
    _require_equal(file, "rope.dimension_count", head_dim)
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "attention_dropout": 0.0,
        "bos_token_id": file.find("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": eos_token_ids(file),
        "pad_token_id": file.find("tokenizer.ggml.padding_token_id", int),
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": _int(file, "feed_forward_length"),
        "num_hidden_layers": _int(file, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _int(file, "attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": _int(file, "context_length"),
        "rms_norm_eps": _decimal(_float(file, "attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(_float(file, "rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(file.get("tokenizer.ggml.tokens", list)),
    }
    if file.arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = False
    if file.arch == "qwen3":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if file.arch in ("qwen2", "qwen3"):
        config["use_sliding_window"] = False
    return config


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The `generation_config.json`: which tokens begin and end a text."""
    ids = {
        "bos_token_id": file.find("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": eos_token_ids(file),
        "pad_token_id": file.find("tokenizer.ggml.padding_token_id", int),
    }
    return {name: value for name, value in ids.items() if value is not None}


def eos_token_ids(file: GgufFile) -> list[int]:
    """Every token that ends a text or a turn, the main one first."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [file.find(f"tokenizer.ggml.{key}", int) for key in keys]
    return list(dict.fromkeys(i for i in ids if i is not None))


def llama3_rope_scaling(
    factors: npt.NDArray[np.float32], *, head_dim: int, rope_theta: float
) -> dict[str, Any] | None:
    """The llama3 rope scaling whose frequency divisors are `factors`; None if none fits.

    GGUF keeps only the computed divisors. The published family fixes the low and high
    frequency factors at 1 and 4, so the largest divisor gives the factor and trying the
    original context lengths gives the rest.
    """
    factor = float(factors.max())
    for original in (2**n for n in range(11, 18)):
        expected = _llama3_divisors(factor, original, head_dim=head_dim, rope_theta=rope_theta)
        if np.allclose(factors, expected, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    return None


def _llama3_divisors(
    factor: float, original: int, *, head_dim: int, rope_theta: float
) -> npt.NDArray[np.float64]:
    exponent = np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    wavelength = 2 * math.pi * rope_theta**exponent
    # 0 where a wave is longer than the original context, 1 where four fit into it.
    smooth = np.clip((original / wavelength - 1.0) / 3.0, 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)


def _rope_scaling(file: GgufFile, head_dim: int) -> dict[str, Any] | None:
    kind = file.get(f"{file.arch}.rope.scaling.type", str, "none")
    if ROPE_FREQS in file.tensors:
        if kind not in ("none", "llama3"):
            raise ModelInvalid(file.path, f"has both {ROPE_FREQS} and rope scaling {kind}")
        return _rope_scaling_of_freqs(file, head_dim)
    if kind == "none":
        return None
    factor = _float(file, "rope.scaling.factor")
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = _int(file, "rope.scaling.original_context_length")
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise ModelInvalid(file.path, f"rope scaling {kind} is not one of none, linear, yarn")


def _rope_scaling_of_freqs(file: GgufFile, head_dim: int) -> dict[str, Any] | None:
    factors = file.dequantize(ROPE_FREQS)
    if factors.shape != (head_dim // 2,):
        raise ModelInvalid(
            file.path, f"tensor {ROPE_FREQS} is {factors.shape}, wanted ({head_dim // 2},)"
        )
    if np.all(factors == 1.0):
        return None
    theta = _float(file, "rope.freq_base", 10000.0)
    scaling = llama3_rope_scaling(factors, head_dim=head_dim, rope_theta=theta)
    if scaling is None:
        raise ModelInvalid(file.path, f"tensor {ROPE_FREQS} follows no llama3 rope scaling")
    return scaling


def _refuse_unknown_settings(file: GgufFile) -> None:
    prefix = f"{file.arch}."
    for key in sorted(file.keys()):
        name = key.removeprefix(prefix)
        if name == key or name in _UNDERSTOOD:
            continue
        value = file.get(key, object)
        if value not in _HARMLESS_VALUES.get(name, ()):
            raise ModelInvalid(file.path, f"metadata {key} = {value!r} is not supported")


def _require_equal(file: GgufFile, name: str, wanted: int) -> None:
    value = _int(file, name, wanted)
    if value != wanted:
        raise ModelInvalid(file.path, f"metadata {file.arch}.{name} is {value}, wanted {wanted}")


def _int(file: GgufFile, name: str, default: int | None = None) -> int:
    key = f"{file.arch}.{name}"
    value = file.get(key, int) if default is None else file.get(key, int, default)
    if value <= 0:
        raise ModelInvalid(file.path, f"metadata {key} is {value}, wanted at least 1")
    return value


def _float(file: GgufFile, name: str, default: float | None = None) -> float:
    key = f"{file.arch}.{name}"
    value = file.get(key, float) if default is None else file.get(key, float, default)
    if not (math.isfinite(value) and value > 0):
        raise ModelInvalid(file.path, f"metadata {key} is {value}, wanted more than 0")
    return value


def _decimal(value: float) -> float:
    """The short decimal a float32 stands for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
