"""What tokens are generated with: found beside the checkpoint, or made of it."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file

from kvrelay.errors import ModelInvalid
from kvrelay.model.generation_weights import Blocks, LayerBlocks, generation_blocks, load_blocks
from kvrelay.model.quant import dequantize, quantize
from kvrelay.model.spec import read_spec
from kvrelay.model.weights import load_weights
from kvrelay.store import gguf_model
from kvrelay.store.progress import Silent
from tests.support import tiny_gguf

FIELDS = tuple(LayerBlocks.__dataclass_fields__)
Q4_0, Q4_1, Q8_0 = (gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0"))


def converted(tmp_path: Path, *, tied: bool = True, **types: gguf.GGMLQuantizationType) -> Path:
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", weights=tiny_gguf.random_weights("llama", tied=tied), types=types
    )
    into = tmp_path / "model"
    into.mkdir()
    gguf_model.convert(source, into, progress=Silent())
    return into


def kinds_of(layer: LayerBlocks) -> dict[str, str | None]:
    found = {name: getattr(layer, name) for name in FIELDS}
    return {name: matrix and matrix.kind for name, matrix in found.items()}


@pytest.mark.parametrize("tied", [True, False])
def test_blocks_are_fused_as_the_weights_are(tmp_path: Path, tied: bool) -> None:
    """Each matrix, dequantized, is the one of bfloat16 before it was rounded."""
    model_dir = converted(tmp_path, tied=tied, _proj=Q4_1, embed=Q8_0, lm_head=Q4_0)
    spec = read_spec(model_dir)
    weights = load_weights(model_dir, spec, dtype=torch.bfloat16)
    blocks = load_blocks(model_dir, spec)
    for made, layer in zip(blocks.layers, weights.layers, strict=True):
        assert kinds_of(made) == dict.fromkeys(FIELDS, "q4_1")
        for name in FIELDS:
            assert torch.equal(dequantize(getattr(made, name)).bfloat16(), getattr(layer, name))
    assert blocks.head is not None
    assert blocks.head.kind == ("q8_0" if tied else "q4_0")
    assert torch.equal(dequantize(blocks.head).bfloat16(), weights.head)
    assert len(blocks.matrices) == 2 * len(FIELDS) + 1
    assert blocks.num_bytes < weights.num_bytes / 2


def test_parts_of_different_kinds_are_left_to_bfloat16(tmp_path: Path) -> None:
    """One kernel computes one fused matrix."""
    model_dir = converted(tmp_path, q_proj=Q4_1, k_proj=Q4_1, v_proj=Q8_0, gate_proj=Q4_0)
    blocks = load_blocks(model_dir, read_spec(model_dir))
    assert blocks == Blocks.none(read_spec(model_dir))


def test_a_model_without_blocks_is_generated_with_in_bfloat16(tmp_path: Path) -> None:
    """`auto` finds none, `bfloat16` looks for none."""
    plain, spec = converted(tmp_path), read_spec(tmp_path / "model")
    weights = load_weights(plain, spec, dtype=torch.bfloat16)
    assert generation_blocks(plain, spec, weights, "auto") == Blocks.none(spec)
    assert generation_blocks(plain, spec, weights, "bfloat16").matrices == ()
    assert Blocks.none(spec).num_bytes == 0


@pytest.mark.parametrize(("choice", "kind"), [("int8", "q8_0"), ("int4", "q4_1")])
def test_blocks_are_made_of_the_weights_when_asked_for(
    tmp_path: Path, choice: str, kind: str
) -> None:
    """Of every matrix and the head, whatever the checkpoint has."""
    model_dir = converted(tmp_path, down_proj=Q4_0)
    spec = read_spec(model_dir)
    weights = load_weights(model_dir, spec, dtype=torch.bfloat16)
    blocks = generation_blocks(model_dir, spec, weights, choice)  # type: ignore[arg-type]
    for made, layer in zip(blocks.layers, weights.layers, strict=True):
        for name in FIELDS:
            expected = quantize(getattr(layer, name), kind)  # type: ignore[arg-type]
            assert torch.equal(getattr(made, name).data, expected.data)
    assert blocks.head is not None
    assert blocks.head.kind == kind


def test_damaged_blocks_are_refused_by_name(tmp_path: Path) -> None:
    """Cut short, of another type, shape, or model."""
    model_dir = converted(tmp_path, down_proj=Q4_1)
    spec = read_spec(model_dir)
    path = model_dir / "blocks.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelInvalid, match=r"blocks\.safetensors: is damaged"):
        load_blocks(model_dir, spec)

    name = "model.layers.1.mlp.down_proj.weight"
    good = torch.zeros(64, 60, dtype=torch.uint8)
    for wrong, tensor, kind, problem in (
        (name, good, "Q6_K", f"{name} is of type 'q6_k'"),
        (name, good[1:], "Q4_1", r"uint8 \(63, 60\), wanted uint8 \(64, 60\)"),
        (name, good.to(torch.int8), "Q4_1", r"int8 \(64, 60\), wanted"),
        ("model.layers.2.mlp.down_proj.weight", good, "Q4_1", "has no place"),
    ):
        save_file({wrong: tensor.contiguous()}, path, metadata={wrong: kind})
        with pytest.raises(ModelInvalid, match=problem):
            load_blocks(model_dir, spec)
