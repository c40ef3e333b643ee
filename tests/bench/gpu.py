"""Measures kvrelay on a CUDA device: `python -m tests.bench.gpu --out docs/results`.

    1. what the device can do: a copy, a product
    2. single products, then steps of decode and prefill, against those limits
    3. whole batches of requests, beside transformers' continuous batching on the same work

`--device cpu --tiny` goes the same way with the kernels' references on the CPU: it shows that
the benchmark works, and its figures mean nothing.
"""

import argparse
import gc
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from kvrelay.kernels.matrix import Kind
from kvrelay.kernels.ops import KERNELS, REFERENCES
from kvrelay.model.cuda_device import Cuda, Device, Stand, why_not_cuda
from tests.bench import gpu_limits, gpu_model, gpu_ours, gpu_report
from tests.bench.gpu_report import Batch, Report

CONTEXT_TOKENS = 1024
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LONG = ((1, 32_768), (8, 8192))
PROMPTS = (128, 512, 1024, 2048, 4096, 8192)
KINDS: tuple[Kind, ...] = ("plain", "fp8", "int8", "int4")
REQUESTS = ((1, 512, 128), (16, 512, 128), (64, 512, 128))
REPEATS = 5


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    reason = why_not_cuda() if args.device == "cuda" else None
    if reason is not None:
        sys.stderr.write(f"error: nothing to measure: {reason}\n")
        return 2
    if args.check:
        return 0
    is_tiny = args.tiny
    device = Cuda() if args.device == "cuda" else Stand()
    label, spec, weights = gpu_model.model_of(
        args.model, is_tiny=is_tiny, device=device.torch_device
    )
    report = Report(
        machine=machine(device),
        command=shlex.join(["python", "-m", "tests.bench.gpu", *argv]),
        model=label,
        limits=gpu_limits.measured(device.torch_device, is_tiny=is_tiny),
    )
    scale = 16 if is_tiny else 1  # of every length
    for kind in args.kinds:
        _measure_kind(report, spec, weights, device, kind, scale)
        _forget()
    _measure_library(report, spec, weights, args.device, scale)
    _measure_batches(report, spec, weights, device, scale, is_beside=not args.alone)
    files = gpu_report.write(report, args.out, device=args.name or slug(device))
    sys.stderr.write(f"wrote {', '.join(str(file) for file in files)}\n")
    return 0


def _measure_kind(report, spec, weights, device: Device, kind: Kind, scale: int) -> None:
    cases = [(batch, CONTEXT_TOKENS // scale) for batch in BATCHES]
    if kind == "plain":
        cases += [(batch, tokens // scale) for batch, tokens in LONG]
    longest = max(batch * (tokens + 64) for batch, tokens in cases)
    with gpu_ours.runner_of(spec, weights, device, kind=kind, num_tokens=longest) as (runner, _):
        if varying := runner.prove_rows():
            report.notes.append(f"{kind}: rows vary in {', '.join(varying)}")
        report.products += gpu_ours.products(
            runner,
            device,
            kind=kind,
            few=(1, 16, 64),
            many=(256 // scale, 2048 // scale) if kind == "plain" else (),
        )
        for batch, context_tokens in cases:
            report.decode.append(
                gpu_ours.decode(
                    runner,
                    batch=batch,
                    context_tokens=context_tokens,
                    params=gpu_ours.GREEDY,
                    kind=kind,
                )
            )
        if kind != "plain":
            return
        for batch in (min(BATCHES), max(BATCHES)):
            report.decode.append(
                gpu_ours.decode(
                    runner,
                    batch=batch,
                    context_tokens=CONTEXT_TOKENS // scale,
                    params=gpu_ours.SAMPLED,
                    kind=kind,
                )
            )
        _measure_prefill(report, runner, "tiles", scale)


def _measure_library(report, spec, weights, device: str, scale: int) -> None:
    """Prompts again, multiplied by the library in slabs of fixed size."""
    other: Device
    if device == "cuda":
        other = Cuda(gpu_ours.by_library(KERNELS))
    else:
        other = Stand(gpu_ours.by_library(REFERENCES))
    longest = max(PROMPTS) // scale + 64
    with gpu_ours.runner_of(spec, weights, other, kind="plain", num_tokens=longest) as (runner, _):
        if varying := runner.prove_rows():
            report.notes.append(f"library: rows vary in {', '.join(varying)}")
        _measure_prefill(report, runner, "library", scale)
    _forget()


def _measure_prefill(report, runner, product: str, scale: int) -> None:
    for num_tokens in PROMPTS:
        report.prefill.append(
            gpu_ours.prefill(
                runner, num_tokens=num_tokens // scale, product=product, repeats=REPEATS
            )
        )


def _measure_batches(report, spec, weights, device, scale: int, *, is_beside: bool) -> None:
    works = [(num, prompt // scale, output // scale) for num, prompt, output in REQUESTS]
    most = max(num * (prompt + output + 32) for num, prompt, output in works)
    prompts = [gpu_ours.request_prompts(spec, num, prompt) for num, prompt, _ in works]
    ours = []
    with gpu_ours.runner_of(spec, weights, device, kind="plain", num_tokens=most) as (runner, _):
        for asked, (_, _, output) in zip(prompts, works, strict=True):
            rates = [gpu_ours.throughput(runner, asked, output) for _ in range(REPEATS + 1)]
            ours.append(tuple(rates[1:]))
    del runner
    _forget()
    theirs = _theirs(spec, device, prompts, works) if is_beside else [()] * len(works)
    for work, our_rates, their_rates in zip(works, ours, theirs, strict=True):
        report.batches.append(Batch(*work, our_rates, their_rates))


def _theirs(spec, device: Device, prompts, works) -> list[tuple[float, ...]]:
    from tests.bench import gpu_theirs  # loading transformers takes a moment

    model = gpu_theirs.model_of(spec, device.torch_device)
    return [
        gpu_theirs.throughput(model, asked, output_tokens=output, repeats=REPEATS)
        for asked, (_, _, output) in zip(prompts, works, strict=True)
    ]


def _forget() -> None:
    """Give back what the last runner had; it is in cycles with its graphs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: Device) -> dict[str, object]:
    found: dict[str, object] = {"device": slug(device), "python": platform.python_version()}
    if device.torch_device.type == "cuda":
        properties = torch.cuda.get_device_properties(device.torch_device)
        found |= {
            "device": properties.name,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "CUDA": torch.version.cuda,
        }
    for package in ("torch", "triton", "transformers", "kvrelay"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def slug(device: Device) -> str:
    return device.name.partition("-triton")[0]


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short work")
    parser.add_argument("--model", type=Path, help="a directory with a checkpoint")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", help="of the files; the device's if not given")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--check", action="store_true", help="only whether there is a device")
    parser.add_argument("--alone", action="store_true", help="without transformers")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
