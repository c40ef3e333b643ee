"""Blocks of 4 and 8 bits mean what ggml means by them."""

from typing import get_args

import gguf
import numpy as np
import pytest
import torch

from kvrelay.errors import ModelInvalid
from kvrelay.model import quant
from kvrelay.model.quant import (
    BLOCK_BYTES,
    KINDS,
    Kind,
    QuantMatrix,
    dequantize,
    linear_reference,
    quantize,
)


def matrix_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ggml_type(kind: Kind) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[kind.upper()]


def test_sizes_are_those_of_ggml() -> None:
    """32 values, and as many bytes as it has for them."""
    for kind in get_args(Kind):
        assert gguf.GGML_QUANT_SIZES[ggml_type(kind)] == (32, BLOCK_BYTES[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 32), (7, 96), (300, 64)])
def test_quantized_bytes_are_those_of_ggml(kind: Kind, shape: tuple[int, int]) -> None:
    """The same nearest steps, in the same places."""
    values = matrix_of(1, *shape)
    values[0, :32] = 0.0  # a block without a scale
    values[-1, -32:] = 2.5  # and one without a range
    made = quantize(values, kind)
    expected = gguf.quantize(values.numpy(), ggml_type(kind))
    assert np.array_equal(made.data.numpy(), expected)
    assert (made.out_features, made.in_features) == shape
    assert made.num_bytes == expected.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_dequantized_as_ggml_does(kind: Kind) -> None:
    """Every nibble and sign, whoever wrote the blocks."""
    generator = torch.Generator().manual_seed(2)
    data = torch.randint(0, 256, (33, 5 * BLOCK_BYTES[kind]), generator=generator)
    blocks = data.to(torch.uint8).view(33, 5, -1)
    blocks[:, :, 1] &= 0x3F  # scales are finite
    blocks[:, :, 3] &= 0xBF
    matrix = QuantMatrix(kind, blocks.view(33, -1))
    expected = gguf.dequantize(matrix.data.numpy(), ggml_type(kind))
    assert np.array_equal(dequantize(matrix).numpy(), expected)


@pytest.mark.parametrize(("kind", "steps"), [("q4_0", 8), ("q4_1", 15), ("q8_0", 127)])
def test_no_value_moves_by_more_than_half_a_step(kind: Kind, steps: int) -> None:
    """Nearest means nearest, up to the rounding of the scale itself; q4_0 has one end short."""
    values = matrix_of(3, 50, 64)
    blocks = values.view(-1, 32)
    reach = blocks.amax(1) - blocks.amin(1) if kind == "q4_1" else blocks.abs().amax(1)
    step = reach / steps
    moved = (dequantize(quantize(values, kind)).view(-1, 32) - blocks).abs().amax(1)
    allowed = step if kind == "q4_0" else step * 0.5
    assert (moved <= allowed + reach * 2**-10).all()


@pytest.mark.parametrize("kind", KINDS)
def test_many_pieces_are_as_one(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is cut to fit a cache; the result does not show it. bfloat16 is taken as it is."""
    values = matrix_of(4, 41, 64).bfloat16()
    whole = quantize(values, kind)
    dense = dequantize(whole)
    monkeypatch.setattr(quant, "_AT_ONCE", 128)
    assert torch.equal(quantize(values, kind).data, whole.data)
    assert torch.equal(dequantize(whole), dense)
    assert torch.equal(quantize(values.float(), kind).data, whole.data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_product_is_that_of_the_dequantized_matrix(kind: Kind) -> None:
    """In float32, whatever the type of the rows."""
    matrix = quantize(matrix_of(5, 9, 64), kind)
    x = matrix_of(6, 3, 64).bfloat16()
    expected = x.double() @ dequantize(matrix).double().T
    assert torch.allclose(linear_reference(x, matrix).double(), expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_divide_into_blocks_are_refused(kind: Kind) -> None:
    """With the number that does not."""
    with pytest.raises(ModelInvalid, match="in_features 48 of a matrix is no multiple of 32"):
        quantize(matrix_of(7, 4, 48), kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_values_that_have_no_scale_are_refused(kind: Kind, bad: float) -> None:
    """fp16 ends at 65504; nothing is rounded to infinity in silence."""
    values = matrix_of(8, 4, 64)
    values[2, 40] = bad
    with pytest.raises(ModelInvalid, match="too large"):
        quantize(values, kind)
