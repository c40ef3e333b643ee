"""A matrix of weights as the generation path stores it: plain, or fewer bits with scales.

`fp8` is e4m3 with one scale per output row. `int8` and `int4` are symmetric with one scale per
output row and group of inputs. A byte of `int4` holds two inputs of one group: the low half's
is `i`, the high half's is `i + group / 2`, so a group unpacks into two contiguous runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["plain", "fp8", "int8", "int4"]

GROUPS: Mapping[Kind, int] = {"int8": 128, "int4": 64}
"""Inputs that share a scale."""

FP8_MAX = 448.0
"""Largest finite e4m3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """`x @ matrix.T + bias`, as a kernel reads it."""

    kind: Kind
    data: torch.Tensor  # [out_features, in_features], or half as many bytes for int4
    scale: torch.Tensor | None  # fp8: [out_features]; int: [out_features, in_features / group]
    group: int
    """Inputs per scale; 0 where there is none."""

    bias: torch.Tensor | None
    in_features: int

    @property
    def out_features(self) -> int:
        return self.data.shape[0]

    @property
    def num_bytes(self) -> int:
        """What one product has to read."""
        tensors = (self.data, self.scale, self.bias)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack(
    weight: torch.Tensor, bias: torch.Tensor | None, *, kind: Kind, group: int | None = None
) -> Matrix:
    """Store `weight` [out_features, in_features] as `kind`, rounded to the nearest.

    A matrix whose inputs are no whole number of groups stays plain.
    """
    in_features = weight.shape[1]
    group = GROUPS.get(kind, 0) if group is None else group
    if group and in_features % group:
        kind, group = "plain", 0
    data, scale = weight.contiguous(), None
    if kind == "fp8":
        data, scale = _fp8(weight)
    elif kind != "plain":
        data, scale = _grouped(weight, group, 127 if kind == "int8" else 7)
        if kind == "int4":
            data = _two_per_byte(data, group)
    return Matrix(
        kind=kind,
        data=data,
        scale=scale,
        group=group,
        bias=bias,
        in_features=in_features,
    )


def unpack(matrix: Matrix) -> torch.Tensor:
    """[out_features, in_features], float32: what the matrix means."""
    if matrix.kind == "plain":
        return matrix.data.float()
    assert matrix.scale is not None
    if matrix.kind == "fp8":
        return matrix.data.float() * matrix.scale[:, None]
    values = matrix.data
    if matrix.kind == "int4":
        halves = values.view(matrix.out_features, -1, matrix.group // 2).int()
        values = torch.cat((halves & 15, halves >> 4), dim=-1).flatten(1) - 8
    grouped = values.float().view(matrix.out_features, -1, matrix.group)
    return (grouped * matrix.scale[:, :, None]).flatten(1)


def _fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_min(1e-12) / FP8_MAX
    return (weight / scale[:, None]).to(torch.float8_e4m3fn), scale


def _grouped(weight: torch.Tensor, group: int, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers in [-largest, largest], and the scale of each group."""
    grouped = weight.float().view(len(weight), -1, group)
    scale = grouped.abs().amax(dim=2).clamp_min(1e-12) / largest
    values = (grouped / scale[:, :, None]).round_().clamp_(-largest, largest)
    return values.to(torch.int8).flatten(1), scale


def _two_per_byte(values: torch.Tensor, group: int) -> torch.Tensor:
    low, high = (values + 8).to(torch.uint8).view(len(values), -1, 2, group // 2).unbind(2)
    return (low | (high << 4)).flatten(1)
