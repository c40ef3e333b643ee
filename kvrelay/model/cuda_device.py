"""What the runner asks of a device, and a CPU that stands for one where there is none.

A `Tray` is how small things get there and back: the host fills one stretch of memory, one copy
brings it over, and whatever was captured reads it at the address it has always had.
"""

from collections.abc import Callable
from importlib.metadata import version
from typing import Protocol

import torch

from kvrelay.kernels.lang import HAS_TRITON
from kvrelay.kernels.ops import KERNELS, REFERENCES, Ops


class Tray:
    """Memory of one shape on both sides, page-locked on the host's."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        is_locked = device.type == "cuda"
        self.host = torch.zeros(num_words, dtype=torch.int32, pin_memory=is_locked)
        self.there = torch.zeros(num_words, dtype=torch.int32, device=device)
        self._sent = torch.cuda.Event() if is_locked else None

    def wait(self) -> None:
        """Until the host's side may be written again."""
        if self._sent is not None:
            self._sent.synchronize()

    def send(self) -> None:
        """Begin to copy the host's side over."""
        self.there.copy_(self.host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()


class Device(Protocol):
    """Where a forward pass runs. Work is done in the order it was launched."""

    @property
    def name(self) -> str:
        """Of the device and of what computes there: a part of the numerics' name."""
        ...

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def ops(self) -> Ops: ...

    def captured(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Something that does what `compute` does, with less to say to the device each time.

        `compute` reads from and writes to the same memory whenever it runs. What the result
        returns is overwritten by the next call of anything that was captured.
        """
        ...

    def synchronize(self) -> None:
        """Until all that was launched is done."""
        ...


class Stand:
    """The CPU with the kernels' references: for tests, and for reading along. Slow."""

    name = "references-on-cpu"
    torch_device = torch.device("cpu")

    def __init__(self, ops: Ops = REFERENCES) -> None:
        self.ops = ops

    def captured(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return compute

    def synchronize(self) -> None:
        """Nothing is ever under way."""


class Cuda:
    """The first CUDA device, with the kernels; used from one thread at a time."""

    def __init__(self, ops: Ops = KERNELS) -> None:
        assert why_not_cuda() is None
        self.ops = ops
        self.torch_device = torch.device("cuda", torch.cuda.current_device())
        self.name = f"{_slug(torch.cuda.get_device_name())}-{_triton_version()}"
        if ops is not KERNELS:
            self.name += f"-{ops.name}"
        self._pool = torch.cuda.graph_pool_handle()
        self._capturing = torch.cuda.Stream(self.torch_device)

    def captured(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Runs `compute` once, so that whatever must be compiled is, and then records it."""
        self._capturing.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._capturing):
            compute()
        torch.cuda.current_stream().wait_stream(self._capturing)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = compute()

        def replayed() -> torch.Tensor:
            graph.replay()
            return result

        return replayed

    def synchronize(self) -> None:
        torch.cuda.current_stream().synchronize()


def why_not_cuda() -> str | None:
    """What a CUDA device's worker lacks here; None if nothing."""
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} has no bfloat16 matrix units"
    if not HAS_TRITON:
        return "triton is not installed"
    return None


def _slug(text: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _triton_version() -> str:
    return f"triton{version('triton')}"
