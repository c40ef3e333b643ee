"""KV of every dtype: both engines keep the same of equal numbers, and attend to just that."""

import pytest
import torch

from kvrelay.kv import numbers
from kvrelay.kv.cache import KvCache
from kvrelay.model.generation_weights import Blocks
from kvrelay.model.reference import Reference
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import Weights
from kvrelay.native import library
from tests.support.tiny_model import (
    generated,
    prompt,
    runner_of,
    table,
    tiny_spec,
    tiny_weights,
    tokens,
)

needs_native = pytest.mark.skipif(library.why_not() is not None, reason=str(library.why_not()))

QUANTIZED = ["fp8", "int8"]

SPECS = {
    "grouped": tiny_spec(),
    "one-kv-head-of-7": tiny_spec(num_attention_heads=7, num_key_value_heads=1),
    "window": tiny_spec(architectures=["MistralForCausalLM"], sliding_window=70),
    "wide-heads": tiny_spec(hidden_size=64, head_dim=128, intermediate_size=160),
    "odd-heads": tiny_spec(num_attention_heads=2, num_key_value_heads=2, head_dim=70),
}

LENGTHS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]


class Rounding(Reference):
    """The reference, attending to what a cache of `kv_dtype` keeps."""

    def __init__(self, spec: ModelSpec, weights: Weights, *, kv_dtype: str) -> None:
        super().__init__(spec, weights, num_positions=LENGTHS[-1] + 1)
        self._kv_dtype = kv_dtype

    def _attention(
        self, q: torch.Tensor, kv: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        kept = numbers.read(*numbers.kept(kv, self._kv_dtype))
        return super()._attention(q, kept, positions)


def farthest_from(
    expected: torch.Tensor, spec: ModelSpec, weights: Weights, *, kv_dtype: str
) -> float:
    """The largest error of logits after prompts of all lengths, and after a token more."""
    ids, where = tokens(3, LENGTHS[-1] + 1), table(0, 13)
    errors = []
    with runner_of(spec, weights, kv_dtype=kv_dtype) as (runner, _):
        for length in LENGTHS:
            (logits,) = runner.step_logits([prompt(ids[:length], 0, where)])
            errors.append((logits - expected[length - 1]).abs().max())
            (logits,) = runner.step_logits([generated(ids[length : length + 1], length, where)])
            errors.append((logits - expected[length]).abs().max())
    return float(torch.stack(errors).max())


@pytest.mark.parametrize("kv_dtype", [*QUANTIZED, "bfloat16"])
@pytest.mark.parametrize("name", SPECS)
def test_torch_attends_to_what_is_kept(name: str, kv_dtype: str) -> None:
    """To the last few bits of float32, unless a last bit goes to the next number that is kept."""
    spec = SPECS[name]
    weights = tiny_weights(spec, "float32")
    expected = Rounding(spec, weights, kv_dtype=kv_dtype).logits(tokens(3, LENGTHS[-1] + 1))
    without = Reference(spec, weights, num_positions=LENGTHS[-1] + 1)
    lost = float((without.logits(tokens(3, LENGTHS[-1] + 1)) - expected).abs().max())
    found = farthest_from(expected, spec, weights, kv_dtype=kv_dtype)
    assert found < 0.2 * lost, (found, lost)


def mute(weights: Weights, spec: ModelSpec) -> Weights:
    """Rows that look at others and have no K and V of their own: zeros, in every dtype."""
    for layer in weights.layers:
        layer.qkv[spec.num_heads * spec.head_dim :] = 0.0
    return weights


def fill(cache: KvCache, *, seed: int, any_scale: bool) -> torch.Tensor:
    """Random values, and random scales if there are any. Returns the numbers that they are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(cache.values.shape, generator=generator)
    values, scales = numbers.kept(x, cache.layout.dtype)
    if scales is not None:
        powers = torch.randint(-9, -4, scales.shape, generator=generator).float().exp2()
        scales = (powers * 1.37).bfloat16() if any_scale else powers.bfloat16()
        assert cache.scales is not None
        cache.scales.copy_(scales)
    cache.values.view(torch.uint8).copy_(values.view(torch.uint8))
    return numbers.read(values, scales)


def seen(
    spec: ModelSpec,
    weights: Weights,
    *,
    blocks: Blocks | None,
    kv_dtype: str,
    any_scale: bool = False,
    kv: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of rows that attend to a cache that `fill` filled, or to `kv`; and what is in it."""
    where = table(0, 13)
    with runner_of(spec, weights, blocks=blocks, kv_dtype=kv_dtype) as (runner, cache):
        if kv is None:
            kv = fill(cache, seed=7, any_scale=any_scale)
        else:
            cache.tensor.copy_(kv)
        rows = [
            prompt(tokens(5, 37), 150, where),
            *(generated([7], 16 * (i + 1) + 23 + i, table(13 + 13 * i, 13)) for i in range(9)),
        ]
        return runner.step_logits(rows), kv


@pytest.mark.parametrize("kv_dtype", QUANTIZED)
@pytest.mark.parametrize("name", SPECS)
def test_torch_sees_the_numbers_that_are_kept(name: str, kv_dtype: str) -> None:
    """Bit for bit as if they lay in the cache as float32."""
    spec = SPECS[name]
    weights = mute(tiny_weights(spec, "float32"), spec)
    logits, kv = seen(spec, weights, blocks=None, kv_dtype=kv_dtype, any_scale=True)
    assert torch.equal(logits, seen(spec, weights, blocks=None, kv_dtype="float32", kv=kv)[0])


@needs_native
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
@pytest.mark.parametrize("name", SPECS)
def test_the_compiled_engine_sees_the_numbers_that_are_kept(name: str, kv_dtype: str) -> None:
    """Bit for bit as if they lay in the cache as bfloat16, where bfloat16 can hold them."""
    spec = SPECS[name]
    weights, none = mute(tiny_weights(spec, "bfloat16"), spec), Blocks.none(spec)
    logits, kv = seen(spec, weights, blocks=none, kv_dtype=kv_dtype)
    assert torch.equal(kv.bfloat16().float(), kv)
    assert torch.equal(logits, seen(spec, weights, blocks=none, kv_dtype="bfloat16", kv=kv)[0])


@needs_native
@pytest.mark.parametrize("name", SPECS)
def test_scales_of_the_compiled_engine_are_no_coarser_than_bfloat16(name: str) -> None:
    """Where bfloat16 cannot hold the numbers, int8 is no farther from the truth than it."""
    spec = SPECS[name]
    exact = mute(tiny_weights(spec, "float32"), spec)
    rounded, none = mute(tiny_weights(spec, "bfloat16"), spec), Blocks.none(spec)
    logits, kv = seen(spec, rounded, blocks=none, kv_dtype="int8", any_scale=True)
    truth, _ = seen(spec, exact, blocks=None, kv_dtype="float32", kv=kv)
    as_bfloat16, _ = seen(spec, rounded, blocks=none, kv_dtype="bfloat16", kv=kv)
    assert not torch.equal(kv.bfloat16().float(), kv)
    assert rms(logits - truth) < 1.2 * rms(as_bfloat16 - truth)


@needs_native
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
@pytest.mark.parametrize("shape", [(3, 64), (1, 24), (2, 70), (5, 2), (1, 256)])
def test_both_engines_keep_the_same_bytes(kv_dtype: str, shape: tuple[int, int]) -> None:
    """Of numbers of any magnitude, of ties, of zeros, and of the smallest there are."""
    generator = torch.Generator().manual_seed(shape[1])
    bits = torch.randint(-(2**31), 2**31, (300, *shape), generator=generator)
    anything = bits.to(torch.int32).view(torch.float32)
    anything = torch.where(anything.isfinite(), anything, 0.0)
    steps = torch.arange(300 * shape[0] * shape[1]).view(300, *shape) % 8192
    usual = torch.randn(300, *shape, generator=generator)
    for x in (*anything, *usual, *(steps / 1024 - 4), *(steps * 0.125), torch.zeros(shape)):
        values, scales = numbers.kept(x.contiguous(), kv_dtype)
        theirs, their_scales = library.keep(kv_dtype, x.numpy())
        assert values.view(torch.uint8).flatten().tolist() == theirs.tolist()
        if scales is not None:
            assert scales.view(torch.uint8).tolist() == their_scales.tolist()


@needs_native
@pytest.mark.parametrize("kv_dtype", QUANTIZED)
def test_what_is_no_number_ends_the_step(kv_dtype: str) -> None:
    """In the cache of a sequence: nothing is sampled from it, by either engine."""
    spec = SPECS["grouped"]
    weights = tiny_weights(spec, "bfloat16")
    for blocks in (None, Blocks.none(spec)):
        with runner_of(spec, weights, blocks=blocks, kv_dtype=kv_dtype) as (runner, cache):
            runner.step([prompt(tokens(1, 20), 0, table(0, 2))])
            spoil(cache)
            for rows in (prompt([1], 20, table(0, 2)), generated([1], 20, table(0, 2))):
                with pytest.raises(FloatingPointError):
                    runner.step([rows])


def rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())


def spoil(cache: KvCache) -> None:
    """A K of the first block is no number."""
    if cache.scales is None:
        cache.values.view(torch.uint8)[0, 0, 0, 0] = 0x7F
    else:
        cache.scales[0, 0, 0, 0] = torch.nan


def test_the_dtype_of_kv_is_in_the_name_where_it_is_not_the_default() -> None:
    """Other KV, other bits; and names of before stay what they were."""
    spec = SPECS["grouped"]
    names = {}
    for dtype, kv_dtype in (
        *(("bfloat16", None), ("bfloat16", "bfloat16"), ("bfloat16", "int8")),
        *(("float32", None), ("float32", "bfloat16"), ("float32", "fp8")),
    ):
        with runner_of(spec, tiny_weights(spec, dtype), kv_dtype=kv_dtype) as (runner, _):
            names[dtype, kv_dtype] = runner.numerics
    assert names == {
        ("bfloat16", None): "cpu-bfloat16-v1",
        ("bfloat16", "bfloat16"): "cpu-bfloat16-v1",
        ("bfloat16", "int8"): "cpu-bfloat16-v1-kv-int8",
        ("float32", None): "cpu-float32-v1",
        ("float32", "bfloat16"): "cpu-float32-v1-kv-bfloat16",
        ("float32", "fp8"): "cpu-float32-v1-kv-fp8",
    }


@needs_native
def test_the_compiled_engine_names_it_too() -> None:
    """Before the mark of its bits."""
    spec = SPECS["grouped"]
    weights, none = tiny_weights(spec, "bfloat16"), Blocks.none(spec)
    with runner_of(spec, weights, blocks=none, kv_dtype="fp8") as (runner, _):
        runner.prove_rows()
        assert runner.numerics.startswith("native-test-v1-kv-fp8-")
