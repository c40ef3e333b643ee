"""What tokens are generated with: the checkpoint's own blocks, others made at load, or none.

A matrix that has no blocks here is computed with in bfloat16, as prompts are. The parts of a
fused matrix lie one after the other, as in `LayerWeights`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from kvrelay.errors import ModelInvalid
from kvrelay.model.quant import KINDS, Kind, QuantMatrix, quantize, row_bytes
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import EMBED, Weights, fused_matrices, head_name
from kvrelay.store.manifest import BLOCKS

Choice = Literal["auto", "bfloat16", "int8", "int4"]

_KIND_OF: Mapping[Choice, Kind] = {"int8": "q8_0", "int4": "q4_1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBlocks:
    """Named as the fields of `LayerWeights`."""

    qkv: QuantMatrix | None = None
    out: QuantMatrix | None = None
    gate_up: QuantMatrix | None = None
    down: QuantMatrix | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    layers: tuple[LayerBlocks, ...]
    head: QuantMatrix | None = None

    @classmethod
    def none(cls, spec: ModelSpec) -> "Blocks":
        """All of the model in bfloat16."""
        return cls(layers=(LayerBlocks(),) * spec.num_layers)

    @property
    def matrices(self) -> tuple[QuantMatrix, ...]:
        """All there are, layer by layer, the head last."""
        found = [
            matrix
            for layer in self.layers
            for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down)
        ]
        return tuple(matrix for matrix in (*found, self.head) if matrix is not None)

    @property
    def num_bytes(self) -> int:
        return sum(matrix.num_bytes for matrix in self.matrices)


def generation_blocks(
    model_dir: str | Path, spec: ModelSpec, weights: Weights, choice: Choice
) -> Blocks:
    """The blocks to generate with.

    Args:
        model_dir: where `auto` looks for the checkpoint's own blocks.
        spec: of the model.
        weights: loaded from there; read for `int8` and `int4` only, and not kept.
        choice: `auto` is the checkpoint's own blocks, bfloat16 where it has none. The other
            kinds are made of `weights`, whatever the checkpoint has.

    Raises:
        ModelInvalid: damaged blocks, or a matrix that cannot be cut into blocks.
    """
    if choice == "auto":
        return load_blocks(model_dir, spec)
    if choice == "bfloat16":
        return Blocks.none(spec)
    kind = _KIND_OF[choice]
    layers = tuple(
        LayerBlocks(
            qkv=quantize(layer.qkv, kind),
            out=quantize(layer.out, kind),
            gate_up=quantize(layer.gate_up, kind),
            down=quantize(layer.down, kind),
        )
        for layer in weights.layers
    )
    return Blocks(layers=layers, head=quantize(weights.head, kind))


def load_blocks(model_dir: str | Path, spec: ModelSpec) -> Blocks:
    """The blocks a GGUF file came with, as `kvrelay pull` kept them; none if it kept none.

    Parts of a fused matrix that are not all of one kind are left to bfloat16.

    Raises:
        ModelInvalid: the file is damaged, or a matrix in it is not one of this model.
    """
    path = Path(model_dir) / BLOCKS
    if not path.is_file():
        return Blocks.none(spec)
    try:
        with safe_open(path, framework="pt") as file:
            return _read(_Stored(path.name, file), spec)
    except (SafetensorError, OSError) as error:
        raise ModelInvalid(BLOCKS, f"is damaged: {error}") from error


def _read(stored: "_Stored", spec: ModelSpec) -> Blocks:
    matrices = fused_matrices(spec)
    layers = []
    for index in range(spec.num_layers):
        fused = {}
        for name, matrix in matrices.items():
            parts = {
                f"model.layers.{index}.{part}.weight": num_rows
                for part, num_rows in matrix.parts.items()
            }
            fused[name] = stored.fused(parts, matrix.in_features)
        layers.append(LayerBlocks(**fused))
    head = stored.fused({head_name(spec): spec.vocab_size}, spec.hidden_size)
    stored.refuse_spare({f"{EMBED}.weight"})
    return Blocks(layers=tuple(layers), head=head)


class _Stored:
    """The matrices of one open file, and which of them nobody asked for yet."""

    def __init__(self, file_name: str, file: Any) -> None:
        self._file_name = file_name
        self._file = file
        self._types = file.metadata() or {}
        self._spare = set(file.keys())

    def fused(self, parts: Mapping[str, int], in_features: int) -> QuantMatrix | None:
        """The parts one below the other, or None if they are not all there and of one kind."""
        present = [name for name in parts if name in self._spare]
        self._spare -= set(present)
        kinds = {self._kind(name) for name in present}
        if len(present) < len(parts) or len(kinds) > 1:
            return None
        kind = kinds.pop()
        num_bytes = row_bytes(kind, in_features)
        data = torch.empty((sum(parts.values()), num_bytes), dtype=torch.uint8)
        first = 0
        for name, num_rows in parts.items():
            data[first : first + num_rows] = self._part(name, (num_rows, num_bytes))
            first += num_rows
        return QuantMatrix(kind, data)

    def refuse_spare(self, known: set[str]) -> None:
        """Hold the file to what was asked for, besides `known`."""
        for name in sorted(self._spare - known):
            raise ModelInvalid(self._file_name, f"tensor {name} has no place in this model")

    def _kind(self, name: str) -> Kind:
        wanted = self._types.get(name, "").lower()
        for kind in KINDS:
            if kind == wanted:
                return kind
        raise ModelInvalid(self._file_name, f"tensor {name} is of type {wanted!r}, have {KINDS}")

    def _part(self, name: str, shape: tuple[int, int]) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        if tensor.shape != shape or tensor.dtype is not torch.uint8:
            raise ModelInvalid(
                self._file_name,
                f"tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, wanted uint8 {shape}",
            )
        return tensor
