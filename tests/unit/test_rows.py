"""A worker looks whether its products keep rows apart, and says so if they do not."""

from dataclasses import replace

import pytest
import torch

from kvrelay.model.linear import Linear
from kvrelay.model.rows import rows_vary
from tests.support.tiny_model import runner_of, tiny_spec, tiny_weights


class ByRow(Linear):
    """A product of each row by itself, which cannot know of the others."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([super(ByRow, self).__call__(row[None]) for row in x])


class Crowded(Linear):
    """A product that is off by a hair when more than 8 rows come together."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        out = super().__call__(x)
        return out * (1 + 2**-7) if len(x) > 8 else out


def matrix(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(40, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_that_keeps_rows_apart_is_found_so(dtype):
    """Whatever batch a row is in."""
    assert not rows_vary(ByRow(matrix(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_in_which_company_shows_is_found_out(dtype):
    """One size of batch that differs is enough."""
    assert rows_vary(Crowded(matrix(dtype)))


def test_a_runner_whose_rows_vary_has_other_numerics():
    """So it is nobody's peer whose rows do not, and the name says why."""
    spec = tiny_spec()
    with runner_of(spec, tiny_weights(spec, "bfloat16")) as (runner, _):
        plain = runner.numerics
        assert runner.prove_rows() == ()
        assert runner.numerics == plain
        model = runner._model
        first = replace(model._layers[0], down=Crowded(tiny_weights(spec, "bfloat16").head))
        model._layers = (first, *model._layers[1:])
        assert runner.prove_rows() == ("down",)
        assert runner.numerics == f"{plain}-rows-vary"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_rows", [1, 2, 5, 16, 17, 64, 130])
def test_rearranged_weights_give_the_bits_of_plain_ones(dtype, num_rows):
    """With and without a bias, wherever a plain product keeps rows apart."""
    weights, bias = matrix(dtype), matrix(dtype)[:, 0].contiguous()
    rows = torch.randn(num_rows, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    plain = torch.nn.functional.linear(torch.cat((rows, rows)), weights)[:num_rows]
    if num_rows > 1 and dtype is torch.bfloat16:
        assert torch.equal(Linear(weights)(rows), plain)
    with_bias = torch.nn.functional.linear(rows, weights, bias)
    torch.testing.assert_close(Linear(weights, bias)(rows), with_bias)
