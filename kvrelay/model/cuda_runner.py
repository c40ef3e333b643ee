"""One step of the model on a CUDA device: rows in, KV written, tokens out.

1. Prompt rows go first, as one list of any length: products are tiles of fixed shape, whose
   sums do not depend on the length, so nothing is padded.
2. Generated rows go in buckets of rows and key splits, each recorded once as a CUDA graph.
3. Tokens are chosen on the device; inputs and tokens travel through page-locked memory. The step
   waits once, at its end: its KV is then there for whoever copies it, in whichever stream.

Every kernel keeps rows apart by how it is written: tiles and splits follow from a row's own
position and from the model, never from the batch. The compiler and the matrix units have a say
in that too, so `prove_rows` looks; where it finds a row's bits to depend on its company,
`numerics` says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from kvrelay.engine.batch import Path, Rows
from kvrelay.kernels.few_rows import MAX_ROWS
from kvrelay.kernels.generation_attention import SPLIT
from kvrelay.kernels.lang import power_of_2, powers_of_2
from kvrelay.kernels.matrix import Kind
from kvrelay.kernels.sampling import NOT_FINITE
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.model.cuda_device import Device
from kvrelay.model.cuda_forward import Forward
from kvrelay.model.cuda_rows import varying_of_few, varying_of_many
from kvrelay.model.cuda_steps import (
    Bucket,
    ChoiceTray,
    GenerationRow,
    GenerationStep,
    PromptStep,
    bucket_of,
    slices,
)
from kvrelay.model.cuda_weights import device_weights
from kvrelay.model.spec import ModelSpec
from kvrelay.model.warm_up import WARM_UP_ROWS, warm_up_steps
from kvrelay.model.weights import Weights

NUMERICS_VERSION = 1
"""Grows when the same weights and tokens would give other bits than before."""

FIXED_TILE = 64
"""Rows of every product of few, where tiles of other sizes are found to sum otherwise."""

WARM_UP_SPLITS = 8
"""Buckets of up to so many splits are recorded before the first request; longer ones on demand."""


class CudaRunner:
    """Implements `kvrelay.engine.batch.Runner` on a CUDA device. Used from one thread."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        cache: DeviceCache,
        device: Device,
        *,
        kind: Kind = "plain",
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.spec = spec
        self.layout = cache.layout
        self._cache = cache
        self._device = device
        self._kind: Kind = kind
        self._max_rows = min(max_rows, MAX_ROWS)
        self._rows_tile = 0
        self._num_positions = min(
            spec.max_position_embeddings, cache.num_blocks * cache.layout.block_size
        )
        self.weights = device_weights(
            spec,
            weights,
            kind=kind,
            num_positions=self._num_positions,
            device=device.torch_device,
        )
        self._forward = self._make_forward()
        self._recorded: dict[Bucket, _Recorded] = {}
        self.numerics = self._numerics(rows_vary=False)

    @torch.inference_mode()
    def step(self, batch: Sequence[Rows]) -> list[int | None]:
        """See `Runner.step`.

        Raises:
            FloatingPointError: logits of rows that sample are not finite.
        """
        launched = [
            (part.runs, part.sampling.fetched()) for part in self._launch(batch, everyone=False)
        ]
        self._device.synchronize()
        tokens: list[int | None] = [None] * len(batch)
        for runs, chosen in launched:
            # A bucket may have more rows than were asked for.
            for run, token in zip(runs, chosen.tolist(), strict=False):
                if run is not None and batch[run].sample is not None:
                    tokens[run] = token
        return _finite(tokens)

    @torch.inference_mode()
    def step_logits(self, batch: Sequence[Rows]) -> torch.Tensor:
        """As `step`, but the logits of every run's last row: [len(batch), vocab_size]."""
        logits = torch.empty(len(batch), self.spec.vocab_size)
        for part in self._launch(batch, everyone=True):
            found = part.logits.cpu()
            for row, run in enumerate(part.runs):
                if run is not None:
                    logits[run] = found[row]
        self._device.synchronize()
        return logits

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile, and record the buckets that most requests are in.

        Writes to the first blocks, so call it before they hold anything.
        """
        steps = warm_up_steps(
            self.layout,
            num_rows=WARM_UP_ROWS,
            num_blocks=self._cache.num_blocks,
            num_positions=self.spec.max_position_embeddings,
            vocab_size=self.spec.vocab_size,
        )
        for rows in steps:
            self.step([rows])
        self._forward.warm_up()
        longest = power_of_2(-(-self._num_positions // SPLIT))
        for num_rows in powers_of_2(power_of_2(self._max_rows)):
            for num_splits in powers_of_2(min(longest, WARM_UP_SPLITS)):
                self._recorded_for(Bucket(num_rows, num_splits))
        self._device.synchronize()

    @torch.inference_mode()
    def prove_rows(self) -> tuple[str, ...]:
        """The products in which a row's bits depend on its company here; none, as a rule.

        Should it show among few rows, where products come in several sizes, one size is used for
        all from now on: slower for few, and another set of numerics. Where company shows all the
        same, `numerics` says so: this worker's tokens may depend on its load, and it is nobody's
        peer whose tokens do not.
        """
        ops = self._device.ops
        varying = varying_of_few(self.weights, ops)
        if varying:
            fixed = varying_of_few(self.weights, ops, rows_tile=FIXED_TILE)
            if not fixed:
                self._fix_tile()
            varying = fixed
        varying += varying_of_many(self.weights, ops)
        self.numerics = self._numerics(rows_vary=bool(varying))
        return varying

    def _fix_tile(self) -> None:
        """Multiply few rows by one size of tile, however few they are."""
        self._rows_tile = FIXED_TILE
        self._max_rows = min(self._max_rows, FIXED_TILE)
        self._forward = self._make_forward()
        was_warm, self._recorded = bool(self._recorded), {}
        if was_warm:
            self.warm_up()

    def _make_forward(self) -> Forward:
        return Forward(
            self.spec,
            self.weights,
            self._cache.on_device,
            self._device.ops,
            rows_tile=self._rows_tile,
        )

    def _numerics(self, *, rows_vary: bool) -> str:
        """Equal names and inputs, equal bits; unless rows vary, then only near."""
        parts = ["cuda", self._device.name, self.layout.dtype]
        if self._kind != "plain":
            parts.append(f"generation-{self._kind}")
        if self._rows_tile:
            parts.append(f"tile-{self._rows_tile}")
        parts.append(f"v{NUMERICS_VERSION}")
        return "-".join(parts) + ("-rows-vary" if rows_vary else "")

    def _launch(self, batch: Sequence[Rows], *, everyone: bool) -> Iterator["_Launched"]:
        """Launch a step part by part. A part's logits last until the next part is asked for.

        Args:
            batch: the step.
            everyone: whether runs that do not sample have logits too.
        """
        prompts = [i for i, run in enumerate(batch) if run.path is Path.PROMPT]
        if prompts:
            yield self._launch_prompts(batch, prompts, everyone=everyone)
        generated = [
            GenerationRow(
                token_id=token_id,
                position=run.start + offset,
                block_table=run.block_table,
                run=i if offset == len(run.token_ids) - 1 else None,
                sample=run.sample,
            )
            for i, run in enumerate(batch)
            if run.path is Path.GENERATION
            for offset, token_id in enumerate(run.token_ids)
        ]
        for rows in slices(generated, max_rows=self._rows_tile or MAX_ROWS):
            recorded = self._recorded_for(bucket_of(rows))
            recorded.step.send(rows)
            logits = recorded.compute()
            yield _Launched([row.run for row in rows], recorded.step.sampling, logits)

    def _launch_prompts(
        self, batch: Sequence[Rows], prompts: Sequence[int], *, everyone: bool
    ) -> "_Launched":
        runs = [batch[i] for i in prompts]
        ends = list(accumulate(len(run.token_ids) for run in runs))
        wanted = [at for at, run in enumerate(runs) if everyone or run.sample is not None]
        step = PromptStep(
            [(run.token_ids, run.start, run.block_table) for run in runs],
            [
                (ends[at] - 1, runs[at].sample, runs[at].start + len(runs[at].token_ids))
                for at in wanted
            ],
            block_size=self.layout.block_size,
            device=self._device.torch_device,
        )
        logits = self._forward.prompt(step.rows, step.tiles, step.last_rows)
        if wanted:
            self._device.ops.sample(logits, step.sampling.choices, out=step.sampling.chosen)
        return _Launched([prompts[at] for at in wanted], step.sampling, logits)

    def _recorded_for(self, bucket: Bucket) -> "_Recorded":
        recorded = self._recorded.get(bucket)
        if recorded is None:
            recorded = self._recorded[bucket] = self._record(bucket)
        return recorded

    def _record(self, bucket: Bucket) -> "_Recorded":
        """Compiles what it needs; takes moments, and memory for the bucket's inputs."""
        step = GenerationStep(
            bucket, block_size=self.layout.block_size, device=self._device.torch_device
        )
        step.send([])

        def compute() -> torch.Tensor:
            logits = self._forward.generation(step.rows, num_splits=bucket.num_splits)
            self._device.ops.sample(logits, step.sampling.choices, out=step.sampling.chosen)
            return logits

        return _Recorded(step, self._device.captured(compute))


@dataclass(frozen=True, slots=True)
class _Launched:
    """Part of a step, under way."""

    runs: Sequence[int | None]
    """Of each row of `logits`: which of the batch's `Rows` it is the last of, if of any."""

    sampling: ChoiceTray
    logits: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Recorded:
    """One bucket, ready to go."""

    step: GenerationStep
    compute: Callable[[], torch.Tensor]


def _finite(tokens: list[int | None]) -> list[int | None]:
    bad = tokens.count(NOT_FINITE)
    if bad:
        raise FloatingPointError(f"logits of {bad} of {len(tokens)} rows are not finite")
    return tokens
