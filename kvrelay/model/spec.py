"""What a model is, read from its `config.json` alone: the whole Llama family is one shape.

Whatever the code does not compute is refused here by name, before a byte of weights is read.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelInvalid

CONFIG = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """What a family fixes that its config does not say."""

    qkv_bias: bool | None = None
    """None: the config's `attention_bias` says so."""

    out_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    has_window: bool = False
    """Whether `sliding_window` in the config is always in force."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(mlp_bias=None),
    "MistralForCausalLM": Architecture(qkv_bias=False, out_bias=False, has_window=True),
    "Qwen2ForCausalLM": Architecture(qkv_bias=True, out_bias=False),
    "Qwen3ForCausalLM": Architecture(qk_norm=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """How positions become angles."""

    theta: float
    kind: str = "default"
    """`default`, `linear`, `llama3` or `yarn`."""

    factor: float = 1.0
    original_max_position: int = 0
    """llama3 and yarn: the length the model was trained at before it was stretched."""

    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """yarn: both tables are multiplied by it."""

    truncate: bool = True
    """yarn: whether the bounds of the ramp are rounded to whole dimensions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only model of the Llama family."""

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    rope: RopeSpec
    max_position_embeddings: int
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` before it; None sees all."""

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


def read_spec(model_dir: str | Path) -> ModelSpec:
    """Read and check `config.json`.

    Raises:
        ModelInvalid: there is none, or it asks for what this code does not compute.
    """
    path = Path(model_dir) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelInvalid(CONFIG, f"is missing from {model_dir}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelInvalid(CONFIG, f"cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelInvalid(CONFIG, "is not a JSON object")
    return spec_of(config)


def spec_of(config: Mapping[str, Any]) -> ModelSpec:
    """The same from a config already parsed."""
    fields = _Fields(config)
    name, family = _architecture(config)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    max_position_embeddings = fields.size("max_position_embeddings")
    _refuse_unsupported(config)
    spec = ModelSpec(
        architecture=name,
        hidden_size=hidden_size,
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=fields.size("num_key_value_heads", num_heads),
        head_dim=fields.size("head_dim", hidden_size // num_heads),
        intermediate_size=fields.size("intermediate_size"),
        vocab_size=fields.size("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(config, max_position_embeddings),
        max_position_embeddings=max_position_embeddings,
        qkv_bias=fields.flag("attention_bias", fixed=family.qkv_bias),
        out_bias=fields.flag("attention_bias", fixed=family.out_bias),
        mlp_bias=fields.flag("mlp_bias", fixed=family.mlp_bias),
        qk_norm=family.qk_norm,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        sliding_window=_sliding_window(config, family, max_position_embeddings),
    )
    if spec.num_heads % spec.num_kv_heads:
        raise ModelInvalid(
            CONFIG,
            f"num_attention_heads {spec.num_heads} is no multiple of "
            f"num_key_value_heads {spec.num_kv_heads}",
        )
    if spec.head_dim % 2:
        raise ModelInvalid(CONFIG, f"head_dim {spec.head_dim} is odd")
    return spec


class _Fields:
    """Typed reads of one JSON object."""

    def __init__(self, config: Mapping[str, Any], prefix: str = "") -> None:
        self._config = config
        self._prefix = prefix

    def size(self, name: str, default: int | None = None) -> int:
        value = self._config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelInvalid(CONFIG, f"{self._prefix}{name} is {value!r}, wanted a whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._config.get(name)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise ModelInvalid(CONFIG, f"{self._prefix}{name} is {value!r}, wanted a number > 0")
        return float(value)

    def flag(self, name: str, *, default: bool = False, fixed: bool | None = None) -> bool:
        if fixed is not None:
            return fixed
        value = self._config.get(name, default)
        if not isinstance(value, bool):
            raise ModelInvalid(CONFIG, f"{self._prefix}{name} is {value!r}, wanted true or false")
        return value


def _architecture(config: Mapping[str, Any]) -> tuple[str, Architecture]:
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return name, ARCHITECTURES[name]
    raise ModelInvalid(
        CONFIG, f"architectures {names} not supported; have {', '.join(ARCHITECTURES)}"
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelInvalid(CONFIG, f"hidden_act {activation!r} not supported; have 'silu'")
    if "quantization_config" in config:
        raise ModelInvalid(CONFIG, "quantization_config not supported; have plain weights only")


def _sliding_window(
    config: Mapping[str, Any], family: Architecture, max_position_embeddings: int
) -> int | None:
    wanted = family.has_window or config.get("use_sliding_window", False)
    window = config.get("sliding_window")
    if not wanted or window is None or window >= max_position_embeddings:
        return None
    kinds = set(config.get("layer_types") or ["sliding_attention"])
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"} or not family.has_window:
        raise ModelInvalid(CONFIG, "a sliding_window on some layers only is not supported")
    return _Fields(config).size("sliding_window")


def _rope(config: Mapping[str, Any], max_position_embeddings: int) -> RopeSpec:
    """Both spellings: `rope_parameters`, and the older `rope_theta` with `rope_scaling`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    fields = _Fields(scaling, "rope_parameters.")
    if not isinstance(scaling, dict):
        raise ModelInvalid(CONFIG, "rope_parameters is not a JSON object")
    theta = _Fields({"rope_theta": 10000.0, **config, **scaling}).number("rope_theta")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    rotary = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if rotary != 1.0:
        raise ModelInvalid(CONFIG, f"partial_rotary_factor {rotary} not supported; have 1.0")
    plain = RopeSpec(theta=theta)
    if kind == "default":
        return plain
    if kind == "linear":
        return replace(plain, kind=kind, factor=fields.number("factor"))
    if kind == "llama3":
        return replace(
            plain,
            kind=kind,
            factor=fields.number("factor"),
            low_freq_factor=fields.number("low_freq_factor"),
            high_freq_factor=fields.number("high_freq_factor"),
            original_max_position=fields.size("original_max_position_embeddings"),
        )
    if kind == "yarn":
        return _yarn(plain, scaling, fields, max_position_embeddings)
    raise ModelInvalid(
        CONFIG, f"rope type {kind!r} not supported; have default, linear, llama3, yarn"
    )


def _yarn(
    plain: RopeSpec, scaling: Mapping[str, Any], fields: _Fields, max_position_embeddings: int
) -> RopeSpec:
    if scaling.get("mscale") or scaling.get("mscale_all_dim"):
        raise ModelInvalid(CONFIG, "yarn with mscale not supported")
    spec = replace(
        plain,
        kind="yarn",
        factor=fields.number("factor"),
        original_max_position=fields.size(
            "original_max_position_embeddings", max_position_embeddings
        ),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        truncate=fields.flag("truncate", default=True),
    )
    return replace(spec, attention_factor=fields.number("attention_factor", _yarn_gain(spec)))


def _yarn_gain(spec: RopeSpec) -> float:
    """Source: YaRN (Peng et al. 2023), equation 22."""
    return 1.0 if spec.factor <= 1 else 0.1 * math.log(spec.factor) + 1.0
