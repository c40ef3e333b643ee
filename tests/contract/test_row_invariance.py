"""A token's KV and logits are a function of its sequence alone, bit for bit.

Not of the rest of the batch, of how the prompt was cut, of the number of threads, nor of
whether a generated token is computed once or replayed. Whatever dtype KV is kept in.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kvrelay.engine.batch import Rows
from kvrelay.kv.cache import TORCH_DTYPES, KvCache
from kvrelay.model.generation_weights import Blocks, generation_blocks
from kvrelay.model.native_runner import NativeRunner
from kvrelay.model.runner import LlamaRunner
from kvrelay.model.spec import ModelSpec, read_spec
from kvrelay.model.weights import Weights, load_weights
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

REAL_MODEL = Path.home() / ".cache/kvrelay/models/smollm2-135m-instruct"

SPECS: dict[str, Callable[[], ModelSpec]] = {
    "grouped": tiny_spec,
    "one-kv-head-of-7": lambda: tiny_spec(
        hidden_size=56, num_attention_heads=7, num_key_value_heads=1, head_dim=16
    ),
    "one-head": lambda: tiny_spec(num_attention_heads=1, num_key_value_heads=1, head_dim=64),
    "many-heads": lambda: tiny_spec(num_attention_heads=6, num_key_value_heads=6, head_dim=12),
    "window": lambda: tiny_spec(architectures=["MistralForCausalLM"], sliding_window=70),
    "qwen3": lambda: tiny_spec(architectures=["Qwen3ForCausalLM"]),
    "qwen2": lambda: tiny_spec(architectures=["Qwen2ForCausalLM"]),
    # Whole blocks of 32 features, and heads of more than one vector.
    "blocks": lambda: tiny_spec(hidden_size=64, head_dim=32, intermediate_size=96),
    "wide-heads": lambda: tiny_spec(hidden_size=64, head_dim=128, intermediate_size=160),
    "a-group-of-9": lambda: tiny_spec(
        hidden_size=96, num_attention_heads=9, num_key_value_heads=1, head_dim=32
    ),
}

TORCH = [(name, "float32", "torch") for name in SPECS if "block" not in name]
TORCH += [(name, "bfloat16", "torch") for name in ("grouped", "one-kv-head-of-7")]
NATIVE = [(name, "bfloat16", "bfloat16") for name in SPECS]
NATIVE += [("blocks", "bfloat16", "int4"), ("blocks", "bfloat16", "int8")]
NATIVE += [("wide-heads", "bfloat16", "int4")]
KV_TORCH = [
    ("grouped", "float32", "torch", "int8"),
    ("window", "float32", "torch", "fp8"),
    ("one-kv-head-of-7", "bfloat16", "torch", "int8"),
]
KV_NATIVE = [
    *((name, "bfloat16", "bfloat16", "int8") for name in SPECS),
    *((name, "bfloat16", "bfloat16", "fp8") for name in ("many-heads", "window", "wide-heads")),
    ("blocks", "bfloat16", "int4", "fp8"),
]

needs_native = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_model = (
    pytest.mark.realmodel,
    pytest.mark.skipif(not REAL_MODEL.is_dir(), reason=f"no model in {REAL_MODEL}"),
)
MODELS = [
    *TORCH,
    *KV_TORCH,
    *(pytest.param(model, marks=needs_native) for model in [*NATIVE, *KV_NATIVE]),
    pytest.param(("smollm2", "bfloat16", "torch"), marks=needs_model),
    pytest.param(("smollm2", "bfloat16", "auto"), marks=[*needs_model, needs_native]),
    pytest.param(("smollm2", "bfloat16", "auto", "int8"), marks=[*needs_model, needs_native]),
]

NUM_PROMPT = 300
NUM_OUTPUT = 9
NUM_TABLE_BLOCKS = 25
MAX_CHUNKS = 20
MAX_REAL_CHUNKS = 3


@dataclass(frozen=True)
class Model:
    """Weights, and the bits that one sequence must always have."""

    spec: ModelSpec
    weights: Weights
    blocks: Blocks | None
    """Of the compiled engine; torch has none."""

    kv_dtype: str | None
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    prompt_logits: torch.Tensor
    output_logits: torch.Tensor  # [NUM_OUTPUT, vocab_size]
    kv: torch.Tensor  # [num_layers, 2, slots, num_kv_heads, bytes]

    @property
    def max_chunks(self) -> int:
        """A step of a real model takes a hundred times as long."""
        return MAX_REAL_CHUNKS if self.spec.vocab_size > 1000 else MAX_CHUNKS

    def tokens(self, seed: int, num_tokens: int) -> tuple[int, ...]:
        return tokens(seed, num_tokens, self.spec.vocab_size)

    @contextmanager
    def runner(
        self, *, num_threads: int = 1, block_size: int = 16, num_blocks: int = 400
    ) -> Iterator[tuple[LlamaRunner | NativeRunner, KvCache]]:
        with runner_of(
            self.spec,
            self.weights,
            blocks=self.blocks,
            kv_dtype=self.kv_dtype,
            num_threads=num_threads,
            block_size=block_size,
            num_blocks=num_blocks,
        ) as both:
            yield both


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def model(request: pytest.FixtureRequest) -> Model:
    """`torch`, or what the compiled engine generates with; and what KV is kept in."""
    name, dtype, generation, *kv_dtype = request.param
    kept_in = kv_dtype[0] if kv_dtype else None
    if name in SPECS:
        spec = SPECS[name]()
        weights = tiny_weights(spec, dtype)
    else:
        spec = read_spec(REAL_MODEL)
        weights = load_weights(REAL_MODEL, spec, dtype=TORCH_DTYPES[dtype])
    own = None
    if generation != "torch":
        own = generation_blocks(REAL_MODEL, spec, weights, generation)
    prompt_ids = tokens(1, NUM_PROMPT, spec.vocab_size)
    output_ids = tokens(2, NUM_OUTPUT, spec.vocab_size)
    blocks = table(0, NUM_TABLE_BLOCKS)
    with runner_of(spec, weights, blocks=own, kv_dtype=kept_in) as (runner, cache):
        (prompt_logits,) = runner.step_logits([prompt(prompt_ids, 0, blocks)])
        outputs = [
            runner.step_logits([generated([token], NUM_PROMPT + i, blocks)])[0]
            for i, token in enumerate(output_ids)
        ]
        kv = kv_of(cache, 0)
    return Model(
        spec, weights, own, kept_in, prompt_ids, output_ids, prompt_logits, torch.stack(outputs), kv
    )


def kv_of(cache: KvCache, first_block: int) -> torch.Tensor:
    """The bytes in the slots of the sequence whose table begins at `first_block`."""
    blocks = table(first_block, NUM_TABLE_BLOCKS)
    kv = cache.values.view(torch.uint8)[blocks]
    if cache.scales is not None:
        kv = torch.cat((kv, cache.scales[blocks].unsqueeze(-1).view(torch.uint8)), dim=-1)
    kv = kv.permute(1, 2, 0, 3, 4, 5).flatten(2, 3)
    return kv[:, :, : NUM_PROMPT + NUM_OUTPUT].clone()


def neighbours(
    runner: LlamaRunner | NativeRunner, model: Model, count: int
) -> tuple[list[Rows], Callable[[int], list[Rows]]]:
    """Other sequences in blocks of their own: prompts to begin with, and decoding ones."""
    lengths = [(37 * i * i + 11 * i) % 330 + 1 for i in range(count)]
    tables = [table(30 + i * 22, 22) for i in range(count)]
    prompts = [
        prompt(model.tokens(10 + i, length), 0, tables[i]) for i, length in enumerate(lengths)
    ]

    def decoding(step: int) -> list[Rows]:
        rows = [
            generated(model.tokens(50 + i + step, 1), lengths[i] + step, tables[i])
            for i in range(count)
        ]
        rows.insert(count // 2, prompt(model.tokens(90 + step, 5 + step), 0, table(0 + 394, 2)))
        return rows

    return prompts, decoding


@pytest.mark.parametrize(
    ("chunk", "num_threads"),
    [(1, 1), (7, 2), (15, 1), (16, 1), (17, 1), (64, 2), (100, 1), (256, 2)],
)
def test_a_prompt_has_the_same_bits_however_it_is_cut(
    model: Model, chunk: int, num_threads: int
) -> None:
    """Chunks may begin anywhere in a block, a tile or a prefix that was there already."""
    blocks = table(0, NUM_TABLE_BLOCKS)
    first = max(0, NUM_PROMPT - model.max_chunks * chunk)
    with model.runner(num_threads=num_threads) as (runner, cache):
        if first:
            runner.step_logits([prompt(model.prompt_ids[:first], 0, blocks)])
        for start in range(first, NUM_PROMPT, chunk):
            part = model.prompt_ids[start : start + chunk]
            (logits,) = runner.step_logits([prompt(part, start, blocks)])
        assert torch.equal(logits, model.prompt_logits)
        assert torch.equal(kv_of(cache, 0)[:, :, :NUM_PROMPT], model.kv[:, :, :NUM_PROMPT])


@pytest.mark.parametrize(("count", "num_threads"), [(1, 1), (2, 2), (5, 1), (16, 1)])
def test_a_sequence_has_the_same_bits_in_any_company(
    model: Model, count: int, num_threads: int
) -> None:
    """Prefilled beside other prompts in uneven chunks, decoded beside others of any length."""
    blocks = table(0, NUM_TABLE_BLOCKS)
    with model.runner(num_threads=num_threads) as (runner, cache):
        prompts, decoding = neighbours(runner, model, count)
        runner.step_logits([*prompts[::2], prompt(model.prompt_ids[:123], 0, blocks)])
        rest = prompt(model.prompt_ids[123:], 123, blocks)
        logits = runner.step_logits([rest, *prompts[1::2]])[0]
        assert torch.equal(logits, model.prompt_logits)
        for i, token in enumerate(model.output_ids):
            ours, others = generated([token], NUM_PROMPT + i, blocks), decoding(i)
            at = i % (len(others) + 1)
            logits = runner.step_logits([*others[:at], ours, *others[at:]])[at]
            assert torch.equal(logits, model.output_logits[i])
        assert torch.equal(kv_of(cache, 0), model.kv)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_replayed_tokens_have_the_bits_they_had_one_by_one(model: Model, num_threads: int) -> None:
    """Several generated tokens of one sequence in one step, alone or beside a prompt."""
    blocks = table(0, NUM_TABLE_BLOCKS)
    with model.runner(num_threads=num_threads) as (runner, cache):
        runner.step_logits([prompt(model.prompt_ids, 0, blocks)])
        replay = generated(model.output_ids[:4], NUM_PROMPT, blocks)
        beside = prompt(model.tokens(5, 40), 0, table(30, 3))
        assert torch.equal(runner.step_logits([beside, replay])[1], model.output_logits[3])
        replay = generated(model.output_ids[4:], NUM_PROMPT + 4, blocks)
        assert torch.equal(runner.step_logits([replay])[0], model.output_logits[-1])
        assert torch.equal(kv_of(cache, 0), model.kv)


@needs_native
@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int8"])
def test_the_number_of_threads_may_change_with_every_step(kv_dtype: str) -> None:
    """As it does where workers share cores: within a prompt, and between generated tokens."""
    spec = SPECS["blocks"]()
    weights = tiny_weights(spec, "bfloat16")
    own = generation_blocks(REAL_MODEL, spec, weights, "int4")
    ids, blocks = tokens(1, 130, spec.vocab_size), table(0, 10)
    steps = [
        *(prompt(ids[start : start + 40], start, blocks) for start in range(0, 120, 40)),
        *(generated([ids[at]], at, blocks) for at in range(120, 130)),
    ]
    said = []
    for change in (0, 1):
        with runner_of(spec, weights, blocks=own, num_threads=3, kv_dtype=kv_dtype) as (runner, _):
            assert isinstance(runner, NativeRunner)
            for i, step in enumerate(steps):
                runner.set_threads(1 + change * (i % 3))
                said.append(runner.step_logits([step]))
    assert torch.equal(torch.stack(said[: len(steps)]), torch.stack(said[len(steps) :]))


def test_what_freed_blocks_hold_is_never_seen(model: Model) -> None:
    """NaN left in every slot not yet written changes no bit."""
    blocks = table(0, NUM_TABLE_BLOCKS)
    with model.runner() as (runner, cache):
        cache.bytes.fill(0xFF)  # no number in any dtype
        runner.step_logits([prompt(model.prompt_ids[:20], 0, blocks)])
        (logits,) = runner.step_logits([prompt(model.prompt_ids[20:], 20, blocks)])
        assert torch.equal(logits, model.prompt_logits)
        for i, token in enumerate(model.output_ids):
            (logits,) = runner.step_logits([generated([token], NUM_PROMPT + i, blocks)])
            assert torch.equal(logits, model.output_logits[i])


@pytest.mark.parametrize("block_size", [1, 8, 32, 256])
def test_the_block_size_changes_no_logits(model: Model, block_size: int) -> None:
    """Key tiles lie at absolute positions, whatever the blocks."""
    num_blocks = -(-(NUM_PROMPT + NUM_OUTPUT) // block_size)
    blocks = table(0, num_blocks)
    with model.runner(block_size=block_size, num_blocks=num_blocks) as (runner, _):
        (logits,) = runner.step_logits([prompt(model.prompt_ids, 0, blocks)])
        assert torch.equal(logits, model.prompt_logits)
        (logits,) = runner.step_logits([generated(model.output_ids, NUM_PROMPT, blocks)])
        assert torch.equal(logits, model.output_logits[-1])
