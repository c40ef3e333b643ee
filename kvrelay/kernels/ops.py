"""The kernels as one set, and their references as another of the same signatures."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvrelay.kernels import (
    few_rows,
    generation_attention,
    many_rows,
    mlp,
    norm,
    prompt_attention,
    rope,
    sampling,
)

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """What a forward pass is made of; see the functions of these names."""

    name: str
    add_rms_norm: Op
    silu_mul: Op
    rope_write: Op
    few_rows: Op
    many_rows: Op
    prompt_attention: Op
    generation_attention: Op
    sample: Op


KERNELS = Ops(
    name="kernels",
    add_rms_norm=norm.add_rms_norm,
    silu_mul=mlp.silu_mul,
    rope_write=rope.rope_write,
    few_rows=few_rows.few_rows,
    many_rows=many_rows.many_rows,
    prompt_attention=prompt_attention.prompt_attention,
    generation_attention=generation_attention.generation_attention,
    sample=sampling.sample,
)

REFERENCES = Ops(
    name="references",
    add_rms_norm=norm.add_rms_norm_reference,
    silu_mul=mlp.silu_mul_reference,
    rope_write=rope.rope_write_reference,
    few_rows=few_rows.few_rows_reference,
    many_rows=many_rows.many_rows_reference,
    prompt_attention=prompt_attention.prompt_attention_reference,
    generation_attention=generation_attention.generation_attention_reference,
    sample=sampling.sample_reference,
)
