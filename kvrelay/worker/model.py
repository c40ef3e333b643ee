"""Loads what a worker computes with, warm, and says what others must have to be its peers."""

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from kvrelay.clock import Clock
from kvrelay.config import SettingsError
from kvrelay.engine.batch import Runner
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.kv.staging import PACKED_DTYPES, StagingPlan
from kvrelay.model.load import ModelRunner, layout_of, load_runner
from kvrelay.model.spec import ModelSpec, read_spec
from kvrelay.native.library import HOW_TO_BUILD
from kvrelay.rpc.submit import ModelBounds
from kvrelay.store.manifest import model_digest, read_model_dir, resolve_model
from kvrelay.types import Fingerprint
from kvrelay.worker.cores import CoreShare
from kvrelay.worker.device import chosen_device, load_on_cuda
from kvrelay.worker.settings import WorkerSettings

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Everything a worker computes with."""

    runner: Runner
    cache: KvCache
    staging: StagingPlan
    fingerprint: Fingerprint
    bounds: ModelBounds


def load_model(
    settings: WorkerSettings, clock: Clock, cores: CoreShare, landing_num_bytes: int
) -> LoadedModel:
    """Load and warm up. Takes seconds; the caller closes the cache.

    Raises:
        ModelInvalid: naming the file and the problem.
        SettingsError: not a single block fits into the memory given, or the device cannot
            compute with KV of this dtype.
    """
    started_s = clock.now()
    model_dir = resolve_model(settings.model)
    log.info("model.loading", model=read_model_dir(model_dir).name, dtype=settings.dtype)
    spec = read_spec(model_dir)
    layout = layout_of(spec, dtype=_kv_dtype(settings), block_size=settings.block_size)
    num_blocks = settings.num_blocks or (settings.kv_memory_mib << 20) // layout.block_num_bytes
    if num_blocks == 0:
        raise SettingsError(
            f"kv_memory_mib = {settings.kv_memory_mib}: "
            f"one block of this model takes {layout.block_num_bytes} bytes"
        )
    staging = StagingPlan(
        layout,
        num_blocks,
        packs_to=_packs_to(settings),
        landing_num_bytes=landing_num_bytes,
    )
    runner, cache = _load(model_dir, spec, layout, settings, num_blocks, staging.num_bytes, cores)
    loaded_s = clock.now()
    runner.warm_up()
    warm_s = clock.now()
    varying = runner.prove_rows()
    log.info(
        "model.loaded",
        numerics=runner.numerics,
        num_blocks=num_blocks,
        kv_num_bytes=cache.num_bytes,
        load_s=round(loaded_s - started_s, 3),
        warm_up_s=round(warm_s - loaded_s, 3),
    )
    if varying:
        log.warning("model.rows_vary", products=varying, numerics=runner.numerics)
    fingerprint = Fingerprint(
        model_digest=model_digest(model_dir), numerics=runner.numerics, layout=layout
    )
    bounds = ModelBounds(vocab_size=spec.vocab_size, context_tokens=spec.max_position_embeddings)
    return LoadedModel(
        runner=runner, cache=cache, staging=staging, fingerprint=fingerprint, bounds=bounds
    )


def _packs_to(settings: WorkerSettings) -> Collection[str]:
    """A CPU's memory comes on demand, a device's does not."""
    if settings.packs_to == "auto":
        return PACKED_DTYPES if chosen_device(settings) == "cpu" else ()
    return () if settings.packs_to == "none" else (settings.packs_to,)


def _kv_dtype(settings: WorkerSettings) -> str:
    return settings.dtype if settings.kv_dtype == "auto" else settings.kv_dtype


def _load(
    model_dir: Path,
    spec: ModelSpec,
    layout: KvLayout,
    settings: WorkerSettings,
    num_blocks: int,
    staging_num_bytes: int,
    cores: CoreShare,
) -> tuple[ModelRunner, KvCache]:
    if chosen_device(settings) == "cuda":
        if layout.dtype != "bfloat16":
            raise SettingsError(
                f"kv_dtype = {settings.kv_dtype}: a CUDA device computes with KV in bfloat16 only; "
                "device = cpu would do"
            )
        return load_on_cuda(
            model_dir,
            spec,
            layout,
            settings,
            num_blocks=num_blocks,
            staging_num_bytes=staging_num_bytes,
        )
    assert settings.generation_weights != "fp8", "refused before"
    cache = KvCache(
        layout,
        num_blocks,
        shareable=settings.transport != "stream",
        staging_num_bytes=staging_num_bytes,
    )
    with ThreadPoolExecutor(1, "populate") as beside:
        populated = beside.submit(cache.populate)
        runner, why_not_native = load_runner(
            model_dir,
            spec,
            cache,
            engine=settings.cpu_engine,
            generation_weights=settings.generation_weights,
            num_threads=cores.most_threads,
            torch_threads=cores.fixed_threads,
            dtype=settings.dtype,
        )
        populated.result()
    if why_not_native is not None:
        # Who could have it should hear of it; who cannot need not every time.
        tell = log.warning if HOW_TO_BUILD in why_not_native else log.info
        tell("model.not_native", reason=why_not_native)
    return runner, cache
