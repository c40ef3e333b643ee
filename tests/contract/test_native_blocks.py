"""The compiled engine multiplies with blocks as with the numbers that they stand for."""

import pytest
import torch

from kvrelay.model.generation_weights import Blocks, LayerBlocks
from kvrelay.model.quant import KINDS, Kind, QuantMatrix, dequantize, quantize
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import Weights
from kvrelay.native.library import why_not
from tests.support.tiny_model import (
    generated,
    prompt,
    runner_of,
    table,
    tiny_spec,
    tiny_weights,
    tokens,
)

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

PROMPT = tokens(3, 90)
BLOCKS = table(0, 8)


def quantized(spec: ModelSpec, kind: Kind) -> tuple[Blocks, Weights, Weights]:
    """Blocks, and the weights they stand for in float32 and in bfloat16."""
    exact, rounded = tiny_weights(spec, "float32"), tiny_weights(spec, "bfloat16")

    def cut(ours: torch.Tensor, theirs: torch.Tensor) -> QuantMatrix:
        matrix = quantize(ours, kind)
        ours.copy_(dequantize(matrix))
        theirs.copy_(ours)
        return matrix

    head = cut(exact.head, rounded.head)
    names = ("qkv", "out", "gate_up", "down")
    layers = tuple(
        LayerBlocks(**{name: cut(getattr(a, name), getattr(b, name)) for name in names})
        for a, b in zip(exact.layers, rounded.layers, strict=True)
    )
    return Blocks(layers=layers, head=head), exact, rounded


def generated_logits(
    spec: ModelSpec, weights: Weights, blocks: Blocks | None, token_ids: tuple[int, ...]
) -> torch.Tensor:
    with runner_of(spec, weights, blocks=blocks) as (runner, _):
        runner.step_logits([prompt(PROMPT, 0, BLOCKS)])
        rows = runner.step_logits([generated(token_ids, len(PROMPT), BLOCKS)])
        return rows[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 11, 16, 19])
def test_blocks_are_no_farther_from_float32_than_bfloat16_is(kind: Kind, num_rows: int) -> None:
    """Their numbers are exact where bfloat16 rounds; only the inputs are rounded alike."""
    spec = tiny_spec(hidden_size=64, head_dim=32, intermediate_size=160, attention_bias=True)
    blocks, exact, rounded = quantized(spec, kind)
    token_ids = tokens(4, num_rows)
    truth = generated_logits(spec, exact, None, token_ids)
    with_blocks = generated_logits(spec, rounded, blocks, token_ids)
    without = generated_logits(spec, rounded, Blocks.none(spec), token_ids)
    assert not torch.equal(with_blocks, without)
    bound = 1.5 * (without - truth).abs().max() + 0.01 * truth.abs().max()
    assert (with_blocks - truth).abs().max() <= bound
