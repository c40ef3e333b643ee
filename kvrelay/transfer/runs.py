"""Neighbouring ranges, moved as one."""

from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.transfer.base import BlockCopy


@dataclass(frozen=True, slots=True)
class Run:
    """`num_bytes` at the holder that become as many here."""

    source_offset: int
    target_offset: int
    num_bytes: int


def runs_of(copies: Sequence[BlockCopy], *, max_bytes: int) -> list[Run]:
    """`copies` in order, neighbours on both sides joined while a run has at most `max_bytes`."""
    runs: list[Run] = []
    for copy in copies:
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.num_bytes + copy.num_bytes <= max_bytes
            and copy.source_offset == last.source_offset + last.num_bytes
            and copy.target_offset == last.target_offset + last.num_bytes
        ):
            num_bytes = last.num_bytes + copy.num_bytes
            runs[-1] = Run(last.source_offset, last.target_offset, num_bytes)
        else:
            runs.append(Run(copy.source_offset, copy.target_offset, copy.num_bytes))
    return runs
