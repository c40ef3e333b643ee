"""GGUF files small enough to write in a test: random weights, a byte-level vocabulary."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import pre_tokenizers

HIDDEN, INNER, NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
CONTEXT_TOKENS = 512

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2")
MERGED = tuple(merge.replace(" ", "") for merge in MERGES)
TOKENS = (*SPECIAL, *BYTES, *MERGED, "<tool>")
TOKEN_TYPES = (3,) * len(SPECIAL) + (1,) * (len(BYTES) + len(MERGED)) + (4,)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Array = npt.NDArray[np.float32]


def random_weights(arch: str, *, tied: bool = True, seed: int = 0) -> dict[str, Array]:
    """Hugging Face names to values that bfloat16 holds exactly."""
    generator = np.random.default_rng(seed)

    def tensor(*shape: int) -> Array:
        return (generator.integers(-64, 64, size=shape) / 128).astype(np.float32)

    kv_rows, q_rows = NUM_KV_HEADS * HEAD_DIM, NUM_HEADS * HEAD_DIM
    weights = {"model.embed_tokens.weight": tensor(len(TOKENS), HIDDEN)}
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {
            prefix + "input_layernorm.weight": tensor(HIDDEN) + 1,
            prefix + "self_attn.q_proj.weight": tensor(q_rows, HIDDEN),
            prefix + "self_attn.k_proj.weight": tensor(kv_rows, HIDDEN),
            prefix + "self_attn.v_proj.weight": tensor(kv_rows, HIDDEN),
            prefix + "self_attn.o_proj.weight": tensor(HIDDEN, q_rows),
            prefix + "post_attention_layernorm.weight": tensor(HIDDEN) + 1,
            prefix + "mlp.gate_proj.weight": tensor(INNER, HIDDEN),
            prefix + "mlp.up_proj.weight": tensor(INNER, HIDDEN),
            prefix + "mlp.down_proj.weight": tensor(HIDDEN, INNER),
        }
        if arch == "qwen2":
            weights[prefix + "self_attn.q_proj.bias"] = tensor(q_rows)
            weights[prefix + "self_attn.k_proj.bias"] = tensor(kv_rows)
            weights[prefix + "self_attn.v_proj.bias"] = tensor(kv_rows)
        if arch == "qwen3":
            weights[prefix + "self_attn.q_norm.weight"] = tensor(HEAD_DIM) + 1
            weights[prefix + "self_attn.k_norm.weight"] = tensor(HEAD_DIM) + 1
    weights["model.norm.weight"] = tensor(HIDDEN) + 1
    if not tied:
        weights["lm_head.weight"] = tensor(len(TOKENS), HIDDEN)
    return weights


def interleave(values: Array, num_heads: int) -> Array:
    """Rows of q or k in the order `llama` GGUF files keep them: the pair (i, i + half) adjacent."""
    half = values.shape[0] // num_heads // 2
    order = [
        head * 2 * half + i + side * half
        for head in range(num_heads)
        for i in range(half)
        for side in (0, 1)
    ]
    return values[order]


def write_gguf(
    path: Path,
    arch: str = "llama",
    *,
    weights: dict[str, Array] | None = None,
    pre: str = "gpt-2",
    edit_tensors: Callable[[dict[str, Array]], object] | None = None,
    edit_metadata: Callable[[gguf.GGUFWriter], object] | None = None,
    types: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
) -> Path:
    """Write a whole model file; the edits come last and can spoil it.

    `types` quantizes: Hugging Face names, or parts of them, to how such matrices are stored.
    """
    writer = gguf.GGUFWriter(path, arch)
    for name, value in _sizes().items():
        writer.add_uint32(f"{arch}.{name}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{arch}.rope.freq_base", 10000.0)
    _add_tokenizer(writer, pre)
    if edit_metadata is not None:
        edit_metadata(writer)
    tensors = {
        _gguf_name(name): _as_gguf(arch, name, values)
        for name, values in (weights or random_weights(arch)).items()
    }
    if edit_tensors is not None:
        edit_tensors(tensors)
    quantized = {
        _gguf_name(name): kind
        for name in weights or random_weights(arch)
        for part, kind in types.items()
        if part in name
    }
    for name, values in tensors.items():
        if name in quantized:
            blocks = gguf.quantize(values, quantized[name])
            writer.add_tensor(name, blocks, raw_dtype=quantized[name])
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sizes() -> dict[str, int]:
    return {
        "block_count": NUM_LAYERS,
        "context_length": CONTEXT_TOKENS,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": NUM_HEADS,
        "attention.head_count_kv": NUM_KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
    }


def _add_tokenizer(writer: gguf.GGUFWriter, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(list(TOKENS))
    writer.add_token_types(list(TOKEN_TYPES))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str) -> str:
    if name in _WHOLE:
        return _WHOLE[name]
    _, _, layer, part = name.split(".", 3)
    module, _, kind = part.rpartition(".")
    return f"blk.{layer}.{_PARTS[module]}.{kind}"


def _as_gguf(arch: str, name: str, values: Array) -> Array:
    if arch == "llama" and ".q_proj." in name:
        return interleave(values, NUM_HEADS)
    if arch == "llama" and ".k_proj." in name:
        return interleave(values, NUM_KV_HEADS)
    return values


class Recorder:
    """A `Progress` that remembers what it was told."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.totals_bytes: list[int] = []
        self.done_bytes: list[int] = []
        self.notes: list[str] = []

    def begin(self, stage: str, *, total_bytes: int) -> None:
        self.stages.append(stage)
        self.totals_bytes.append(total_bytes)
        self.done_bytes.append(0)

    def advance(self, num_bytes: int) -> None:
        self.done_bytes[-1] += num_bytes

    def note(self, message: str) -> None:
        self.notes.append(message)
