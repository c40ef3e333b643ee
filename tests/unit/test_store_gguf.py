"""GGUF files become the Hugging Face checkpoint they were made from, or an error by name."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kvrelay.errors import ModelInvalid
from kvrelay.store import gguf_model
from kvrelay.store.gguf_config import llama3_rope_scaling, model_config
from kvrelay.store.gguf_file import GgufFile
from kvrelay.store.progress import Silent
from tests.support import tiny_gguf

ARCHS = ["llama", "qwen2", "qwen3"]


def convert(source: Path, into: Path) -> dict[str, torch.Tensor]:
    into.mkdir()
    gguf_model.convert(source, into, progress=Silent())
    return load_file(into / "model.safetensors")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_comes_back_under_its_own_name(tmp_path: Path, arch: str, tied: bool) -> None:
    """Names, shapes and values, the rope order of `llama` included, survive there and back."""
    weights = tiny_gguf.random_weights(arch, tied=tied)
    source = tiny_gguf.write_gguf(tmp_path / "m.gguf", arch, weights=weights)
    converted = convert(source, tmp_path / "out")
    assert converted.keys() == weights.keys()
    for name, values in weights.items():
        assert converted[name].dtype == torch.bfloat16
        assert torch.equal(converted[name].float(), torch.from_numpy(values)), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied


@pytest.mark.parametrize("arch", ARCHS)
def test_transformers_loads_what_was_converted(tmp_path: Path, arch: str) -> None:
    """The directory is a whole checkpoint: no weight is missing, spare or of another shape."""
    source = tiny_gguf.write_gguf(tmp_path / "m.gguf", arch)
    convert(source, tmp_path / "out")
    _, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


Q4_0, Q4_1, Q8_0, Q5_0 = (
    gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0", "Q5_0")
)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", [Q4_0, Q4_1, Q8_0])
def test_blocks_are_kept_as_they_are_in_the_order_of_the_checkpoint(
    tmp_path: Path, arch: str, kind: gguf.GGMLQuantizationType
) -> None:
    """Dequantized, each is the float32 of which the checkpoint has the rounding."""
    types = {"_proj": kind, "embed_tokens": kind}
    source = tiny_gguf.write_gguf(tmp_path / "m.gguf", arch, types=types)
    converted = convert(source, tmp_path / "out")
    with safe_open(tmp_path / "out" / "blocks.safetensors", framework="np") as file:
        blocks = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored_types = file.metadata()

    matrices = {name for name, values in converted.items() if values.dim() == 2}
    assert blocks.keys() == stored_types.keys() == matrices
    assert set(stored_types.values()) == {kind.name}
    for name, raw in blocks.items():
        values = torch.from_numpy(gguf.dequantize(raw, kind))
        assert torch.equal(values.bfloat16(), converted[name]), name


def test_other_blocks_are_only_dequantized(tmp_path: Path) -> None:
    """A matrix of another type is not in the file, and without any there is no file."""
    types = {"gate_proj": Q5_0, "down_proj": Q4_1}
    convert(tiny_gguf.write_gguf(tmp_path / "m.gguf", types=types), tmp_path / "out")
    kept = load_file(tmp_path / "out" / "blocks.safetensors")
    assert set(kept) == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}

    types = {"gate_proj": Q5_0}
    convert(tiny_gguf.write_gguf(tmp_path / "n.gguf", types=types), tmp_path / "none")
    assert not (tmp_path / "none" / "blocks.safetensors").exists()


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    """A model without one of its tensors is refused."""
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", edit_tensors=lambda t: t.pop("blk.1.ffn_up.weight")
    )
    with pytest.raises(ModelInvalid, match=r"tensor blk\.1\.ffn_up\.weight is missing"):
        convert(source, tmp_path / "out")


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    """A tensor that would be ignored is refused: the model meant something by it."""
    extra = np.zeros(4, dtype=np.float32)
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", edit_tensors=lambda t: t.update({"blk.0.attn_sinks.weight": extra})
    )
    with pytest.raises(ModelInvalid, match=r"blk\.0\.attn_sinks\.weight has no place"):
        convert(source, tmp_path / "out")


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    """The message says what it is and what was wanted."""
    wrong = np.zeros((3, 64), dtype=np.float32)
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", edit_tensors=lambda t: t.update({"blk.0.attn_v.weight": wrong})
    )
    with pytest.raises(ModelInvalid, match=r"attn_v\.weight is \(3, 64\), wanted \(32, 64\)"):
        convert(source, tmp_path / "out")


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """A NaN in the weights would only show as rubbish text, so it is found here."""
    bad = np.full(64, np.nan, dtype=np.float32)
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", edit_tensors=lambda t: t.update({"output_norm.weight": bad})
    )
    with pytest.raises(ModelInvalid, match=r"output_norm\.weight holds values"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("num_bytes", [0, 3, 100, 5000, 60_000])
def test_a_file_that_ends_too_early_is_refused(tmp_path: Path, num_bytes: int) -> None:
    """Whether the cut falls into the header, the metadata or the tensors."""
    whole = tiny_gguf.write_gguf(tmp_path / "m.gguf").read_bytes()
    assert num_bytes < len(whole)
    (tmp_path / "cut.gguf").write_bytes(whole[:num_bytes])
    with pytest.raises(ModelInvalid, match=r"cut\.gguf: not a complete GGUF file"):
        GgufFile(tmp_path / "cut.gguf")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    """And the message lists the ones that are known."""
    source = tiny_gguf.write_gguf(tmp_path / "m.gguf", "gemma3")
    with pytest.raises(ModelInvalid, match="gemma3 is not one of llama, qwen2, qwen3"):
        model_config(GgufFile(source))


def test_a_setting_that_changes_the_mathematics_is_refused_by_name(tmp_path: Path) -> None:
    """What config.json could not say must not be dropped in silence."""
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf",
        edit_metadata=lambda w: w.add_uint32("llama.attention.sliding_window", 128),
    )
    with pytest.raises(ModelInvalid, match=r"llama\.attention\.sliding_window = 128"):
        model_config(GgufFile(source))


def test_one_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    """A part would only be reported as missing its tensors."""
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", edit_metadata=lambda w: w.add_uint16("split.count", 3)
    )
    with pytest.raises(ModelInvalid, match="one of 3 parts"):
        model_config(GgufFile(source))


def test_linear_rope_scaling_reaches_the_config(tmp_path: Path) -> None:
    """Metadata that config.json can say is said there."""

    def scale(writer: tiny_gguf.gguf.GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "linear")
        writer.add_float32("llama.rope.scaling.factor", 2.0)

    source = tiny_gguf.write_gguf(tmp_path / "m.gguf", edit_metadata=scale)
    assert model_config(GgufFile(source))["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


def llama3_divisors(factor: float, head_dim: int, theta: float, original: int) -> np.ndarray:
    """The published formula, written the long way."""
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original / 4:
            divisors.append(1.0)
        elif wavelength > original:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_scaling_is_recovered_from_its_divisors(factor: float) -> None:
    """Llama 3.1 and 3.2 keep their scaling in GGUF only as the computed divisors."""
    divisors = llama3_divisors(factor, 64, 500000.0, 8192)
    assert llama3_rope_scaling(divisors, head_dim=64, rope_theta=500000.0) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_divisors_of_no_known_scaling_are_refused(tmp_path: Path) -> None:
    """A long-context scheme we cannot name must not be served without it."""
    odd = np.linspace(1.0, 3.0, tiny_gguf.HEAD_DIM // 2, dtype=np.float32)
    source = tiny_gguf.write_gguf(
        tmp_path / "m.gguf", edit_tensors=lambda t: t.update({"rope_freqs.weight": odd})
    )
    with pytest.raises(ModelInvalid, match=r"rope_freqs\.weight follows no llama3"):
        model_config(GgufFile(source))
