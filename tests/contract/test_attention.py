"""Paged attention, on both paths, against one softmax over all keys."""

import pytest
import torch

from kvrelay.model.attention import KEY_TILE, QUERY_TILE
from kvrelay.model.reference import Reference
from kvrelay.types import SamplingParams
from tests.support.tiny_model import (
    generated,
    prompt,
    runner_of,
    table,
    tiny_spec,
    tiny_weights,
    tokens,
)

AWKWARD = sorted(
    {1, 2, 15, 16, 17, QUERY_TILE - 1, QUERY_TILE, QUERY_TILE + 1}
    | {KEY_TILE - 1, KEY_TILE, KEY_TILE + 1, 2 * KEY_TILE, 2 * KEY_TILE + 1, 511}
)

SPECS = {
    "grouped": tiny_spec(),
    "one-kv-head-of-7": tiny_spec(num_attention_heads=7, num_key_value_heads=1),
    "window": tiny_spec(architectures=["MistralForCausalLM"], sliding_window=70),
    "short-window": tiny_spec(architectures=["MistralForCausalLM"], sliding_window=1),
}


@pytest.mark.parametrize("name", SPECS)
def test_both_paths_agree_with_the_reference(name: str) -> None:
    """Prompts that end around the edges of blocks and tiles, and the token after each."""
    spec = SPECS[name]
    weights = tiny_weights(spec, "float32")
    ids = tokens(3, AWKWARD[-1] + 1)
    expected = Reference(spec, weights, num_positions=len(ids)).logits(ids)
    blocks = table(0, 33)
    with runner_of(spec, weights) as (runner, _):
        for length in AWKWARD:
            (logits,) = runner.step_logits([prompt(ids[:length], 0, blocks)])
            torch.testing.assert_close(logits, expected[length - 1], atol=2e-4, rtol=1e-4)
            (logits,) = runner.step_logits([generated(ids[length : length + 1], length, blocks)])
            torch.testing.assert_close(logits, expected[length], atol=2e-4, rtol=1e-4)


def test_rows_of_many_lengths_agree_with_the_reference() -> None:
    """More pairs of row and tile than are read at a time, in no order of length."""
    spec = SPECS["grouped"]
    weights = tiny_weights(spec, "float32")
    ids = tokens(4, 900)
    reference = Reference(spec, weights, num_positions=len(ids))
    lengths = [5, 899, 130, 899, 400, 640, 1, 127, 128, 780]
    tables = [table(60 * i, 58) for i in range(len(lengths))]
    expected = reference.logits(ids)
    with runner_of(spec, weights, num_blocks=60 * len(lengths)) as (runner, _):
        for length, blocks in zip(lengths, tables, strict=True):
            runner.step_logits([prompt(ids[:length], 0, blocks)])
        rows = [
            generated(ids[length : length + 1], length, blocks)
            for length, blocks in zip(lengths, tables, strict=True)
        ]
        logits = runner.step_logits(rows)
    torch.testing.assert_close(logits, expected[lengths], atol=2e-4, rtol=1e-4)


def test_generation_agrees_with_the_reference_token_by_token() -> None:
    """Greedy, through blocks, equals greedy without them."""
    spec = SPECS["grouped"]
    weights = tiny_weights(spec, "float32")
    ids = tokens(5, 200)
    reference = Reference(spec, weights, num_positions=300)
    expected = reference.generate(ids, num_tokens=40, params=SamplingParams())
    blocks = table(0, 20)
    with runner_of(spec, weights) as (runner, _):
        output = runner.step([prompt(ids, 0, blocks)])
        while len(output) < 40:
            last = output[-1]
            assert last is not None
            output += runner.step([generated([last], len(ids) + len(output) - 1, blocks)])
    assert output == expected


def test_a_batch_that_samples_nothing_returns_nones() -> None:
    """Chunks in the middle of prompts never reach the head."""
    spec = SPECS["grouped"]
    with runner_of(spec, tiny_weights(spec, "bfloat16")) as (runner, cache):
        rows = prompt(tokens(1, 20), 0, table(0, 2))
        silent = type(rows)(
            path=rows.path,
            token_ids=rows.token_ids,
            start=0,
            block_table=rows.block_table,
            sample=None,
        )
        assert runner.step([silent]) == [None]
        assert runner.step([]) == []
        assert cache.tensor.any()


def test_logits_that_are_not_finite_end_the_step() -> None:
    """Nothing is sampled from nonsense; the worker stops."""
    spec = SPECS["grouped"]
    weights = tiny_weights(spec, "float32")
    weights.norm.fill_(torch.nan)
    with (
        runner_of(spec, weights) as (runner, _),
        pytest.raises(FloatingPointError, match="2 of 2 rows"),
    ):
        runner.step([prompt([1], 0, table(0, 1)), prompt([2], 0, table(1, 1))])


@pytest.mark.parametrize("num_blocks", [1, 2, 40])
def test_warm_up_fits_any_cache(num_blocks: int) -> None:
    """Even one of a single block."""
    spec = SPECS["grouped"]
    with runner_of(spec, tiny_weights(spec, "bfloat16"), num_blocks=num_blocks) as (runner, _):
        runner.warm_up()
