"""kvrelay's runner at work: steps of decode and prefill, single products, and whole batches."""

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from kvrelay.engine.batch import Path, Rows
from kvrelay.engine.plan import StepLimits
from kvrelay.engine.request import EngineRequest
from kvrelay.engine.scheduler import Scheduler
from kvrelay.kernels.few_rows import num_parts
from kvrelay.kernels.many_rows import slab_rows
from kvrelay.kernels.matrix import Kind
from kvrelay.kernels.ops import Ops
from kvrelay.kv.block_pool import BlockPool
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import KvLayout
from kvrelay.kv.prefix_index import PrefixIndex
from kvrelay.model.cuda_device import Device
from kvrelay.model.cuda_runner import CudaRunner
from kvrelay.model.spec import ModelSpec
from kvrelay.model.weights import Weights
from kvrelay.types import BlockId, SamplingParams, StopParams
from tests.bench.gpu_limits import median_s
from tests.bench.gpu_model import kv_num_bytes, prefill_flop

BLOCK_SIZE = 16
STEPS = 32
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeResult:
    kind: str
    batch: int
    context_tokens: int
    sampling: str
    step_s: float
    """As the engine sees it: planning, copies, computing and waiting."""

    num_bytes: int
    """Weights and KV that a step must read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillResult:
    product: str
    num_tokens: int
    step_s: float
    flop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProductResult:
    """One matrix of every layer in turn, so that none is found in a cache."""

    name: str
    kind: str
    num_rows: int
    product_s: float
    num_bytes: int
    flop: float


@contextmanager
def runner_of(
    spec: ModelSpec, weights: Weights, device: Device, *, kind: Kind, num_tokens: int
) -> Iterator[tuple[CudaRunner, DeviceCache]]:
    """Warm, over a cache of `num_tokens` slots of noise."""
    layout = KvLayout(
        num_layers=spec.num_layers,
        block_size=BLOCK_SIZE,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        dtype=str(weights.dtype).removeprefix("torch."),
    )
    cache = DeviceCache(
        layout,
        layout.num_blocks_for(num_tokens),
        shareable=False,
        device=device.torch_device,
    )
    cache.on_device.normal_()
    try:
        runner = CudaRunner(spec, weights, cache, device, kind=kind)
        runner.warm_up()
        yield runner, cache
    finally:
        cache.close()


def decode(
    runner: CudaRunner, *, batch: int, context_tokens: int, params: SamplingParams, kind: str
) -> DecodeResult:
    """Steps of `batch` sequences that each have `context_tokens` behind them."""
    blocks = runner.layout.num_blocks_for(context_tokens + STEPS + 3)
    tables = [[BlockId(i * blocks + j) for j in range(blocks)] for i in range(batch)]

    def step(at: int) -> None:
        rows = [
            Rows(
                path=Path.GENERATION,
                token_ids=(7 + i,),
                start=context_tokens + at,
                block_table=table,
                sample=params,
            )
            for i, table in enumerate(tables)
        ]
        runner.step(rows)

    for at in range(3):
        step(at)
    spans = [_clocked(lambda at=at: step(at)) for at in range(3, STEPS + 3)]
    element_size = runner.weights.embed.element_size()
    kv = kv_num_bytes(runner.spec, batch * (context_tokens + STEPS // 2), element_size)
    return DecodeResult(
        kind=kind,
        batch=batch,
        context_tokens=context_tokens,
        sampling="greedy" if params.temperature == 0 else "top-k, top-p",
        step_s=statistics.median(spans),
        num_bytes=runner.weights.step_num_bytes + kv,
    )


def prefill(runner: CudaRunner, *, num_tokens: int, product: str, repeats: int) -> PrefillResult:
    """One prompt in one step, its first token included."""
    table = [BlockId(i) for i in range(runner.layout.num_blocks_for(num_tokens))]
    rows = Rows(
        path=Path.PROMPT,
        token_ids=tuple(i % runner.spec.vocab_size for i in range(num_tokens)),
        start=0,
        block_table=table,
        sample=GREEDY,
    )
    runner.step([rows])
    spans = [_clocked(lambda: runner.step([rows])) for _ in range(repeats)]
    flop = prefill_flop(runner.spec, num_tokens)
    step_s = statistics.median(spans)
    return PrefillResult(product=product, num_tokens=num_tokens, step_s=step_s, flop=flop)


def products(
    runner: CudaRunner, device: Device, *, kind: str, few: Sequence[int], many: Sequence[int]
) -> list[ProductResult]:
    """Where a step's time goes, matrix by matrix."""
    found = []
    for name in ("qkv", "out", "gate_up", "down"):
        of_layers = [getattr(layer, name) for layer in runner.weights.layers]
        first = of_layers[0]
        for num_rows in few:
            x = _noise(num_rows, first.in_features, first.prompt)
            matrix = first.generation
            shape = (num_parts(matrix), num_rows, first.out_features)
            out = torch.empty(shape, dtype=torch.float32, device=x.device)

            def all_few(x=x, out=out, of_layers=of_layers) -> torch.Tensor:
                for each in of_layers:
                    device.ops.few_rows(x, each.generation, out=out)
                return out

            total_s = median_s(device.captured(all_few), device.torch_device)
            found.append(_product(f"few rows, {name}", kind, x, first, total_s / len(of_layers)))
        for num_rows in many:
            x = _noise(num_rows, first.in_features, first.prompt)
            out = x.new_empty(num_rows, first.out_features)
            for label, op in (("tiles", device.ops.many_rows), ("library", slab_rows)):

                def all_many(x=x, out=out, of_layers=of_layers, op=op) -> torch.Tensor:
                    for each in of_layers:
                        op(x, each.prompt, None, out=out)
                    return out

                total_s = median_s(all_many, device.torch_device)
                found.append(
                    _product(f"many rows, {name}", label, x, first, total_s / len(of_layers))
                )
    return found


def throughput(runner: CudaRunner, prompts: Sequence[tuple[int, ...]], output_tokens: int) -> float:
    """Output tokens per second of requests that all come at once, by kvrelay's own scheduler."""
    index = PrefixIndex(block_size=BLOCK_SIZE, key=b"benchmark")
    limits = StepLimits(
        budget_tokens=8192, max_chunk_tokens=8192, max_sequences=128, max_waiting=len(prompts)
    )
    blocks = sum(runner.layout.num_blocks_for(len(ids) + output_tokens) for ids in prompts)
    scheduler = Scheduler(BlockPool(blocks, index), index, limits=limits)
    for i, ids in enumerate(prompts):
        scheduler.add(
            EngineRequest(
                seq_id=str(i),
                prompt_ids=ids,
                sampling=GREEDY,
                stop=StopParams(max_tokens=output_tokens),
            )
        )
    started_s = time.perf_counter()
    while (plan := scheduler.plan()).rows:
        scheduler.commit(runner.step(plan.rows))
    return len(prompts) * output_tokens / (time.perf_counter() - started_s)


def request_prompts(spec: ModelSpec, num_requests: int, num_tokens: int) -> list[tuple[int, ...]]:
    """No two alike from the first token on, so that no prefix is shared."""
    return [
        tuple((i * 7919 + j * 31 + 5) % spec.vocab_size for j in range(num_tokens))
        for i in range(num_requests)
    ]


def by_library(ops: Ops) -> Ops:
    """The same kernels, but prompts are multiplied by the library in slabs."""
    return replace(ops, name="library-prompts", many_rows=slab_rows)


def _noise(num_rows: int, num_columns: int, like: torch.Tensor) -> torch.Tensor:
    return torch.randn(num_rows, num_columns, device=like.device).to(like.dtype)


def _product(name, kind, x, product, product_s: float) -> ProductResult:
    size = x.element_size()
    weights = product.generation.num_bytes if name.startswith("few") else product.prompt.nbytes
    return ProductResult(
        name=name,
        kind=kind,
        num_rows=len(x),
        product_s=product_s,
        num_bytes=weights + x.nbytes + len(x) * product.out_features * size,
        flop=2.0 * len(x) * product.in_features * product.out_features,
    )


def _clocked(work) -> float:
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s
