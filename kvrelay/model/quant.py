"""Matrices of 4 and 8 bits: 32 neighbours of a row share a scale, in the layout of ggml.

A block of 32 values is, in bytes of its row and in this order:

    q8_0: scale (fp16), 32 int8                            value = scale * q
    q4_0: scale (fp16), 16 bytes of two 4-bit q            value = scale * (q - 8)
    q4_1: scale (fp16), least (fp16), 16 bytes as in q4_0  value = scale * q + least

The low half of byte i is value i of the block, the high half value i + 16.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.nn import functional

from kvrelay.errors import ModelInvalid

Kind = Literal["q4_0", "q4_1", "q8_0"]

KINDS: tuple[Kind, ...] = get_args(Kind)
BLOCK_BYTES: dict[Kind, int] = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
BLOCK_FEATURES = 32

_AT_ONCE = 2**18
"""Values worked on at once: few enough for their float32 to stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class QuantMatrix:
    """A matrix [out_features, in_features] as blocks."""

    kind: Kind
    data: torch.Tensor  # uint8 [out_features, in_features / 32 * block_bytes], contiguous

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    @property
    def in_features(self) -> int:
        return self.data.shape[1] // BLOCK_BYTES[self.kind] * BLOCK_FEATURES

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


def row_bytes(kind: Kind, in_features: int) -> int:
    """Bytes of one row's blocks.

    Raises:
        ModelInvalid: a row is not a whole number of blocks.
    """
    if in_features % BLOCK_FEATURES:
        raise ModelInvalid(
            kind, f"in_features {in_features} of a matrix is no multiple of {BLOCK_FEATURES}"
        )
    return in_features // BLOCK_FEATURES * BLOCK_BYTES[kind]


def quantize(matrix: torch.Tensor, kind: Kind) -> QuantMatrix:
    """Round each value to the nearest that its block can say.

    Args:
        matrix: floats, [out_features, in_features].
        kind: of the result.

    Raises:
        ModelInvalid: a row is not a whole number of blocks, or a value is too large for fp16.
    """
    data = torch.empty((len(matrix), row_bytes(kind, matrix.shape[1])), dtype=torch.uint8)
    encode = _ENCODERS[kind]
    for rows in _pieces(matrix.shape):
        blocks = matrix[rows].float().view(-1, BLOCK_FEATURES)
        encode(blocks, data[rows].view(-1, BLOCK_BYTES[kind]))
    return QuantMatrix(kind, data)


def dequantize(matrix: QuantMatrix) -> torch.Tensor:
    """The values a matrix stands for, exactly: float32 [out_features, in_features]."""
    values = torch.empty((matrix.out_features, matrix.in_features), dtype=torch.float32)
    decode = _DECODERS[matrix.kind]
    for rows in _pieces(values.shape):
        blocks = matrix.data[rows].reshape(-1, BLOCK_BYTES[matrix.kind])
        values[rows] = decode(blocks).view(-1, matrix.in_features)
    return values


def linear_reference(x: torch.Tensor, matrix: QuantMatrix) -> torch.Tensor:
    """`x @ matrix.T` in float32, of exact weights: what kernels are held to.

    Args:
        x: [num_rows, in_features], of any float type.
        matrix: of `in_features`.
    """
    return functional.linear(x.float(), dequantize(matrix))


def _pieces(shape: torch.Size) -> Iterator[slice]:
    num_rows, row_features = shape
    step = max(1, _AT_ONCE // max(1, row_features))
    for first in range(0, num_rows, step):
        yield slice(first, min(first + step, num_rows))


def _encode_q8_0(values: torch.Tensor, out: torch.Tensor) -> None:
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    steps = values * _inverse(scale)
    steps.add_(steps.sign(), alpha=0.5)  # the conversion truncates
    _put_half(scale, out[:, :2])
    out[:, 2:] = steps.to(torch.int8).view(torch.uint8)


def _encode_q4_0(values: torch.Tensor, out: torch.Tensor) -> None:
    farthest = values.gather(1, values.abs().argmax(dim=1, keepdim=True))
    scale = farthest / -8  # of either sign, so that the farthest value is exact
    steps = (values * _inverse(scale) + 8.5).clamp_(max=15)  # 8 is the one step too many
    _put_half(scale, out[:, :2])
    out[:, 2:] = _packed(steps)


def _encode_q4_1(values: torch.Tensor, out: torch.Tensor) -> None:
    least, most = values.aminmax(dim=1, keepdim=True)
    scale = (most - least) / 15
    steps = (values - least).mul_(_inverse(scale)).add_(0.5)
    _put_half(scale, out[:, :2])
    _put_half(least, out[:, 2:4])
    out[:, 4:] = _packed(steps)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _put_half(values: torch.Tensor, out: torch.Tensor) -> None:
    halves = values.half()
    if not halves.isfinite().all():
        raise ModelInvalid("weights", "a matrix holds values too large for blocks, or none at all")
    out[:] = halves.view(torch.uint8)


def _packed(steps: torch.Tensor) -> torch.Tensor:
    """Two steps to a byte, [num_blocks, 32] to [num_blocks, 16]; truncated, all below 16."""
    q = steps.to(torch.uint8)
    return q[:, :16] | (q[:, 16:] << 4)


def _decode_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half_of(blocks[:, :2]) * blocks[:, 2:].view(torch.int8).float()


def _decode_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _half_of(blocks[:, :2]) * (_unpacked(blocks[:, 2:]) - 8)


def _decode_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return _half_of(blocks[:, :2]) * _unpacked(blocks[:, 4:]) + _half_of(blocks[:, 2:4])


def _half_of(pair: torch.Tensor) -> torch.Tensor:
    return pair.contiguous().view(torch.float16).float()


def _unpacked(packed: torch.Tensor) -> torch.Tensor:
    return torch.cat([packed & 15, packed >> 4], dim=1).float()


_ENCODERS = {"q4_0": _encode_q4_0, "q4_1": _encode_q4_1, "q8_0": _encode_q8_0}
_DECODERS = {"q4_0": _decode_q4_0, "q4_1": _decode_q4_1, "q8_0": _decode_q8_0}
