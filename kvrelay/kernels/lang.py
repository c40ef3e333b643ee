"""Triton where it is installed, and names that stand for it where it is not.

So every module of this package can be imported on any machine: its references need torch
alone, its kernels need Triton when they are launched.
"""

from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["HAS_TRITON", "jit", "power_of_2", "powers_of_2", "tl"]

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError:  # a machine without it computes with the references

    class _Absent:
        """Annotations of kernels name Triton's types when they are defined."""

        constexpr = object

    triton, tl = None, _Absent()
    HAS_TRITON = False


def jit(*, varying: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a kernel of a function; it is compiled when it is first launched.

    Args:
        varying: integers that change from launch to launch. The code does not depend on what
            they happen to be divisible by, so no launch waits for a compiler once it is warm.
    """

    def made(function: Callable[..., Any]) -> Any:
        if not HAS_TRITON:
            return _Missing(function.__name__)
        return triton.jit(function, do_not_specialize=list(varying))

    return made


class _Missing:
    """Stands for a kernel that nobody can launch."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: object) -> Any:
        raise RuntimeError(f"kernel {self._name} needs triton, which is not installed")


def power_of_2(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def powers_of_2(last: int) -> list[int]:
    """1, 2, 4, ... up to `last` at most."""
    return [1 << i for i in range(last.bit_length())]
