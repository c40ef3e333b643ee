"""Whether a row's matrix product has the same bits alone and among others, on this machine.

The rest of a step keeps rows apart by how it is written. The products are a library's, which
takes other kernels on other CPUs; so each worker looks at its own, with its own weights.
"""

from typing import Protocol

import torch

from kvrelay.model.layers import padded_rows

BATCH_ROWS = (2, 5, 16)
"""Few, odd and many: libraries choose kernels by such sizes."""

LOOKED_AT = (0, 1, 4, 7, 15)
"""Rows that are computed alone as well."""

_BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Product(Protocol):
    """A `Linear`, or what stands in for it."""

    dtype: torch.dtype
    in_features: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...


def rows_vary(product: Product) -> bool:
    """Whether a row's company shows. A look at noise, not a proof."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(BATCH_ROWS), product.in_features, generator=generator)
    rows = noise.to(product.dtype)
    batches = [_bits(product, rows[:num_rows]) for num_rows in BATCH_ROWS]
    for i in LOOKED_AT:
        alone = _bits(product, rows[i : i + 1])[0]
        if any(i < len(batch) and not torch.equal(batch[i], alone) for batch in batches):
            return True
    return False


def _bits(product: Product, rows: torch.Tensor) -> torch.Tensor:
    """What `product` makes of each row, padded as a step pads."""
    num_missing = padded_rows(len(rows), product.dtype) - len(rows)
    padded = torch.cat((rows, rows[:1].expand(num_missing, -1)))
    return product(padded)[: len(rows)].view(_BITS[product.dtype])
