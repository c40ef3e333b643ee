"""Where time went on an engine: per sequence, and over the last steps. Given times, never asks."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from kvrelay.engine.batch import Path, Rows
from kvrelay.engine.request import SequenceTiming

NUM_RECENT_STEPS = 64


@dataclass(slots=True)
class _Lap:
    queued_s: float
    first_step_s: float | None = None


class Stopwatch:
    """Times each sequence from its arrival to its first sampled token."""

    def __init__(self) -> None:
        self._laps: dict[str, _Lap] = {}

    def queue(self, seq_id: str, now_s: float) -> None:
        """Start, or start again: a landed sequence queues from its join."""
        self._laps[seq_id] = _Lap(now_s)

    def forget(self, seq_id: str) -> None:
        self._laps.pop(seq_id, None)

    def begin_step(self, seq_ids: Iterable[str], now_s: float) -> None:
        for seq_id in seq_ids:
            lap = self._laps.get(seq_id)
            if lap is not None and lap.first_step_s is None:
                lap.first_step_s = now_s

    def emit(self, seq_id: str, now_s: float, *, num_cached_tokens: int) -> SequenceTiming | None:
        """Stop at the first token; None for every later one."""
        lap = self._laps.pop(seq_id, None)
        if lap is None:
            return None
        assert lap.first_step_s is not None, "a token came before its step"
        return SequenceTiming(
            seq_id=seq_id,
            queue_s=lap.first_step_s - lap.queued_s,
            prefill_s=now_s - lap.first_step_s,
            num_cached_tokens=num_cached_tokens,
        )


class StepMeter:
    """Speed over the last steps."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque(maxlen=NUM_RECENT_STEPS)

    def record(self, rows: Iterable[Rows], elapsed_s: float) -> None:
        num_prompt_tokens = sum(len(r.token_ids) for r in rows if r.path is Path.PROMPT)
        self._steps.append((elapsed_s, num_prompt_tokens))

    @property
    def step_s(self) -> float:
        """Median step lately; 0 before the first."""
        return median(elapsed_s for elapsed_s, _ in self._steps) if self._steps else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Over the recent steps that had prompt tokens; 0 if none had."""
        prefills = [step for step in self._steps if step[1] > 0]
        elapsed_s = sum(step[0] for step in prefills)
        return sum(step[1] for step in prefills) / elapsed_s if elapsed_s > 0 else 0.0
