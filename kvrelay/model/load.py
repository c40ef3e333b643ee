"""From a model directory to what computes with it, chosen by what this machine can do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch

from kvrelay.engine.batch import Rows, Runner
from kvrelay.errors import ModelInvalid
from kvrelay.kv.cache import TORCH_DTYPES, KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.model.generation_weights import Blocks, Choice, generation_blocks
from kvrelay.model.native_runner import NativeRunner, why_not_native
from kvrelay.model.runner import LlamaRunner
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import load_weights

CpuEngine = Literal["auto", "native", "torch"]


class ModelRunner(Runner, Protocol):
    """A `Runner`, and what a worker asks of it before it serves."""

    numerics: str
    """Names the numeric paths: equal names, weights and tokens, equal bits."""

    def warm_up(self) -> None: ...

    def step_logits(self, batch: Sequence[Rows]) -> torch.Tensor:
        """As `step`, but the logits of every run's last row: [len(batch), vocab_size]."""
        ...

    def prove_rows(self) -> tuple[str, ...]:
        """The products in which a row's bits depend on its company here; none, as a rule."""
        ...


def load_runner(
    model_dir: str | Path,
    spec: ModelSpec,
    cache: KvCache,
    *,
    engine: CpuEngine,
    generation_weights: Choice,
    num_threads: int,
    torch_threads: int | None = None,
    dtype: str | None = None,
) -> tuple[ModelRunner, str | None]:
    """A runner over `cache`, and why it is not the compiled one if it is not.

    `dtype` is of weights and products; by default the cache's, or bfloat16 where KV is quantized.

    The compiled engine has `num_threads` and may be told to use fewer. Torch, where it computes,
    stays with `torch_threads`; by default as many.

    Raises:
        ModelInvalid: see `load_weights` and `generation_blocks`; or the compiled engine is
            asked for, or blocks that only it computes with, and it cannot be used here.
    """
    if dtype is None:
        dtype = "bfloat16" if cache.layout.is_quantized else cache.layout.dtype
    reason = _why_torch(engine, dtype, spec, cache.layout)
    if reason is not None and engine == "native":
        raise ModelInvalid(model_dir, f"cpu_engine is native, but {reason}")
    if reason is not None and generation_weights in ("int8", "int4"):
        raise ModelInvalid(
            model_dir,
            f"generation_weights is {generation_weights}, which only the native CPU engine "
            f"computes with, but {reason}",
        )
    # Copying is no work for many: workers that start together would only wait for each other.
    # Nor does the compiled engine want torch's threads on its cores.
    torch.set_num_threads(1)
    weights = load_weights(model_dir, spec, dtype=TORCH_DTYPES[dtype])
    if reason is not None:
        return LlamaRunner(spec, weights, cache, num_threads=torch_threads or num_threads), reason
    blocks = generation_blocks(model_dir, spec, weights, generation_weights)
    generation = _name(generation_weights, blocks)
    runner = NativeRunner(
        spec, weights, blocks, cache, max_threads=num_threads, generation=generation
    )
    return runner, None


def _why_torch(engine: CpuEngine, dtype: str, spec: ModelSpec, layout: KvLayout) -> str | None:
    if engine == "torch":
        return "torch was asked for"
    if dtype != "bfloat16":
        return f"it computes in bfloat16, not {dtype}"
    return why_not_native(spec, layout)


def layout_of(spec: ModelSpec, *, dtype: str, block_size: int) -> KvLayout:
    return KvLayout(
        num_layers=spec.num_layers,
        block_size=block_size,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=dtype,
    )


def _name(choice: Choice, blocks: Blocks) -> str:
    """What generated tokens are multiplied with; "own" are the checkpoint's blocks."""
    if not blocks.matrices:
        return "bfloat16"
    return "own" if choice == "auto" else choice
