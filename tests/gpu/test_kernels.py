"""Every kernel computes what the reference beside it computes, over awkward sizes.

On a CUDA device in bfloat16; or interpreted on the CPU in float32, which is how
tests/contract/test_kernels.py runs the small sizes wherever there is no device.
"""

import pytest
import torch

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
from kvrelay.kernels.matrix import pack
from kvrelay.model.layers import rope_table
from kvrelay.model.spec import RopeSpec
from tests.support.kernel_cases import (
    DEVICE,
    DTYPE,
    HAS_DEVICE,
    IS_INTERPRETED,
    NEITHER,
    assert_near,
    ints,
    noise,
    paged_kv,
)

pytestmark = pytest.mark.gpu

if not (HAS_DEVICE or IS_INTERPRETED):
    pytest.skip(NEITHER, allow_module_level=True)


def sizes(small: list, large: list) -> list:
    """Small ones everywhere, large ones on a device: the interpreter would take minutes."""
    return [*small, *large] if HAS_DEVICE else small


DTYPES = sorted({DTYPE, torch.bfloat16}, key=str)
"""Kernels without products are interpreted in bfloat16 as well."""

NEAR = {torch.bfloat16: 1e-2, torch.float32: 2e-5}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_parts", [0, 1, 3])
@pytest.mark.parametrize(
    "shape", sizes([(1, 64), (5, 72), (3, 577)], [(128, 4096), (1000, 5120), (1, 8192)]), ids=str
)
def test_the_norm_adds_what_was_said_and_norms_the_sum(shape, num_parts, dtype):
    """The stream changes in place, in float32; the next product's input is of its dtype."""
    rows, hidden = shape
    weight = noise(hidden, seed=1, dtype=torch.float32)
    parts = noise(num_parts, rows, hidden, seed=2, dtype=torch.float32) if num_parts else None
    results = []
    for op in (norm.add_rms_norm, norm.add_rms_norm_reference):
        residual = noise(rows, hidden, seed=3, dtype=torch.float32)
        out = torch.full((rows, hidden), torch.nan, dtype=dtype, device=DEVICE)
        op(residual, parts, weight, eps=1e-5, out=out)
        results.append((residual, out))
    assert_near(results[0][0], results[1][0], 1e-6)
    assert_near(results[0][1], results[1][1], NEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_parts", [1, 4])
@pytest.mark.parametrize(
    "shape", sizes([(1, 16), (7, 104), (2, 2050)], [(64, 14336), (513, 11008)]), ids=str
)
def test_the_activation_of_gate_and_up(shape, num_parts, dtype):
    """Partial sums of both are added first."""
    rows, inner = shape
    parts = noise(num_parts, rows, 2 * inner, seed=1, dtype=torch.float32)
    ours, reference = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in "ab")
    mlp.silu_mul(parts, out=ours)
    mlp.silu_mul_reference(parts, out=reference)
    assert_near(ours, reference, NEAR[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("has_head_norm", [False, True])
@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize(
    "heads", sizes([(6, 2, 24), (1, 1, 64), (8, 1, 16)], [(32, 8, 128), (9, 3, 64)]), ids=str
)
def test_rotation_and_the_writing_of_kv(heads, block_size, has_head_norm, dtype):
    """Into permuted blocks of one layer, beside what others wrote; padding writes nothing."""
    num_heads, num_kv_heads, head_dim = heads
    positions = ints(0, 15, -1, 16, 17, 39)
    row_tables = ints(0, 0, 0, 0, 1, 1)
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    tables = order.view(2, 40).to(DEVICE, torch.int32)
    table = rope_table(RopeSpec(theta=1e4), head_dim=head_dim, num_positions=40).to(DEVICE)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    parts = noise(2, len(positions), width, seed=1, dtype=torch.float32)
    weights = [noise(head_dim, seed=i, dtype=torch.float32) for i in (2, 3)]
    q_norm, k_norm = weights if has_head_norm else (None, None)
    results = []
    for op in (rope.rope_write, rope.rope_write_reference):
        cache = torch.full((80, 3, 2, block_size, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        cache = cache.to(DEVICE)
        q = torch.zeros(len(positions), num_heads, head_dim, dtype=dtype, device=DEVICE)
        op(
            parts, positions, table, tables, row_tables, cache[:, 1, 0], cache[:, 1, 1],
            q_norm=q_norm, k_norm=k_norm, eps=1e-6, q_out=q,
        )  # fmt: skip
        results.append((q, cache))
    assert_near(results[0][0], results[1][0], NEAR[dtype])
    assert_near(results[0][1], results[1][1], NEAR[dtype])


@pytest.mark.parametrize("kind", ["plain", "fp8", "int8", "int4"])
@pytest.mark.parametrize("num_rows", sizes([1, 5, 17], [2, 8, 16, 31, 32, 33, 64, 127, 128]))
@pytest.mark.parametrize(
    "shape",
    sizes([(1, 128), (70, 256), (65, 2304)], [(6144, 4096), (4096, 14336), (577, 1536)]),
    ids=str,
)
def test_the_product_of_few_rows(shape, num_rows, kind):
    """With a bias, which belongs to one part only, and any number of parts."""
    out_features, in_features = shape
    weight = noise(out_features, in_features, seed=1) * in_features**-0.5
    matrix = pack(weight, noise(out_features, seed=2), kind=kind)
    x = noise(num_rows, in_features, seed=3)
    out = (few_rows.num_parts(matrix), num_rows, out_features)
    ours, reference = (torch.full(out, torch.nan, device=DEVICE) for _ in "ab")
    few_rows.few_rows(x, matrix, out=ours)
    few_rows.few_rows_reference(x, matrix, out=reference)
    assert_near(ours.sum(0), reference.sum(0))


def test_a_product_of_few_rows_whose_inputs_fill_no_tile():
    """The last tile of inputs is shorter, and what lies beyond is not read."""
    matrix = pack(noise(33, 100, seed=1), None, kind="plain")
    beyond = torch.full((3, 200), torch.nan, dtype=DTYPE, device=DEVICE)
    beyond[:, :100] = noise(3, 100, seed=2)
    ours, reference = (torch.empty(1, 3, 33, device=DEVICE) for _ in "ab")
    few_rows.few_rows(beyond[:, :100], matrix, out=ours)
    few_rows.few_rows_reference(beyond[:, :100], matrix, out=reference)
    assert_near(ours, reference)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    "shape",
    sizes(
        [(1, 33, 64), (130, 70, 100), (129, 64, 128)],
        [(1, 4096, 4096), (1000, 6144, 4096), (257, 4096, 14336), (64, 28672, 4096)],
    ),
    ids=str,
)
def test_the_product_of_many_rows(shape, has_bias):
    """Rows, outputs and inputs that fill no tile."""
    num_rows, out_features, in_features = shape
    weight = noise(out_features, in_features, seed=1) * in_features**-0.5
    x, bias = noise(num_rows, in_features, seed=2), noise(out_features, seed=3)
    ours, reference = (
        torch.full((num_rows, out_features), torch.nan, dtype=DTYPE, device=DEVICE) for _ in "ab"
    )
    many_rows.many_rows(x, weight, bias if has_bias else None, out=ours)
    many_rows.many_rows_reference(x, weight, bias if has_bias else None, out=reference)
    assert_near(ours, reference)


SHAPES = sizes(
    [(2, 1, 64), (1, 3, 64), (1, 8, 128), (2, 3, 24)],
    [(8, 4, 128), (3, 3, 64), (1, 7, 128), (4, 1, 80), (2, 8, 256)],
)


@pytest.mark.parametrize("window", [None, 31])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "lengths", sizes([[1, 15, 16, 17], [140, 3]], [[2000, 1], [129, 257, 511, 64, 8000]]), ids=str
)
def test_attention_of_prompt_rows(lengths, shape, window):
    """Chunks that begin anywhere, of several prompts in one launch."""
    num_kv_heads, group, head_dim = shape
    kv = paged_kv(lengths, block_size=16, num_kv_heads=num_kv_heads, head_dim=head_dim, seed=1)
    runs, num_rows = [], 0
    for i, length in enumerate(lengths):
        start = length // 3
        runs.append((i, num_rows, length - start, start))
        num_rows += length - start
    tiles = torch.tensor(prompt_attention.query_tiles(runs), dtype=torch.int32).T.contiguous()
    tiles = prompt_attention.QueryTiles(*tiles.to(DEVICE))
    q = noise(num_rows, num_kv_heads * group, head_dim, seed=2)
    ours, reference = (torch.full_like(q, torch.nan) for _ in "ab")
    options = {"scale": head_dim**-0.5, "window": window}
    prompt_attention.prompt_attention(q, kv.k, kv.v, kv.tables, tiles, **options, out=ours)
    prompt_attention.prompt_attention_reference(
        q, kv.k, kv.v, kv.tables, tiles, **options, out=reference
    )
    assert not reference.isnan().any()
    assert_near(ours, reference)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "lengths",
    sizes([[1, 16, 17], [255, 256, 257], [600]], [[5000, 1, 33], [40_000, 4097], [130_000]]),
    ids=str,
)
def test_attention_of_generated_rows(lengths, shape, block_size, window):
    """One split and many, several rows of one sequence, padding, and room for longer rows."""
    num_kv_heads, group, head_dim = shape
    kv = paged_kv(
        lengths, block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, seed=1
    )
    positions = ints(*(length - 1 for length in lengths), -1, lengths[0] // 2)
    row_tables = ints(*range(len(lengths)), 0, 0)
    num_splits = max(lengths) // generation_attention.SPLIT + 2
    q = noise(len(positions), num_kv_heads * group, head_dim, seed=2)
    ours, reference = (torch.zeros_like(q) for _ in "ab")
    sums = generation_attention.split_sums(*q.shape[:2], num_splits, head_dim, q.device)
    for left in (sums.tops, sums.totals, sums.values):
        left.fill_(torch.nan)
    options = {"scale": head_dim**-0.5, "window": window}
    args = (q, kv.k, kv.v, kv.tables, row_tables, positions, sums)
    generation_attention.generation_attention(*args, **options, out=ours)
    generation_attention.generation_attention_reference(*args, **options, out=reference)
    assert_near(ours, reference)


def choices_of(num_rows: int) -> sampling.Choices:
    """Every kind of cut, one after the other."""

    def cycled(*values: float) -> torch.Tensor:
        found = [values[i % len(values)] for i in range(num_rows)]
        return torch.tensor(found, dtype=torch.float32, device=DEVICE)

    return sampling.Choices(
        temperature=cycled(0.0, 1.0, 0.7, 1.3),
        top_k=cycled(0, 0, 5, 40, 1, 100_000_000).int(),
        top_p=cycled(1.0, 1.0, 0.5, 0.9, 0.05),
        min_p=cycled(0.0, 0.0, 0.0, 0.1, 0.2, 0.0, 0.01),
        uniform=torch.rand(num_rows, generator=torch.Generator().manual_seed(1)).to(DEVICE),
    )


@pytest.mark.parametrize(
    "shape", sizes([(8, 211), (2, 5000)], [(128, 128_256), (61, 32_000)]), ids=str
)
def test_chosen_tokens_are_the_references(shape):
    """But for a draw within rounding of the border between two tokens."""
    num_rows, vocab_size = shape
    logits = noise(num_rows, vocab_size, seed=1, dtype=torch.float32) * 3
    logits[0, 3 : 3 + 2] = logits[0].max() + 1  # equals: the lowest id
    choices = choices_of(num_rows)
    ours, reference = (torch.full((num_rows,), -2, dtype=torch.int32).to(DEVICE) for _ in "ab")
    sampling.sample(logits, choices, out=ours)
    sampling.sample_reference(logits, choices, out=reference)
    num_other = int((ours != reference).sum())
    assert num_other <= num_rows // 100
    assert ours[0] == 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_has_no_token(bad):
    """The others have theirs."""
    logits = noise(3, 300, seed=1, dtype=torch.float32)
    logits[1, 299] = bad
    chosen = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    sampling.sample(logits, choices_of(3), out=chosen)
    assert chosen[1] == sampling.NOT_FINITE
    assert chosen[0] >= 0
    assert chosen[2] >= 0
