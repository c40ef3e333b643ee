"""The device's runner, with the kernels' references on the CPU, computes what the CPU's does.

So all of it but the kernels is proved here: planning, buckets, trays, sampling.
"""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from kvrelay.engine.batch import Path, Rows
from kvrelay.kernels.few_rows import MAX_ROWS, few_rows_reference
from kvrelay.kernels.many_rows import many_rows_reference
from kvrelay.kernels.matrix import Matrix
from kvrelay.kernels.ops import REFERENCES
from kvrelay.kernels.prompt_attention import QueryTiles
from kvrelay.kernels.sampling import Choices
from kvrelay.model.cuda_device import Stand
from kvrelay.model.cuda_steps import (
    MAX_ROW_SPLITS,
    Bucket,
    GenerationRow,
    GenerationStep,
    PromptStep,
    bucket_of,
    slices,
)
from kvrelay.model.spec import ModelSpec
from kvrelay.types import SamplingParams
from tests.support.tiny_cuda import cuda_runner_of
from tests.support.tiny_model import (
    generated,
    prompt,
    runner_of,
    table,
    tiny_spec,
    tiny_weights,
    tokens,
)

SPECS: dict[str, Callable[[], ModelSpec]] = {
    "grouped": tiny_spec,
    "one-kv-head-of-7": lambda: tiny_spec(
        hidden_size=56, num_attention_heads=7, num_key_value_heads=1, head_dim=16
    ),
    "window": lambda: tiny_spec(architectures=["MistralForCausalLM"], sliding_window=70),
    "qwen3": lambda: tiny_spec(architectures=["Qwen3ForCausalLM"]),
    "qwen2-untied": lambda: tiny_spec(
        architectures=["Qwen2ForCausalLM"], tie_word_embeddings=False
    ),
    "biased": lambda: tiny_spec(attention_bias=True, mlp_bias=True),
}

CLOSE = {"rtol": 0.0, "atol": 2e-4}

SAMPLED = (
    SamplingParams(),
    SamplingParams(temperature=1.0, seed=7),
    SamplingParams(temperature=0.7, top_k=12, seed=8),
    SamplingParams(temperature=1.3, top_p=0.6, seed=9),
    SamplingParams(temperature=1.0, top_k=50, top_p=0.9, min_p=0.05, seed=10),
)


def asked(path: Path, ids, start: int, blocks, params: SamplingParams | None) -> Rows:
    return Rows(path=path, token_ids=tuple(ids), start=start, block_table=blocks, sample=params)


@pytest.mark.parametrize("name", SPECS)
def test_logits_are_those_of_the_cpus_runner(name: str) -> None:
    """Prompts whole and cut, alone and together; generated tokens one by one and replayed."""
    spec = SPECS[name]()
    weights = tiny_weights(spec, "float32")
    first, second = tokens(1, 300), tokens(2, 37)
    steps = [
        [prompt(first[:130], 0, table(0, 25)), prompt(second, 0, table(30, 4))],
        [
            generated(tokens(3, 1), 37, table(30, 4)),
            prompt(first[130:], 130, table(0, 25)),
            prompt(tokens(4, 1), 0, table(40, 1)),
        ],
        [generated(tokens(5, 7), 300, table(0, 25)), generated(tokens(6, 2), 38, table(30, 4))],
    ]
    with (
        runner_of(spec, weights) as (theirs, _),
        cuda_runner_of(spec, weights) as (ours, cache),
    ):
        cache.on_device.fill_(torch.nan)  # what nobody wrote is never seen
        for batch in steps:
            torch.testing.assert_close(ours.step_logits(batch), theirs.step_logits(batch), **CLOSE)


@pytest.mark.parametrize("block_size", [1, 8, 64])
def test_tokens_are_those_of_the_cpus_runner(block_size: int) -> None:
    """Greedy and sampled by every kind of cut, for as long as requests go on."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    num_table = -(-120 // block_size)
    with (
        runner_of(spec, weights, block_size=block_size, num_blocks=620) as (theirs, _),
        cuda_runner_of(spec, weights, block_size=block_size, num_blocks=620) as (ours, _),
    ):
        blocks = [table(i * num_table, num_table) for i in range(len(SAMPLED))]
        prompts = [tokens(20 + i, 3 + 17 * i) for i in range(len(SAMPLED))]
        batch = [
            asked(Path.PROMPT, *row)
            for row in zip(prompts, [0] * len(SAMPLED), blocks, SAMPLED, strict=True)
        ]
        for step in range(25):
            found = ours.step(batch)
            assert found == theirs.step(batch)
            batch = [
                asked(Path.GENERATION, [token], len(ids) + step, blocks[i], SAMPLED[i])
                for i, (ids, token) in enumerate(zip(prompts, found, strict=True))
            ]


def test_only_rows_that_sample_have_tokens() -> None:
    """A chunk that is not a prompt's last, and a replay that goes on, have none."""
    spec = tiny_spec()
    with cuda_runner_of(spec, tiny_weights(spec, "float32")) as (runner, _):
        greedy = SamplingParams()
        batch = [
            asked(Path.PROMPT, tokens(1, 20), 0, table(0, 3), None),
            asked(Path.PROMPT, tokens(2, 5), 0, table(3, 1), greedy),
        ]
        found = runner.step(batch)
        assert found[0] is None
        assert found[1] is not None
        assert runner.step([asked(Path.GENERATION, [1, 2], 20, table(0, 3), None)]) == [None]
        assert runner.step(batch[:1]) == [None]
        assert runner.step([]) == []


def test_logits_that_are_not_finite_end_the_engine() -> None:
    """On either path; a token would be a guess."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    weights.layers[1].down[3] = torch.inf
    with cuda_runner_of(spec, weights) as (runner, _):
        for rows in (prompt([1, 2], 0, table(0, 1)), generated([1], 0, table(0, 1))):
            with pytest.raises(FloatingPointError, match="1 of 1"):
                runner.step([rows])


def test_more_rows_than_a_bucket_holds_are_computed_in_order() -> None:
    """A replay longer than any bucket: each token sees those before it."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    replay = tokens(3, MAX_ROWS + 30)
    with runner_of(spec, weights) as (theirs, _), cuda_runner_of(spec, weights) as (ours, _):
        for runner in (theirs, ours):
            runner.step([prompt([5, 6, 7], 0, table(0, 20))])
        batch = [generated(replay, 3, table(0, 20)), generated([9], 0, table(30, 1))]
        torch.testing.assert_close(ours.step_logits(batch), theirs.step_logits(batch), **CLOSE)


def test_rows_that_take_turns_in_one_bucket_keep_their_tokens() -> None:
    """More sequences than a bucket has rows, all alike in length."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    count = 2 * MAX_ROWS + 5
    ids = tokens(1, count)
    with runner_of(spec, weights) as (theirs, _), cuda_runner_of(spec, weights) as (ours, _):
        batch = [
            asked(Path.PROMPT, [token, token], 0, table(i, 1), SAMPLED[i % len(SAMPLED)])
            for i, token in enumerate(ids)
        ]
        assert ours.step(batch) == theirs.step(batch)
        batch = [
            asked(Path.GENERATION, [token], 2, table(i, 1), SAMPLED[i % len(SAMPLED)])
            for i, token in enumerate(ids)
        ]
        assert ours.step(batch) == theirs.step(batch)


def test_long_rows_share_a_bucket_with_fewer_others() -> None:
    """What attention keeps between its kernels stays bounded; no row is lost."""
    rows = [
        GenerationRow(token_id=0, position=position, block_table=(), run=i, sample=None)
        for i, position in enumerate([*range(0, 130_000, 1000), 3, 3])
    ]
    parts = list(slices(rows))
    for part in parts:
        bucket = bucket_of(part)
        assert bucket.num_rows >= len(part)
        assert bucket.num_rows * bucket.num_splits <= MAX_ROW_SPLITS
    assert sorted(row.run for part in parts for row in part) == list(range(len(rows)))
    positions = [row.position for part in parts for row in part]
    assert positions == sorted(positions)


def test_another_worker_goes_on_with_what_was_copied_to_the_host() -> None:
    """Once it was asked for, and with nothing else."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    ids = tokens(1, 70)
    with (
        cuda_runner_of(spec, weights) as (giver, given),
        cuda_runner_of(spec, weights) as (taker, taken),
    ):
        giver.step([prompt(ids[:33], 0, table(0, 5))])
        giver.step([prompt(ids[33:], 33, table(0, 5))])
        given.to_host(table(0, 5))
        for source, target in zip(table(0, 5), table(90, 5), strict=True):
            assert bytes(given.block_bytes(source)) == given.on_device[source].numpy().tobytes()
            taken.block_bytes(target)[:] = given.block_bytes(source)
        taken.landed(table(90, 5))
        expected = giver.step_logits([generated([7], 70, table(0, 5))])
        assert torch.equal(taker.step_logits([generated([7], 70, table(90, 5))]), expected)


def test_a_replay_gives_what_generating_gave() -> None:
    """Rows of one sequence in one step see each other, each up to itself."""
    spec = tiny_spec()
    with cuda_runner_of(spec, tiny_weights(spec, "float32")) as (runner, _):
        ids = tokens(2, 6)
        for blocks in (table(0, 5), table(5, 5)):
            runner.step([prompt(tokens(1, 50), 0, blocks)])
        for i, token in enumerate(ids):
            one_by_one = runner.step_logits([generated([token], 50 + i, table(0, 5))])
        replayed = runner.step_logits([generated(ids, 50, table(5, 5))])
        torch.testing.assert_close(replayed, one_by_one, **CLOSE)


@pytest.mark.parametrize(("kind", "likeness"), [("fp8", 0.99), ("int8", 0.999), ("int4", 0.9)])
def test_fewer_bits_are_another_path_with_a_name_of_its_own(kind, likeness) -> None:
    """Prompts are computed as ever; generated tokens nearly."""
    spec = tiny_spec(hidden_size=128, intermediate_size=256, head_dim=64, num_attention_heads=2)
    weights = tiny_weights(spec, "float32")
    with (
        cuda_runner_of(spec, weights) as (plain, _),
        cuda_runner_of(spec, weights, kind=kind) as (packed, _),
    ):
        batch = [prompt(tokens(1, 40), 0, table(0, 4))]
        assert torch.equal(plain.step_logits(batch), packed.step_logits(batch))
        batch = [generated([3], 40, table(0, 4))]
        near, exact = packed.step_logits(batch), plain.step_logits(batch)
        assert not torch.equal(near, exact)
        assert torch.nn.functional.cosine_similarity(near, exact).item() > likeness
        assert packed.numerics != plain.numerics
        assert kind in packed.numerics
        assert packed.weights.step_num_bytes < plain.weights.step_num_bytes


def test_the_numerics_name_the_device_and_whether_rows_vary() -> None:
    """The CPU's product of floats is none that keeps rows apart; the name must admit it."""
    spec = tiny_spec()
    with cuda_runner_of(spec, tiny_weights(spec, "float32")) as (runner, _):
        assert runner.numerics == "cuda-references-on-cpu-float32-v1"
        varying = runner.prove_rows()
        assert varying
        assert runner.numerics == "cuda-references-on-cpu-float32-v1-rows-vary"


@pytest.mark.parametrize("count", [1, 3, 5])
def test_what_kernels_read_begins_at_multiples_of_16_bytes(count) -> None:
    """Whatever the batch: Triton compiles other code for other alignments, while requests wait."""
    sampled = [(i, SAMPLED[1], 7) for i in range(count)]
    runs = [(tokens(i, 3), 0, table(0, 1)) for i in range(count)]
    cpu = torch.device("cpu")
    prompts = PromptStep(runs, sampled, block_size=8, device=cpu)
    bucket = GenerationStep(Bucket(count, 2), block_size=8, device=cpu)
    for step in (prompts, bucket):
        read = [getattr(step.rows, field.name) for field in fields(step.rows)]
        read += [getattr(step.sampling.choices, each.name) for each in fields(Choices)]
        if step is prompts:
            read += [getattr(prompts.tiles, each.name) for each in fields(QueryTiles)]
        assert {tensor.data_ptr() % 16 for tensor in read} == {0}
        assert step.rows.block_tables.stride(0) % 16 == 0


def by_row(x: torch.Tensor, matrix: Matrix, *, out: torch.Tensor, rows_tile: int = 0) -> None:
    """A product that cannot know of other rows."""
    for row in range(len(x)):
        few_rows_reference(x[row : row + 1], matrix, out=out[:, row : row + 1])


def by_tile(x: torch.Tensor, matrix: Matrix, *, out: torch.Tensor, rows_tile: int = 0) -> None:
    """A product that is off by a hair when it comes in a larger tile."""
    by_row(x, matrix, out=out)
    if max(rows_tile, len(x)) > 16:
        out *= 1 + 2**-12


def many_by_row(x, weight, bias, *, out) -> None:
    for row in range(len(x)):
        many_rows_reference(x[row : row + 1], weight, bias, out=out[row : row + 1])


@pytest.mark.parametrize(("few", "name"), [(by_row, "v1"), (by_tile, "tile-64-v1")])
def test_a_device_whose_tiles_differ_uses_one_of_them(few, name) -> None:
    """Rather than let a row's bits depend on how many there are; and the name tells."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    ops = replace(REFERENCES, few_rows=few, many_rows=many_by_row)
    with cuda_runner_of(spec, weights, device=Stand(ops), max_rows=2) as (runner, _):
        runner.warm_up()
        assert runner.prove_rows() == ()
        assert runner.numerics == f"cuda-references-on-cpu-float32-{name}"
        batch = [generated([i], 0, table(i, 1)) for i in range(70)]
        together = runner.step_logits(batch)
        assert torch.equal(runner.step_logits(batch[69:]), together[69:])


def test_a_warm_runner_has_recorded_what_most_requests_need() -> None:
    """Every number of rows there is, for contexts that are not long."""
    spec = tiny_spec()
    weights = tiny_weights(spec, "float32")
    with cuda_runner_of(spec, weights, max_rows=5, num_blocks=40) as (runner, _):
        runner.warm_up()
        recorded = {(bucket.num_rows, bucket.num_splits) for bucket in runner._recorded}
        assert recorded == {(rows, splits) for rows in (1, 2, 4, 8) for splits in (1, 2, 4)}


def test_without_triton_all_but_the_kernels_is_there() -> None:
    """Every module can be imported, the references compute, and a launch says what it lacks."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from kvrelay.kernels.ops import KERNELS, REFERENCES\n"
        "from kvrelay.model.cuda_runner import CudaRunner\n"
        "parts, out = torch.ones(1, 2, 8), torch.empty(2, 4)\n"
        "REFERENCES.silu_mul(parts, out=out)\n"
        "assert out.isfinite().all()\n"
        "KERNELS.silu_mul(parts, out=out)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert ended.returncode == 1
    assert "kernel _silu_mul_kernel needs triton, which is not installed" in ended.stderr
