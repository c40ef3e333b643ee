"""A model's weights in the shape they are computed with: q, k, v and gate, up fused.

Every tensor of the checkpoint has one place to go. The fused tensors are allocated once and
each stored tensor is copied into its slice of them, so no second copy of the model exists.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kvrelay.errors import ModelInvalid
from kvrelay.model.spec import ModelSpec

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBED = "model.embed_tokens"

_STORED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """Matrices are [out, in] of the model's dtype; norms float32."""

    input_norm: torch.Tensor  # [hidden_size]
    qkv: torch.Tensor  # [(num_heads + 2 * num_kv_heads) * head_dim, hidden_size]
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None  # [head_dim]
    k_norm: torch.Tensor | None
    out: torch.Tensor  # [hidden_size, num_heads * head_dim]
    out_bias: torch.Tensor | None
    post_norm: torch.Tensor  # [hidden_size]
    gate_up: torch.Tensor  # [2 * intermediate_size, hidden_size]
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor  # [hidden_size, intermediate_size]
    down_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    embed: torch.Tensor  # [vocab_size, hidden_size]
    layers: tuple[LayerWeights, ...]
    norm: torch.Tensor  # [hidden_size], float32
    head: torch.Tensor  # [vocab_size, hidden_size]; `embed` itself when tied

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes held, a tied head counted once."""
        tensors = {t.data_ptr(): t for t in (self.embed, self.norm, self.head)}
        for layer in self.layers:
            fields = (getattr(layer, name) for name in LayerWeights.__dataclass_fields__)
            tensors |= {t.data_ptr(): t for t in fields if t is not None}
        return sum(t.nbytes for t in tensors.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """What one matrix of `LayerWeights` is made of."""

    parts: Mapping[str, int]
    """Module in a layer of the checkpoint to its rows, in order."""

    in_features: int


def fused_matrices(spec: ModelSpec) -> Mapping[str, Fused]:
    """Field of `LayerWeights` to what fills it."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    qkv = {"self_attn.q_proj": q_rows, "self_attn.k_proj": kv_rows, "self_attn.v_proj": kv_rows}
    return {
        "qkv": Fused(parts=qkv, in_features=hidden),
        "out": Fused(parts={"self_attn.o_proj": hidden}, in_features=q_rows),
        "gate_up": Fused(parts={"mlp.gate_proj": inner, "mlp.up_proj": inner}, in_features=hidden),
        "down": Fused(parts={"mlp.down_proj": hidden}, in_features=inner),
    }


def head_name(spec: ModelSpec) -> str:
    """The tensor the head is: the embedding when they are tied."""
    return f"{EMBED}.weight" if spec.tie_word_embeddings else "lm_head.weight"


Stored = Mapping[str, tuple[str, Callable[[], torch.Tensor]]]
"""Tensor name to the file it is in and what reads it."""


def load_weights(model_dir: str | Path, spec: ModelSpec, *, dtype: torch.dtype) -> Weights:
    """Read a Hugging Face directory, one file of safetensors or several with an index.

    Raises:
        ModelInvalid: a file or tensor is missing, spare, damaged or of another shape.
    """
    directory = Path(model_dir)
    with ExitStack() as stack:
        return fill(_open_safetensors(directory, stack), spec, dtype=dtype)


def fill(stored: Stored, spec: ModelSpec, *, dtype: torch.dtype) -> Weights:
    """Build weights from exactly the tensors `spec` needs.

    Raises:
        ModelInvalid: as `load_weights`.
    """
    weights, places = _allocate(spec, dtype)
    _require_same_names(stored, places, tied=spec.tie_word_embeddings)
    for name, place in places.items():
        file, read = stored[name]
        try:
            tensor = read()
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelInvalid(file, f"tensor {name} cannot be read: {error}") from error
        if tensor.shape != place.shape:
            raise ModelInvalid(
                file, f"tensor {name} is {tuple(tensor.shape)}, wanted {tuple(place.shape)}"
            )
        if tensor.dtype not in _STORED_DTYPES:
            raise ModelInvalid(file, f"tensor {name} is {tensor.dtype}, wanted a plain float")
        place.copy_(tensor)
    return weights


def random_weights(
    spec: ModelSpec, *, dtype: torch.dtype, seed: int, scale: float = 0.05
) -> Weights:
    """Weights of no meaning, the same for the same seed: for tests and load measurements."""
    weights, places = _allocate(spec, dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, place in places.items():
        noise = torch.randn(place.shape, generator=generator)
        place.copy_(1.0 + 0.1 * noise if name.endswith("norm.weight") else scale * noise)
    return weights


def _allocate(spec: ModelSpec, dtype: torch.dtype) -> tuple[Weights, dict[str, torch.Tensor]]:
    """Empty weights, and for each tensor of a checkpoint the slice of them it fills."""
    places: dict[str, torch.Tensor] = {}

    def place(name: str, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        places[name] = torch.empty(shape, dtype=dtype)
        return places[name]

    embed = place(f"{EMBED}.weight", spec.vocab_size, spec.hidden_size)
    layers = tuple(_allocate_layer(spec, i, dtype, places) for i in range(spec.num_layers))
    norm = place("model.norm.weight", spec.hidden_size, dtype=torch.float32)
    head = embed
    if not spec.tie_word_embeddings:
        head = place(head_name(spec), spec.vocab_size, spec.hidden_size)
    return Weights(embed=embed, layers=layers, norm=norm, head=head), places


def _allocate_layer(
    spec: ModelSpec, index: int, dtype: torch.dtype, places: dict[str, torch.Tensor]
) -> LayerWeights:
    hidden, dim = spec.hidden_size, spec.head_dim
    matrices = fused_matrices(spec)

    def fused(name: str, kind: str, *tail: int) -> torch.Tensor:
        parts = matrices[name].parts
        whole = torch.empty((sum(parts.values()), *tail), dtype=dtype)
        first = 0
        for part, num_rows in parts.items():
            places[f"model.layers.{index}.{part}.{kind}"] = whole[first : first + num_rows]
            first += num_rows
        return whole

    def matrix(name: str) -> torch.Tensor:
        return fused(name, "weight", matrices[name].in_features)

    def norm(part: str, size: int) -> torch.Tensor:
        whole = torch.empty(size, dtype=torch.float32)
        places[f"model.layers.{index}.{part}.weight"] = whole
        return whole

    return LayerWeights(
        input_norm=norm("input_layernorm", hidden),
        qkv=matrix("qkv"),
        qkv_bias=fused("qkv", "bias") if spec.qkv_bias else None,
        q_norm=norm("self_attn.q_norm", dim) if spec.qk_norm else None,
        k_norm=norm("self_attn.k_norm", dim) if spec.qk_norm else None,
        out=matrix("out"),
        out_bias=fused("out", "bias") if spec.out_bias else None,
        post_norm=norm("post_attention_layernorm", hidden),
        gate_up=matrix("gate_up"),
        gate_up_bias=fused("gate_up", "bias") if spec.mlp_bias else None,
        down=matrix("down"),
        down_bias=fused("down", "bias") if spec.mlp_bias else None,
    )


def _require_same_names(stored: Stored, places: Mapping[str, object], *, tied: bool) -> None:
    for name in places:
        if name not in stored:
            raise ModelInvalid(name, "tensor is missing")
    for name, (file, _) in stored.items():
        # Old checkpoints carry rotary tables, some a copy of the tied head: both are redundant.
        redundant = name.endswith(".rotary_emb.inv_freq") or (tied and name == "lm_head.weight")
        if name not in places and not redundant:
            raise ModelInvalid(file, f"tensor {name} has no place in this model")


def _open_safetensors(directory: Path, stack: ExitStack) -> Stored:
    index = directory / INDEX
    if not index.exists():
        return dict(_tensors_of(directory / WEIGHTS, stack))
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelInvalid(INDEX, f"cannot be read: {error!r}") from error
    stored: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {}
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelInvalid(INDEX, f"names {file!r}, which is not a file beside it")
        stored |= _tensors_of(directory / file, stack)
    for name, file in weight_map.items():
        if name not in stored or stored[name][0] != file:
            raise ModelInvalid(file, f"tensor {name} is missing")
    return stored


def _tensors_of(
    path: Path, stack: ExitStack
) -> Iterator[tuple[str, tuple[str, Callable[[], torch.Tensor]]]]:
    if not path.is_file():
        raise ModelInvalid(path.name, f"is missing from {path.parent}")
    try:
        file = stack.enter_context(safe_open(path, framework="pt"))
        names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelInvalid(path.name, f"is damaged: {error}") from error
    for name in names:
        yield name, (path.name, partial(file.get_tensor, name))
