"""One step of the model on the CPU: rows in, KV written, tokens out.

1. Generated tokens come first, longest first, then each run of prompt tokens, as one list
   of rows; index tensors are made once and serve every layer.
2. In each layer the KV of all rows is written before any row attends, so rows of one
   sequence may see each other, each up to its own position.
3. Only the last row of a run that samples reaches the head.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kvrelay.engine import batch as engine_batch
from kvrelay.engine.batch import Rows
from kvrelay.kv.cache import KvCache
from kvrelay.model import layers
from kvrelay.model.attention import (
    GenerationPlan,
    PagedAttention,
    PromptPlan,
    Slots,
    num_tiles_seen,
    slots_of,
)
from kvrelay.model.kv_rows import kv_suffix
from kvrelay.model.llama import Llama
from kvrelay.model.rows import rows_vary
from kvrelay.model.sampler import sample
from kvrelay.model.spec import ModelSpec
from kvrelay.model.warm_up import WARM_UP_ROWS, warm_up_steps
from kvrelay.model.weights import Weights

NUMERICS_VERSION = 1
"""Grows when the same weights and tokens would give other bits than before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """The rows of one step and everything the layers share."""

    token_ids: torch.Tensor  # [num_padded], int64
    positions: torch.Tensor  # [num_padded], int64
    num_rows: int
    write_slots: torch.Tensor  # [num_rows * 2]
    generation: GenerationPlan | None
    prompts: tuple[PromptPlan, ...]
    last_row: tuple[int, ...]
    """Where the last row of each of the batch's `Rows` is."""


class _Row(NamedTuple):
    position: int
    token_id: int
    run: int
    """Which of the batch's `Rows` it belongs to."""


class LlamaRunner:
    """Implements `kvrelay.engine.batch.Runner` on the CPU. Used from one thread."""

    def __init__(
        self, spec: ModelSpec, weights: Weights, cache: KvCache, *, num_threads: int
    ) -> None:
        num_slots = cache.num_blocks * cache.layout.block_size
        self.spec = spec
        self.layout = cache.layout
        self._model = Llama(
            spec, weights, num_positions=min(spec.max_position_embeddings, num_slots)
        )
        self._attention = PagedAttention(spec, cache)
        self._num_blocks = cache.num_blocks
        self._dtype = weights.dtype
        self.numerics = self._named(rows_vary=False)
        torch.set_num_threads(num_threads)

    @torch.inference_mode()
    def step(self, batch: Sequence[Rows]) -> list[int | None]:
        """See `Runner.step`.

        Raises:
            FloatingPointError: logits of rows that sample are not finite.
        """
        rows = [i for i, run in enumerate(batch) if run.sample is not None]
        logits = self._logits(batch, rows)
        params = [p for p in (run.sample for run in batch) if p is not None]
        positions = [batch[i].start + len(batch[i].token_ids) for i in rows]
        sampled = dict(zip(rows, sample(logits, params, positions), strict=True))
        return [sampled.get(i) for i in range(len(batch))]

    @torch.inference_mode()
    def step_logits(self, batch: Sequence[Rows]) -> torch.Tensor:
        """As `step`, but the logits of every run's last row: [len(batch), vocab_size]."""
        return self._logits(batch, range(len(batch)))

    def warm_up(self) -> None:
        """Run tiny steps through both paths, so that the first request finds the code warm.

        Writes to the first blocks, so call it before they hold anything.
        """
        steps = warm_up_steps(
            self.layout,
            num_rows=WARM_UP_ROWS,
            num_blocks=self._num_blocks,
            num_positions=self.spec.max_position_embeddings,
            vocab_size=self.spec.vocab_size,
        )
        for rows in steps:
            self.step([rows])

    @torch.inference_mode()
    def prove_rows(self) -> tuple[str, ...]:
        """The products in which a row's bits depend on its company here; none, as a rule.

        Where there is one, `numerics` says so: this worker's tokens may depend on its load, and
        it is nobody's peer whose tokens do not.
        """
        products = self._model.products
        varying = tuple(name for name, product in products.items() if rows_vary(product))
        self.numerics = self._named(rows_vary=bool(varying))
        return varying

    def _named(self, *, rows_vary: bool) -> str:
        dtype = str(self._dtype).removeprefix("torch.")
        return numerics_name(dtype, kv_dtype=self.layout.dtype, rows_vary=rows_vary)

    def _logits(self, batch: Sequence[Rows], indexes: Sequence[int]) -> torch.Tensor:
        """Float32 logits of the last row of each of `indexes`, its KV and all others' written."""
        if not batch:
            return torch.empty(0, self.spec.vocab_size)
        plan = self._plan(batch)
        hidden = self._model.hidden(plan.token_ids, plan.positions, _Paged(self._attention, plan))
        if not indexes:
            return torch.empty(0, self.spec.vocab_size)
        wanted = [plan.last_row[i] for i in indexes]
        wanted += wanted[:1] * (layers.padded_rows(len(wanted), self._dtype) - len(wanted))
        logits = self._model.logits(hidden.index_select(0, torch.tensor(wanted)))
        return _finite(logits[: len(indexes)])

    def _plan(self, batch: Sequence[Rows]) -> StepPlan:
        generated = sorted(
            (
                _Row(run.start + offset, token_id, i)
                for i, run in enumerate(batch)
                if run.path is engine_batch.Path.GENERATION
                for offset, token_id in enumerate(run.token_ids)
            ),
            key=lambda row: num_tiles_seen(row.position),
            reverse=True,
        )
        prompted = [
            _Row(run.start + offset, token_id, i)
            for i, run in enumerate(batch)
            if run.path is engine_batch.Path.PROMPT
            for offset, token_id in enumerate(run.token_ids)
        ]
        rows = generated + prompted
        row_of = {(row.run, row.position): at for at, row in enumerate(rows)}
        last_row = [row_of[i, run.start + len(run.token_ids) - 1] for i, run in enumerate(batch)]
        padding = [0] * (layers.padded_rows(len(rows), self._dtype) - len(rows))
        return StepPlan(
            token_ids=torch.tensor([*(row.token_id for row in rows), *padding]),
            positions=torch.tensor([*(row.position for row in rows), *padding]),
            num_rows=len(rows),
            write_slots=self._attention.write_slots(self._slots(batch, rows)),
            generation=self._plan_generation(batch, generated),
            prompts=tuple(
                self._attention.plan_prompt(
                    run.block_table,
                    start=run.start,
                    num_rows=len(run.token_ids),
                    first=row_of[i, run.start],
                )
                for i, run in enumerate(batch)
                if run.path is engine_batch.Path.PROMPT
            ),
            last_row=tuple(last_row),
        )

    def _plan_generation(
        self, batch: Sequence[Rows], rows: Sequence[_Row]
    ) -> GenerationPlan | None:
        if not rows:
            return None
        return self._attention.plan_generation(
            [batch[row.run].block_table for row in rows], [row.position for row in rows]
        )

    def _slots(self, batch: Sequence[Rows], rows: Sequence[_Row]) -> Slots:
        """Where the K of each row goes, in layer 0."""
        slots = np.empty(len(rows), dtype=np.int64)
        runs = np.fromiter((row.run for row in rows), dtype=np.int64, count=len(rows))
        positions = np.fromiter((row.position for row in rows), dtype=np.int64, count=len(rows))
        for i, run in enumerate(batch):
            ours = runs == i
            slots[ours] = slots_of(self.layout, run.block_table, positions[ours])
        return slots


class _Paged:
    """`Attend` for one step."""

    def __init__(self, attention: PagedAttention, plan: StepPlan) -> None:
        self._attention = attention
        self._plan = plan

    def __call__(self, layer: int, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        plan = self._plan
        self._attention.write(layer, plan.write_slots, kv[: plan.num_rows])
        parts: list[torch.Tensor] = []
        if plan.generation is not None:
            rows = q[: plan.generation.num_rows]
            parts.append(self._attention.generation(layer, rows, plan.generation))
        parts += [
            self._attention.prompt(layer, q[prompt.first : prompt.last], prompt)
            for prompt in plan.prompts
        ]
        if plan.num_rows < len(q):
            parts.append(torch.zeros_like(q[plan.num_rows :]))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def numerics_name(dtype: str, *, kv_dtype: str, rows_vary: bool = False) -> str:
    """Names the numeric paths of this runner: equal names and inputs, equal bits.

    Unless rows vary: then only near, and the name makes no secret of it.
    """
    name = f"cpu-{dtype}-v{NUMERICS_VERSION}" + kv_suffix(kv_dtype, dtype)
    return name + ("-rows-vary" if rows_vary else "")


def _finite(logits: torch.Tensor) -> torch.Tensor:
    bad = int((~torch.isfinite(logits).all(dim=-1)).sum())
    if bad:
        raise FloatingPointError(f"logits of {bad} of {len(logits)} rows are not finite")
    return logits
