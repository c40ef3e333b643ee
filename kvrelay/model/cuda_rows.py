"""Whether a row's product has the same bits alone and among others, on this device.

The kernels are written so that it has; compilers and matrix units are looked at, not trusted.
Each worker looks once, with its own weights. A look at noise, not a proof.
"""

from collections.abc import Callable

import torch

from kvrelay.kernels.few_rows import MAX_ROWS, num_parts
from kvrelay.kernels.ops import Ops
from kvrelay.model.cuda_weights import DeviceWeights, Product

FEW = (1, 2, 5, 16, 17, 33, 64, MAX_ROWS)
MANY = (1, 5, 64, 130)
"""Sizes of batches: one, odd, and on both sides of every size of tile."""

Multiply = Callable[[torch.Tensor], torch.Tensor]


def varying_of_few(weights: DeviceWeights, ops: Ops, *, rows_tile: int = 0) -> tuple[str, ...]:
    """Names of the generation path's products in which company shows: of those of the first
    layer, and the head.
    """
    sizes = tuple(size for size in FEW if size <= (rows_tile or MAX_ROWS))
    return tuple(
        f"generation {name}"
        for name, product in _products(weights).items()
        if _varies(_few(product, ops, rows_tile), product, sizes)
    )


def varying_of_many(weights: DeviceWeights, ops: Ops) -> tuple[str, ...]:
    """As `varying_of_few`, of the prompt path."""
    return tuple(
        f"prompt {name}"
        for name, product in _products(weights).items()
        if _varies(_many(product, ops), product, MANY)
    )


def _products(weights: DeviceWeights) -> dict[str, Product]:
    layer = weights.layers[0]
    return {
        "qkv": layer.qkv,
        "out": layer.out,
        "gate_up": layer.gate_up,
        "down": layer.down,
        "head": weights.head,
    }


def _varies(multiply: Multiply, product: Product, sizes: tuple[int, ...]) -> bool:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(sizes), product.in_features, generator=generator)
    rows = noise.to(product.prompt.device, product.prompt.dtype)
    whole = multiply(rows)
    for size in sizes:
        # At the front of the batch, and at its end.
        for first in (0, max(sizes) - size):
            if not torch.equal(multiply(rows[first : first + size]), whole[first : first + size]):
                return True
    return False


def _few(product: Product, ops: Ops, rows_tile: int) -> Multiply:
    matrix = product.generation

    def multiply(x: torch.Tensor) -> torch.Tensor:
        shape = (num_parts(matrix), len(x), matrix.out_features)
        out = torch.empty(shape, dtype=torch.float32, device=x.device)
        ops.few_rows(x, matrix, out=out, rows_tile=rows_tile)
        return out.transpose(0, 1)

    return multiply


def _many(product: Product, ops: Ops) -> Multiply:
    def multiply(x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(len(x), product.out_features)
        ops.many_rows(x, product.prompt, product.bias, out=out)
        return out

    return multiply
