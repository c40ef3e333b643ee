"""A model without tensors that checks whoever schedules it.

Its "KV" of a token is a digest chained over every token and numeric path before it, kept
per block and slot. A step reads its whole context back through the block table, so a
wrong table, a stale block, a slot never written or a token computed by the wrong path
fails an assertion or changes the tokens. `expected_tokens` says what they must be.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.engine.batch import Path, Rows
from kvrelay.types import BlockId

VOCAB_SIZE = 997
_MASK = (1 << 61) - 1


@dataclass(frozen=True, slots=True)
class Slot:
    """The fake KV of one token."""

    position: int
    token_id: int
    path: Path
    digest: int


def _chain(digest: int, token_id: int, path: Path) -> int:
    return hash((digest, token_id, path is Path.PROMPT)) & _MASK


def expected_tokens(
    prompt_ids: Sequence[int], num_tokens: int, *, vocab_size: int = VOCAB_SIZE
) -> tuple[int, ...]:
    """What the scripted model generates after `prompt_ids`, whatever the scheduling."""
    digest = 0
    for token_id in prompt_ids:
        digest = _chain(digest, token_id, Path.PROMPT)
    outputs: list[int] = []
    for _ in range(num_tokens):
        outputs.append(digest % vocab_size)
        digest = _chain(digest, outputs[-1], Path.GENERATION)
    return tuple(outputs)


class StepGate:
    """Holds a model inside its steps, so that a test can act in the middle of one."""

    def __init__(self) -> None:
        self._entered = threading.Semaphore(0)
        self._passes = threading.Semaphore(0)
        self._is_open = threading.Event()

    def wait_entered(self, timeout_s: float = 10.0) -> None:
        """Wait until one more step has begun."""
        assert self._entered.acquire(timeout=timeout_s), "no step began"

    def let_one_pass(self) -> None:
        self._passes.release()

    def open(self) -> None:
        """Hold no step any more."""
        self._is_open.set()
        self._passes.release()

    def pass_through(self, timeout_s: float = 10.0) -> None:
        """Called by the model."""
        self._entered.release()
        if not self._is_open.is_set():
            assert self._passes.acquire(timeout=timeout_s), "the gate stayed shut"


class ScriptedModel:
    """A `Runner`. See the module."""

    def __init__(
        self, *, block_size: int, vocab_size: int = VOCAB_SIZE, gate: StepGate | None = None
    ) -> None:
        self.num_steps = 0
        self.num_rows = 0
        self.most_rows = 0
        self.most_sequences = 0
        self.fail_with: BaseException | None = None
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._gate = gate
        self._slots: dict[tuple[BlockId, int], Slot] = {}

    def step(self, batch: Sequence[Rows]) -> list[int | None]:
        if self._gate is not None:
            self._gate.pass_through()
        if self.fail_with is not None:
            raise self.fail_with
        num_rows = sum(len(rows.token_ids) for rows in batch)
        self.num_steps += 1
        self.num_rows += num_rows
        self.most_rows = max(self.most_rows, num_rows)
        self.most_sequences = max(self.most_sequences, len(batch))
        written: set[tuple[BlockId, int]] = set()
        return [self._compute(rows, written) for rows in batch]

    def land(
        self, block_table: Sequence[BlockId], prompt_ids: Sequence[int], *, first_block: int = 0
    ) -> None:
        """Write a prompt's KV from `first_block` on, as a transport would."""
        digest = 0
        for position, token_id in enumerate(prompt_ids):
            digest = _chain(digest, token_id, Path.PROMPT)
            if position // self._block_size >= first_block:
                slot = Slot(position, token_id, Path.PROMPT, digest)
                self._slots[self._place(block_table, position)] = slot

    def copy_block(self, source: "ScriptedModel", source_block: BlockId, target: BlockId) -> None:
        """Take over another model's block, unwritten slots included."""
        for i in range(self._block_size):
            self._slots.pop((target, i), None)
            if (slot := source._slots.get((source_block, i))) is not None:
                self._slots[target, i] = slot

    def _compute(self, rows: Rows, written: set[tuple[BlockId, int]]) -> int | None:
        assert rows.token_ids, "a row without tokens"
        digest = self._read(rows)
        for i, token_id in enumerate(rows.token_ids):
            place = self._place(rows.block_table, rows.start + i)
            assert place not in written, f"{place} is written twice in one step"
            written.add(place)
            digest = _chain(digest, token_id, rows.path)
            self._slots[place] = Slot(rows.start + i, token_id, rows.path, digest)
        return None if rows.sample is None else digest % self._vocab_size

    def _read(self, rows: Rows) -> int:
        """Prove that every slot before `rows` holds this context; returns its digest."""
        digest, path = 0, Path.PROMPT
        for position in range(rows.start):
            place = self._place(rows.block_table, position)
            slot = self._slots.get(place)
            assert slot is not None, f"{place} was never written"
            assert slot.position == position, (place, slot, position)
            assert path is Path.PROMPT or slot.path is path, f"a prompt token after {position}"
            path = slot.path
            digest = _chain(digest, slot.token_id, slot.path)
            assert slot.digest == digest, f"{place} belongs to another prefix"
        return digest

    def _place(self, block_table: Sequence[BlockId], position: int) -> tuple[BlockId, int]:
        return block_table[position // self._block_size], position % self._block_size
