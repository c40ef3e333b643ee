"""A row's bits are its own: not its batch's, its chunk's, nor its replay's.

Bit for bit on a CUDA device, with its kernels in bfloat16. Where there is none, the same steps
are rehearsed with the references on the CPU, whose products keep rows only nearly apart.
"""

from collections.abc import Callable

import pytest
import torch

from kvrelay.model.cuda_device import Cuda, Device, Stand
from kvrelay.model.cuda_runner import CudaRunner
from kvrelay.model.spec import ModelSpec
from tests.support.kernel_cases import HAS_DEVICE
from tests.support.tiny_cuda import cuda_runner_of
from tests.support.tiny_model import generated, prompt, table, tiny_spec, tiny_weights, tokens

DTYPE = "bfloat16" if HAS_DEVICE else "float32"

SPECS: dict[str, Callable[[], ModelSpec]] = {
    "grouped": tiny_spec,
    "wide": lambda: tiny_spec(
        hidden_size=1024, num_attention_heads=8, num_key_value_heads=1, head_dim=128,
        intermediate_size=2816, vocab_size=4099,
    ),
    "window": lambda: tiny_spec(architectures=["MistralForCausalLM"], sliding_window=70),
    "qwen3": lambda: tiny_spec(architectures=["Qwen3ForCausalLM"], head_dim=64),
}  # fmt: skip

NUM_PROMPT = 700 if HAS_DEVICE else 150
KINDS = ["plain", "fp8", "int8", "int4"] if HAS_DEVICE else ["plain", "int4"]
CHUNKS = [1, 7, 16, 64, 127, 128, 129, 500] if HAS_DEVICE else [7, 64]
COMPANY = [1, 15, 16, 40] if HAS_DEVICE else [5]


@pytest.fixture(scope="module")
def device() -> Device:
    return Cuda() if HAS_DEVICE else Stand()


@pytest.fixture(params=SPECS)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return SPECS[request.param]()


def assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if HAS_DEVICE:
        assert torch.equal(ours, theirs)
    else:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)


def answers(runner: CudaRunner, spec: ModelSpec, first_block: int) -> torch.Tensor:
    """Logits after a prompt, and after each of six tokens, all alone."""
    blocks = table(first_block, 60)
    ids = tokens(1, NUM_PROMPT, spec.vocab_size)
    logits = [runner.step_logits([prompt(ids, 0, blocks)])]
    for i, token in enumerate(tokens(2, 6, spec.vocab_size)):
        logits.append(runner.step_logits([generated([token], NUM_PROMPT + i, blocks)]))
    return torch.cat(logits)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_prompt_has_the_same_bits_however_it_is_cut(device, spec, chunk):
    """Chunks may begin anywhere in a block or a tile."""
    ids = tokens(1, NUM_PROMPT, spec.vocab_size)
    with cuda_runner_of(spec, tiny_weights(spec, DTYPE), device=device) as (runner, cache):
        whole = answers(runner, spec, 0)
        cut = max(0, NUM_PROMPT - 12 * chunk)
        if cut:
            runner.step_logits([prompt(ids[:cut], 0, table(60, 60))])
        for start in range(cut, NUM_PROMPT, chunk):
            part = ids[start : start + chunk]
            logits = runner.step_logits([prompt(part, start, table(60, 60))])
        assert_same(logits, whole[:1])
        full = NUM_PROMPT // 16
        kv = [cache.on_device[table(first, 60)[:full]] for first in (0, 60)]
        assert_same(kv[1].float(), kv[0].float())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_others", COMPANY)
def test_a_sequence_has_the_same_bits_in_any_company(device, spec, num_others, kind):
    """Prompts beside it, others that decode at any length, and any size of bucket."""
    weights = tiny_weights(spec, DTYPE)
    ids = tokens(1, NUM_PROMPT, spec.vocab_size)
    with cuda_runner_of(spec, weights, device=device, kind=kind) as (runner, _):
        alone = answers(runner, spec, 0)
        lengths = [(37 * i * i + 11 * i) % 90 + 1 for i in range(num_others)]
        others = [
            prompt(tokens(9 + i, length, spec.vocab_size), 0, table(120 + 6 * i, 6))
            for i, length in enumerate(lengths)
        ]
        half = num_others // 2
        blocks = table(60, 60)
        batch = [*others[:half], prompt(ids, 0, blocks), *others[half:]]
        assert_same(runner.step_logits(batch)[half], alone[0])
        for i, token in enumerate(tokens(2, 6, spec.vocab_size)):
            batch = [
                generated(tokens(50 + j + i, 1, spec.vocab_size), length + i, table(120 + 6 * j, 6))
                for j, length in enumerate(lengths)
            ]
            at = i % len(batch)
            batch.insert(at, generated([token], NUM_PROMPT + i, blocks))
            assert_same(runner.step_logits(batch)[at], alone[1 + i])


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_tokens_have_the_bits_they_had_one_by_one(device, spec, kind):
    """Beside a prompt or alone."""
    weights = tiny_weights(spec, DTYPE)
    ids, said = tokens(1, NUM_PROMPT, spec.vocab_size), tokens(2, 6, spec.vocab_size)
    with cuda_runner_of(spec, weights, device=device, kind=kind) as (runner, _):
        alone = answers(runner, spec, 0)
        runner.step_logits([prompt(ids, 0, table(60, 60))])
        beside = prompt(tokens(5, 40, spec.vocab_size), 0, table(120, 3))
        batch = [beside, generated(said[:4], NUM_PROMPT, table(60, 60))]
        assert_same(runner.step_logits(batch)[1], alone[4])
        batch = [generated(said[4:], NUM_PROMPT + 4, table(60, 60))]
        assert_same(runner.step_logits(batch)[0], alone[6])


def test_what_freed_blocks_hold_is_never_seen(device, spec):
    """NaN left in every slot not yet written changes no bit."""
    weights = tiny_weights(spec, DTYPE)
    with cuda_runner_of(spec, weights, device=device) as (runner, cache):
        clean = answers(runner, spec, 0)
        cache.on_device.fill_(torch.nan)
        assert_same(answers(runner, spec, 60), clean)


@pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device and triton")
@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_finds_that_no_product_varies(device, spec, kind):
    """So its name makes the promise that its kernels are written to keep."""
    weights = tiny_weights(spec, DTYPE)
    with cuda_runner_of(spec, weights, device=device, kind=kind) as (runner, _):
        runner.warm_up()
        assert runner.prove_rows() == ()
        assert not runner.numerics.endswith("rows-vary")


@pytest.mark.skipif(not HAS_DEVICE, reason="needs a CUDA device and triton")
@pytest.mark.gpu
def test_the_device_agrees_with_its_references(device, spec):
    """Kernels in bfloat16 on the device, references in bfloat16 on the CPU: near, not equal."""
    weights = tiny_weights(spec, DTYPE)
    with (
        cuda_runner_of(spec, weights, device=device) as (ours, _),
        cuda_runner_of(spec, weights) as (theirs, _),
    ):
        near = torch.nn.functional.cosine_similarity(
            answers(ours, spec, 0), answers(theirs, spec, 0)
        )
        assert near.min().item() > 0.99
