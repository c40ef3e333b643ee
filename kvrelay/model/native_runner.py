"""One step of the model on the CPU, by the compiled engine: rows in, KV written, tokens out.

The whole step is one call. Prompt rows are multiplied with bfloat16 weights, generated ones
with the blocks they are given, or with bfloat16 as well; the residual stream, norms, rotary
embedding and softmax are float32, queries, keys, values and weights of values bfloat16. Every
sum of a row is taken in an order that its own position fixes, so neither its company nor the
number of threads shows in its bits (see `native/src/matrix.h` and `attention.h`).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.engine.batch import Path, Rows
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.model import layers
from kvrelay.model.generation_weights import Blocks, LayerBlocks
from kvrelay.model.kv_rows import kv_suffix
from kvrelay.model.quant import QuantMatrix
from kvrelay.model.sampler import sample_row
from kvrelay.model.spec import ModelSpec
from kvrelay.model.warm_up import WARM_UP_ROWS, warm_up_steps
from kvrelay.model.weights import LayerWeights, Weights
from kvrelay.native.library import (
    KV_KINDS,
    RUN_FIELDS,
    NativeModel,
    NativePath,
    Norm,
    Product,
    Shape,
    why_not,
)

NUMERICS_VERSION = 1
"""Grows when the same weights and tokens would give other bits than before."""

MARK_ROWS = 8
"""Of the rows whose bits are part of `numerics`: as many as the smallest block holds."""

_PATHS = {Path.PROMPT: NativePath.PROMPT, Path.GENERATION: NativePath.GENERATION}

_MAX_GROUP_SIZE = 128


def why_not_native(spec: ModelSpec, layout: KvLayout) -> str | None:
    """Why a model cannot be computed by the compiled engine here; None if it can."""
    if layout.dtype not in KV_KINDS:
        return f"it keeps KV in {', '.join(KV_KINDS)}, not in {layout.dtype}"
    if layout.block_size.bit_count() != 1:
        return f"block_size {layout.block_size} is no power of two"
    for name in ("hidden_size", "head_dim", "intermediate_size"):
        if getattr(spec, name) % 2:
            return f"{name} {getattr(spec, name)} is odd"
    if spec.group_size > _MAX_GROUP_SIZE:
        return f"{spec.group_size} query heads share one KV head, {_MAX_GROUP_SIZE} can"
    return why_not()


class NativeRunner:
    """Implements `kvrelay.engine.batch.Runner`. Used from one thread.

    `weights` and `blocks` may be dropped afterwards: what is needed is kept, packed.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: Weights,
        blocks: Blocks,
        cache: KvCache,
        *,
        max_threads: int,
        generation: str,
    ) -> None:
        num_slots = cache.num_blocks * cache.layout.block_size
        num_positions = min(spec.max_position_embeddings, num_slots)
        assert weights.dtype is torch.bfloat16
        self.spec = spec
        self.layout = cache.layout
        self._paths = f"native-{generation}-v{NUMERICS_VERSION}"
        self._paths += kv_suffix(cache.layout.dtype, "bfloat16")
        self.numerics = self._paths
        self._num_positions = num_positions
        self._num_blocks = cache.num_blocks
        self._cache = cache.values  # keeps the pages alive for as long as steps may be taken
        self._model = NativeModel(
            _shape(spec, cache.layout, num_positions), max_threads=max_threads
        )
        for index, both in enumerate(zip(weights.layers, blocks.layers, strict=True)):
            self._pack_layer(index, *both)
        self._pack_ends(weights, blocks.head, num_positions)
        self._model.set_cache(self._cache.data_ptr())
        self._logits = np.empty((0, spec.vocab_size), dtype=np.float32)

    @property
    def num_weight_bytes(self) -> int:
        return self._model.num_bytes

    def set_threads(self, num_threads: int) -> None:
        """How many compute from the next step on. Bits do not depend on it."""
        self._model.set_threads(num_threads)

    def step(self, batch: Sequence[Rows]) -> list[int | None]:
        """See `Runner.step`.

        Raises:
            FloatingPointError: logits of rows that sample are not finite.
        """
        wanted = [i for i, run in enumerate(batch) if run.sample is not None]
        logits, likeliest = self._run(batch, wanted)
        chosen: list[int | None] = [None] * len(batch)
        for row, i in enumerate(wanted):
            params = batch[i].sample
            assert params is not None
            chosen[i] = likeliest[row]
            if params.temperature > 0:
                position = batch[i].start + len(batch[i].token_ids)
                chosen[i] = sample_row(logits[row], params, position)
        return chosen

    def step_logits(self, batch: Sequence[Rows]) -> torch.Tensor:
        """As `step`, but the logits of every run's last row: [len(batch), vocab_size]."""
        logits, _ = self._run(batch, range(len(batch)))
        return torch.from_numpy(logits.copy())

    def warm_up(self) -> None:
        """Touch the memory that a step uses, so that the first request finds it there.

        Writes to the first blocks, so call it before they hold anything.
        """
        for rows in self._warm_up_steps(WARM_UP_ROWS):
            self.step([rows])

    def prove_rows(self) -> tuple[str, ...]:
        """Nothing: every sum is written out in this package, in an order of its own.

        But whether another machine's instructions and tables round as this one's do, nobody
        promises. So what a few fixed rows come to here becomes part of `numerics`, and machines
        that differ are never paired. Writes to the first blocks, as `warm_up` does.
        """
        digest = hashlib.blake2b(digest_size=4)
        for rows in self._warm_up_steps(MARK_ROWS):
            digest.update(self.step_logits([rows]).numpy().tobytes())
        self.numerics = f"{self._paths}-{digest.hexdigest()}"
        return ()

    def _warm_up_steps(self, num_rows: int) -> Iterator[Rows]:
        return warm_up_steps(
            self.layout,
            num_rows=num_rows,
            num_blocks=self._num_blocks,
            num_positions=self._num_positions,
            vocab_size=self.spec.vocab_size,
        )

    def _run(
        self, batch: Sequence[Rows], wanted: Iterable[int]
    ) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Float32 logits of the last rows of `wanted`, valid until the next step."""
        logits_row = {index: row for row, index in enumerate(wanted)}
        runs = np.empty((len(batch), len(RUN_FIELDS)), dtype=np.int32)
        token_ids: list[int] = []
        tables: list[int] = []
        for i, run in enumerate(batch):
            end = run.start + len(run.token_ids)
            assert len(run.block_table) * self.layout.block_size >= end, (run.start, end)
            runs[i] = (
                _PATHS[run.path],
                run.start,
                len(run.token_ids),
                len(token_ids),
                len(tables),
                logits_row.get(i, -1),
            )
            token_ids += run.token_ids
            tables += run.block_table
        blocks = np.array(tables, dtype=np.int32)
        assert not tables or 0 <= blocks.min() <= blocks.max() < self._num_blocks, "no such block"
        if len(self._logits) < len(logits_row):
            self._logits = np.empty((len(logits_row), self.spec.vocab_size), dtype=np.float32)
        logits = self._logits[: len(logits_row)]
        likeliest = np.empty(len(logits_row), dtype=np.int32)
        self._model.step(
            runs,
            np.array(token_ids, dtype=np.int32),
            blocks,
            logits,
            likeliest,
        )
        if num_bad := int((likeliest < 0).sum()):
            raise FloatingPointError(f"logits of {num_bad} of {len(likeliest)} rows are not finite")
        return logits, likeliest.tolist()

    def _pack_layer(self, index: int, layer: LayerWeights, blocks: LayerBlocks) -> None:
        matrices = (
            (Product.QKV, layer.qkv, blocks.qkv, layer.qkv_bias),
            (Product.OUT, layer.out, blocks.out, layer.out_bias),
            (Product.GATE_UP, layer.gate_up, blocks.gate_up, layer.gate_up_bias),
            (Product.DOWN, layer.down, blocks.down, layer.down_bias),
        )
        for product, matrix, own, bias in matrices:
            forms = [(NativePath.PROMPT, "bfloat16", matrix)]
            if own is not None:
                forms.append((NativePath.GENERATION, own.kind, own.data))
            floats = _float32(bias)
            for path, kind, data in forms:
                self._model.set_matrix(
                    index,
                    path,
                    product,
                    kind=kind,
                    data=data.data_ptr(),
                    bias=0 if floats is None else floats.data_ptr(),
                )
        norms = (
            (Norm.INPUT, layer.input_norm),
            (Norm.QUERY, layer.q_norm),
            (Norm.KEY, layer.k_norm),
            (Norm.POST, layer.post_norm),
        )
        for norm, vector in norms:
            if vector is not None:
                self._model.set_norm(index, norm, vector.data_ptr())

    def _pack_ends(self, weights: Weights, head: QuantMatrix | None, num_positions: int) -> None:
        rope = native_rope(self.spec, num_positions)
        matrix = weights.head if head is None else head.data
        self._model.set_ends(
            embedding=weights.embed.data_ptr(),
            last_norm=weights.norm.data_ptr(),
            head_kind="bfloat16" if head is None else head.kind,
            head=matrix.data_ptr(),
            rope=rope.data_ptr(),
        )


def native_rope(spec: ModelSpec, num_positions: int) -> torch.Tensor:
    """[num_positions, 2, head_dim / 2] float32: cosines and sines."""
    half = spec.head_dim // 2
    table = layers.rope_table(spec.rope, head_dim=spec.head_dim, num_positions=num_positions)
    return torch.stack((table[:, 0, :half], table[:, 1, half:]), dim=1).contiguous()


def _shape(spec: ModelSpec, layout: KvLayout, num_positions: int) -> Shape:
    return Shape(
        hidden_size=spec.hidden_size,
        num_layers=spec.num_layers,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        intermediate_size=spec.intermediate_size,
        vocab_size=spec.vocab_size,
        num_positions=num_positions,
        window=spec.sliding_window or 0,
        block_size=layout.block_size,
        kv_kind=KV_KINDS[layout.dtype],
        rms_norm_eps=spec.rms_norm_eps,
    )


def _float32(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.float().contiguous()
