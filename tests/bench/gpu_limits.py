"""What the device can do at most, measured: bytes copied and operations multiplied per second."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REPEATS = 20
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Limits:
    copy_bytes_per_s: float
    """Read and written, each counted, by a large copy within the device."""

    matmul_flop_per_s: float
    """Of a large square product of random numbers, by the library."""


def measured(device: torch.device, *, is_tiny: bool) -> Limits:
    return Limits(copy_rate(device, is_tiny=is_tiny), matmul_rate(device, is_tiny=is_tiny))


def copy_rate(device: torch.device, *, is_tiny: bool) -> float:
    num_bytes = 1 << 24 if is_tiny else 4 << 30
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * num_bytes / median_s(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device, *, is_tiny: bool) -> float:
    size = 256 if is_tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in "ab")
    return 2 * size**3 / median_s(lambda: a @ b.T, device)


def median_s(work: Callable[[], object], device: torch.device, *, repeats: int = REPEATS) -> float:
    """Of `work` alone: by the device's events where it has any, else by the clock."""
    for _ in range(WARM_UPS):
        work()
    if device.type != "cuda":
        return statistics.median(_by_clock(work) for _ in range(repeats))
    pairs = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        work()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1000


def _by_clock(work: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
