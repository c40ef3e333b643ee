"""What `read_spec` takes from a config, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvrelay.errors import ModelInvalid
from kvrelay.model.spec import read_spec, spec_of

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 200,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 50000.0,
    "hidden_act": "silu",
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def test_a_plain_config_is_read_whole() -> None:
    """Every size comes from the config, and head_dim is hidden over heads if not given."""
    spec = spec_of(LLAMA)
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads) == (64, 2, 4, 2)
    assert (spec.head_dim, spec.intermediate_size, spec.vocab_size) == (16, 96, 200)
    assert spec.group_size == 2
    assert spec.rope.theta == 50000.0
    assert [spec.qkv_bias, spec.out_bias, spec.mlp_bias, spec.qk_norm] == [False] * 4


def test_an_explicit_head_dim_wins() -> None:
    """head_dim need not be hidden over heads."""
    assert spec_of(LLAMA | {"head_dim": 32}).head_dim == 32


def test_missing_kv_heads_means_as_many_as_heads() -> None:
    """Llama 2 style configs leave them out."""
    config = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert spec_of(config).num_kv_heads == 4


def test_both_spellings_of_rope_are_one() -> None:
    """`rope_parameters` and `rope_theta` with `rope_scaling` give equal specs."""
    older = spec_of(LLAMA | {"rope_scaling": LLAMA3_ROPE})
    newer = {k: v for k, v in LLAMA.items() if k != "rope_theta"}
    newer["rope_parameters"] = {"rope_theta": 50000.0, **LLAMA3_ROPE}
    assert older == spec_of(newer)
    assert older.rope.kind == "llama3"


def test_yarn_scales_its_tables_by_its_factor() -> None:
    """Without an attention_factor it follows from the factor."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert spec_of(LLAMA | {"rope_scaling": rope}).rope.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize(
    ("name", "qkv_bias", "out_bias", "qk_norm"),
    [
        ("MistralForCausalLM", False, False, False),
        ("Qwen2ForCausalLM", True, False, False),
        ("Qwen3ForCausalLM", False, False, True),
    ],
)
def test_families_fix_what_their_configs_leave_out(
    name: str, qkv_bias: bool, out_bias: bool, qk_norm: bool
) -> None:
    """Biases and norms of q and k follow from the architecture."""
    spec = spec_of(LLAMA | {"architectures": [name]})
    assert (spec.qkv_bias, spec.out_bias, spec.qk_norm) == (qkv_bias, out_bias, qk_norm)


def test_llama_attention_bias_is_on_all_four_matrices() -> None:
    """For Llama the config's flag covers q, k, v and the output."""
    spec = spec_of(LLAMA | {"attention_bias": True})
    assert spec.qkv_bias
    assert spec.out_bias


def test_a_window_wider_than_the_context_is_none() -> None:
    """Only an effective window is kept."""
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"]}
    assert spec_of(mistral | {"sliding_window": 512}).sliding_window is None
    assert spec_of(mistral | {"sliding_window": 100}).sliding_window == 100
    assert spec_of(mistral | {"sliding_window": None}).sliding_window is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 1.0}}, "mscale"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "use_sliding_window": True,
                "sliding_window": 64,
            },
            "sliding_window",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    """The error names config.json and the field."""
    with pytest.raises(ModelInvalid, match=named) as raised:
        spec_of(LLAMA | change)
    assert raised.value.file == "config.json"


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_an_unreadable_config_is_model_invalid(tmp_path: Path, text: str | None) -> None:
    """Missing, cut short, not an object, not UTF-8."""
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelInvalid, match=r"config\.json"):
        read_spec(tmp_path)


def test_read_spec_reads_the_file(tmp_path: Path) -> None:
    """A directory's config.json and the same dict give the same spec."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_spec(tmp_path) == spec_of(LLAMA)
