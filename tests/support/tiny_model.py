"""Runners over small models of random weights, and the rows to feed them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from kvrelay.engine.batch import Path, Rows
from kvrelay.kv.cache import TORCH_DTYPES, KvCache
from kvrelay.kv.staging import PACKED_DTYPES, StagingPlan
from kvrelay.model.generation_weights import Blocks
from kvrelay.model.load import layout_of
from kvrelay.model.native_runner import NativeRunner
from kvrelay.model.runner import LlamaRunner
from kvrelay.model.spec import ModelSpec, spec_of
from kvrelay.model.weights import Weights, random_weights
from kvrelay.types import BlockId, SamplingParams

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "intermediate_size": 104,
    "vocab_size": 211,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}

GREEDY = SamplingParams()


def tiny_spec(**changes: object) -> ModelSpec:
    return spec_of(CONFIG | changes)


def tiny_weights(spec: ModelSpec, dtype: str, *, seed: int = 0) -> Weights:
    return random_weights(spec, dtype=TORCH_DTYPES[dtype], seed=seed, scale=0.2)


@contextmanager
def runner_of(
    spec: ModelSpec,
    weights: Weights,
    *,
    num_threads: int = 1,
    block_size: int = 16,
    num_blocks: int = 400,
    blocks: Blocks | None = None,
    kv_dtype: str | None = None,
    packs: bool = False,
    landing_num_bytes: int = 0,
) -> Iterator[tuple[LlamaRunner | NativeRunner, KvCache]]:
    """A runner and its cache; the thread count is put back at the end.

    With `blocks` the compiled engine, which generates with them; without, torch. KV is of the
    weights' dtype unless `kv_dtype` says otherwise. The cache has staging to pack its blocks and
    to land others' in, if told so.
    """
    dtype = kv_dtype or str(weights.dtype).removeprefix("torch.")
    layout = layout_of(spec, dtype=dtype, block_size=block_size)
    staging = StagingPlan(
        layout,
        num_blocks,
        packs_to=PACKED_DTYPES if packs else (),
        landing_num_bytes=landing_num_bytes,
    )
    cache = KvCache(layout, num_blocks, shareable=True, staging_num_bytes=staging.num_bytes)
    before = torch.get_num_threads()
    try:
        if blocks is None:
            yield LlamaRunner(spec, weights, cache, num_threads=num_threads), cache
        else:
            yield (
                NativeRunner(
                    spec, weights, blocks, cache, max_threads=num_threads, generation="test"
                ),
                cache,
            )
    finally:
        torch.set_num_threads(before)
        cache.close()


def table(first: int, num_blocks: int) -> list[BlockId]:
    """Blocks in descending order, so that nothing may rely on their being consecutive."""
    return [BlockId(first + num_blocks - 1 - i) for i in range(num_blocks)]


def tokens(seed: int, num_tokens: int, vocab_size: int = 211) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(0, vocab_size, (num_tokens,), generator=generator).tolist()
    return tuple(ids)


def prompt(token_ids: Sequence[int], start: int, block_table: Sequence[BlockId]) -> Rows:
    return Rows(
        path=Path.PROMPT,
        token_ids=tuple(token_ids),
        start=start,
        block_table=block_table,
        sample=GREEDY,
    )


def generated(token_ids: Sequence[int], start: int, block_table: Sequence[BlockId]) -> Rows:
    return Rows(
        path=Path.GENERATION,
        token_ids=tuple(token_ids),
        start=start,
        block_table=block_table,
        sample=GREEDY,
    )
