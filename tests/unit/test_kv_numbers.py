"""What a cache keeps of numbers of K and V, and what is read again."""

import pytest
import torch

from kvrelay.kv import numbers


def random_rows(seed: int = 0) -> torch.Tensor:
    """Heads of all magnitudes: [rows, heads, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-30, 30, (200, 3, 1), generator=generator).float()
    return torch.randn(200, 3, 24, generator=generator) * powers.exp2()


def test_int8_is_as_near_as_its_scale_allows() -> None:
    """Half a step, and a little for a scale that is rounded to bfloat16."""
    x = random_rows()
    values, scales = numbers.kept(x, "int8")
    assert scales is not None
    assert (values.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert (values.shape, scales.shape) == (x.shape, x.shape[:-1])
    error = (numbers.read(values, scales) - x).abs()
    largest = x.abs().amax(dim=-1, keepdim=True)
    assert bool((error <= largest / 127 * 0.5 + largest * 2**-8).all())


def test_fp8_keeps_three_bits_of_fraction() -> None:
    """Down to 2**-6; below, whole steps of 2**-9."""
    x = random_rows().clamp(-448, 448)
    values, scales = numbers.kept(x, "fp8")
    assert scales is None
    error = (numbers.read(values, None) - x).abs()
    assert bool((error <= torch.maximum(x.abs() * 2**-4, torch.tensor(2**-10))).all())


def test_fp8_saturates() -> None:
    """Beyond 448 is 448, never infinite and never no number."""
    x = torch.tensor([[[449.0, -1e9, torch.inf, 448.0]]])
    values, _ = numbers.kept(x, "fp8")
    assert numbers.read(values, None).tolist() == [[[448.0, -448.0, 448.0, 448.0]]]


def test_ties_go_to_even() -> None:
    """Halfway between two numbers that can be kept."""
    values, scales = numbers.kept(torch.tensor([[127.0, 0.5, 1.5, -2.5]]), "int8")
    assert scales is not None
    assert (values.tolist(), scales.tolist()) == ([[127, 0, 2, -2]], [1.0])
    values, _ = numbers.kept(torch.tensor([[17.0, 19.0, -17.0, 2**-10]]), "fp8")
    assert values.float().tolist() == [[16.0, 20.0, -16.0, 0.0]]


@pytest.mark.parametrize("smallest", [0.0, 1e-44])
def test_a_scale_of_zero_keeps_zeros(smallest: float) -> None:
    """A head of nothing, or of less than bfloat16 can tell from it."""
    values, scales = numbers.kept(torch.full((2, 8), smallest), "int8")
    assert scales is not None
    assert not values.any()
    assert not scales.any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "fp8", "int8"])
def test_what_is_no_number_stays_none(dtype: str) -> None:
    """So logits of it are not finite, and nobody samples from them."""
    x = torch.ones(2, 8)
    x[1, 3] = torch.nan
    finite = torch.isfinite(numbers.read(*numbers.kept(x, dtype)))
    assert bool(finite[0].all())
    assert not finite[1, 3]


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
def test_what_was_read_is_kept_as_it_was(dtype: str) -> None:
    """Numbers that go from one cache to another of the same dtype do not wander."""
    values, scales = numbers.kept(random_rows(), dtype)
    again, _ = numbers.kept(numbers.read(values, scales), dtype)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))
