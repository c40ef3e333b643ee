"""Tries other tiles for the products: `python -m tests.bench.gpu_sweep`.

What is fastest belongs into the constants of `few_rows` and `many_rows`, with a new
`NUMERICS_VERSION`: nothing is chosen while serving, because another tile sums in another order.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Iterator

import torch

from kvrelay.kernels import few_rows, many_rows
from kvrelay.kernels.lang import HAS_TRITON
from kvrelay.kernels.matrix import Kind, pack
from kvrelay.kernels.ops import Op
from kvrelay.model.cuda_device import Cuda, Device, Stand, why_not_cuda
from tests.bench.gpu_limits import median_s

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}

FEW = {
    "BLOCK_N": (32, 64, 128),
    "BLOCK_K": (64, 128),
    "ENOUGH_PROGRAMS": (128, 256, 512),
    "MAX_STAGES": (4, 8),
}
MANY = {
    "BLOCK_M": (64, 128),
    "BLOCK_N": (128, 256),
    "BLOCK_K": (32, 64),
    "NUM_STAGES": (3, 4),
    "NUM_WARPS": (4, 8),
}
TOO_LARGE: tuple[type[Exception], ...] = (RuntimeError,)
"""How a tile that does not fit shows."""

if HAS_TRITON:
    from triton.errors import TritonError

    TOO_LARGE = (RuntimeError, TritonError)

COPIES = 8
"""Of each matrix, in turn, so that none is found in a cache."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu_sweep", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--kind", choices=("plain", "fp8", "int8", "int4"), default="plain")
    parser.add_argument("--few", type=int, nargs="*", default=[1, 64], help="rows")
    parser.add_argument("--many", type=int, nargs="*", default=[512, 4096], help="rows")
    parser.add_argument("--shrink", type=int, default=1, help="divide every size by this")
    args = parser.parse_args(argv)
    reason = why_not_cuda() if args.device == "cuda" else None
    if reason is not None:
        sys.stderr.write(f"error: nothing to measure: {reason}\n")
        return 2
    device = Cuda() if args.device == "cuda" else Stand()
    for name, (out_features, in_features) in SHAPES.items():
        shape = out_features // args.shrink, in_features // args.shrink
        for num_rows in args.few:
            _sweep(
                f"few {name}",
                few_rows,
                FEW,
                lambda n=num_rows, s=shape: _few(device, args.kind, n, s),
            )
        for num_rows in args.many:
            _sweep(f"many {name}", many_rows, MANY, lambda n=num_rows, s=shape: _many(device, n, s))
    return 0


def _sweep(name: str, module, options: dict[str, tuple[int, ...]], measure) -> None:
    found = []
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        with _set(module, chosen):
            try:
                found.append((measure(), chosen))
            except TOO_LARGE as error:
                found.append(((float("inf"), type(error).__name__), chosen))
    for (product_s, said), chosen in sorted(found, key=lambda each: each[0][0])[:5]:
        sys.stdout.write(f"{name:14} {said:32} {product_s * 1e6:8.1f} us  {chosen}\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _set(module, chosen: dict[str, int]) -> Iterator[None]:
    before = {name: getattr(module, name) for name in chosen}
    try:
        for name, value in chosen.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def _few(device: Device, kind: Kind, num_rows: int, shape: tuple[int, int]) -> tuple[float, str]:
    matrices = [pack(weight, None, kind=kind) for weight in _matrices(device, shape)]
    x = torch.randn(num_rows, shape[1], device=device.torch_device).to(_dtype_on(device))
    out = torch.empty(
        few_rows.num_parts(matrices[0]), num_rows, shape[0], device=device.torch_device
    )
    op: Op = device.ops.few_rows

    def all_of_them() -> torch.Tensor:
        for matrix in matrices:
            op(x, matrix, out=out)
        return out

    product_s = median_s(device.captured(all_of_them), device.torch_device) / COPIES
    return product_s, f"{num_rows} rows, {matrices[0].num_bytes / product_s / 1e12:.2f} TB/s"


def _many(device: Device, num_rows: int, shape: tuple[int, int]) -> tuple[float, str]:
    weights = _matrices(device, shape)
    x = torch.randn(num_rows, shape[1], device=device.torch_device).to(_dtype_on(device))
    out = x.new_empty(num_rows, shape[0])

    def all_of_them() -> torch.Tensor:
        for weight in weights:
            device.ops.many_rows(x, weight, None, out=out)
        return out

    product_s = median_s(all_of_them, device.torch_device) / COPIES
    flop = 2 * num_rows * shape[0] * shape[1]
    return product_s, f"{num_rows} rows, {flop / product_s / 1e12:.0f} TFLOP/s"


def _matrices(device: Device, shape: tuple[int, int]) -> list[torch.Tensor]:
    dtype = _dtype_on(device)
    return [torch.randn(shape, device=device.torch_device).to(dtype) for _ in range(COPIES)]


def _dtype_on(device: Device) -> torch.dtype:
    return torch.bfloat16 if device.torch_device.type == "cuda" else torch.float32


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
