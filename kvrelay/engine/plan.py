"""What bounds a step, what a step is planned to be, and what it came to: plain values.

`Scheduler` decides them. A plan is written row by row, as a `Draft`, and does not change then.
"""

from dataclasses import dataclass, field

from kvrelay.engine.batch import Rows
from kvrelay.engine.request import ChunkDone, Emitted, Frozen, Granted
from kvrelay.engine.sequence import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """What bounds one step, and the line before it."""

    budget_tokens: int
    """Most rows in one step. Larger raises throughput, and the gap between tokens of
    whoever decodes beside a long prompt."""

    max_chunk_tokens: int
    """Most rows of one sequence in one step."""

    max_sequences: int
    """Most sequences in one step."""

    max_waiting: int
    """Sequences waiting for blocks before new ones are refused with QUEUE_FULL. Preempted
    ones, at most `max_sequences`, come on top."""

    def __post_init__(self) -> None:
        assert min(self.max_chunk_tokens, self.max_sequences, self.max_waiting) > 0, self
        # Every decoding sequence gets its row in every step.
        assert self.budget_tokens >= self.max_sequences, self


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Rows to compute now, one `Rows` per sequence, and grants made on the way."""

    sequences: tuple[Sequence, ...]
    rows: tuple[Rows, ...]
    granted: tuple[Granted, ...]
    withdrawn: tuple[str, ...]
    """Sequences on offer that were preempted for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What a computed step means."""

    emitted: tuple[Emitted, ...]
    chunks: tuple[ChunkDone, ...]
    frozen: tuple[Frozen, ...]


@dataclass(slots=True)
class Draft:
    """A plan being written."""

    budget_left: int
    sequences: list[Sequence] = field(default_factory=list)
    rows: list[Rows] = field(default_factory=list)
    withdrawn: list[str] = field(default_factory=list)

    def add(self, seq: Sequence, limit_tokens: int) -> None:
        rows = seq.next_rows(min(limit_tokens, self.budget_left))
        self.budget_left -= len(rows.token_ids)
        self.sequences.append(seq)
        self.rows.append(rows)
