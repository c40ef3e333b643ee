"""The seam between the engine and whatever computes: one step's work, and its answer.

The scheduler speaks of sequences, the device of rows. A `Rows` is a run of consecutive
tokens of one sequence: a chunk of its prompt, or generated tokens (one while it decodes,
several while it is replayed). A token's KV is always computed by the path of its kind,
so the same token gives the same bytes whoever recomputes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from kvrelay.types import BlockId, SamplingParams


class Path(Enum):
    """Which numeric path computes a token: decided by what the token is, never by load."""

    PROMPT = auto()
    GENERATION = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Consecutive tokens of one sequence, positions `[start, start + len(token_ids))`."""

    path: Path
    token_ids: tuple[int, ...]
    start: int
    block_table: Sequence[BlockId]
    """Covers at least `start + len(token_ids)` slots; KV before `start` is in place."""

    sample: SamplingParams | None
    """Given when the last row's logits choose the token at `start + len(token_ids)`."""


class Runner(Protocol):
    """Computes steps on one device. Called from the engine's thread only."""

    def step(self, batch: Sequence[Rows]) -> list[int | None]:
        """Write the KV of every row and sample where asked.

        Returns one entry per `Rows`: the sampled token id, or None where `sample` is None.
        A row's result does not depend on the other rows of the batch.
        """
        ...
