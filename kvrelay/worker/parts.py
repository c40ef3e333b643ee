"""What both `__main__`s wire alike: everything up to the service that makes a worker its role."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from kvrelay import process
from kvrelay.clock import Clock, MonotonicClock
from kvrelay.engine.batch import Runner
from kvrelay.engine.cores import Presence
from kvrelay.engine.engine import Engine
from kvrelay.engine.plan import StepLimits
from kvrelay.engine.request import StepResult
from kvrelay.engine.scheduler import Scheduler
from kvrelay.handoff.desk import TicketDesk
from kvrelay.kv.block_pool import BlockPool
from kvrelay.kv.cache import KvCache
from kvrelay.kv.prefix_index import PrefixIndex
from kvrelay.obs.metrics import WorkerMetrics, serve_metrics
from kvrelay.transfer.build import TransportBuilder, Transports
from kvrelay.transfer.wire_choice import WireDtype
from kvrelay.types import Role, WorkerIdentity
from kvrelay.worker.bridge import StepBridge, TimedRunner
from kvrelay.worker.cores import CoreShare, ResizableRunner, SharingRunner, yield_to_others
from kvrelay.worker.model import LoadedModel, load_model
from kvrelay.worker.settings import WorkerSettings

ENGINE_STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Name:
    """Who this process is. Another start is another epoch."""

    role: Role
    worker_id: str
    epoch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerParts:
    """A worker without its service. The engine runs; nothing listens."""

    name: Name
    settings: WorkerSettings
    clock: Clock
    metrics: WorkerMetrics
    model: LoadedModel
    bridge: StepBridge
    """To be connected before anything is submitted."""

    engine: Engine
    transports: Transports
    desk: TicketDesk
    wire_dtype: WireDtype

    def identity_at(self, address: str) -> WorkerIdentity:
        """How the pool knows this worker, which is reached at `address`."""
        return WorkerIdentity(
            worker_id=self.name.worker_id,
            epoch=self.name.epoch,
            role=self.name.role,
            address=address,
            pid=os.getpid(),
            fingerprint=self.model.fingerprint,
            num_blocks=self.model.cache.num_blocks,
            max_sequences=self.settings.max_sequences,
            offers=tuple(transport.describe() for transport in self.transports.all),
            wire_dtype=self.wire_dtype,
        )


@asynccontextmanager
async def worker_parts(
    settings: WorkerSettings,
    name: Name,
    *,
    landing_num_bytes: int = 0,
    wire_dtype: WireDtype = "auto",
) -> AsyncIterator[WorkerParts]:
    """Load, wire and start; stop it all at the end.

    `landing_num_bytes` are for KV that comes in another form than it is kept in, `wire_dtype` is
    the one that it is asked to come in.

    Raises:
        ModelInvalid, SettingsError: see `load_model` and `serve_metrics`.
    """
    clock = MonotonicClock()
    registry = CollectorRegistry()
    metrics = WorkerMetrics(name.role, registry)
    loop = asyncio.get_running_loop()
    cores = CoreShare.join(name.role, limit=settings.threads)
    starter = ThreadPoolExecutor(1, "start")
    model = await loop.run_in_executor(
        starter, load_model, settings, clock, cores, landing_num_bytes
    )
    yield_to_others(settings.nice)  # what computes, not what will serve
    bridge = StepBridge(loop, on_failure=process.crash)
    engine = make_engine(
        TimedRunner(_sharing(model.runner, cores, clock), metrics, clock),
        model.cache,
        limits=step_limits(settings),
        sink=bridge,
        on_failure=process.crash,
        clock=clock,
        presence=cores,
    )
    transports = TransportBuilder(
        worker_id=name.worker_id,
        epoch=name.epoch,
        tls=settings.tls,
        clock=clock,
        on_lost=process.crash,
    ).build(settings.transport, model.cache)
    exporter = serve_metrics(settings.metrics_listen, registry) if settings.metrics_listen else None
    await loop.run_in_executor(starter, engine.start)
    starter.shutdown()
    try:
        yield WorkerParts(
            name=name,
            settings=settings,
            clock=clock,
            metrics=metrics,
            model=model,
            bridge=bridge,
            engine=engine,
            transports=transports,
            desk=TicketDesk(worker_id=name.worker_id, epoch=name.epoch),
            wire_dtype=wire_dtype,
        )
    finally:
        await close(engine, transports, model.cache)
        cores.close()
        if exporter is not None:
            exporter.close()


def make_engine(
    runner: Runner,
    cache: KvCache,
    *,
    limits: StepLimits,
    sink: Callable[[StepResult], None],
    on_failure: Callable[[BaseException], None],
    clock: Clock,
    presence: Presence | None = None,
) -> Engine:
    """An engine over all blocks of `cache`, not started."""
    index = PrefixIndex(block_size=cache.layout.block_size, key=secrets.token_bytes(32))
    pool = BlockPool(cache.num_blocks, index, cache.generations)
    scheduler = Scheduler(pool, index, limits=limits)
    return Engine(
        runner=runner,
        scheduler=scheduler,
        sink=sink,
        clock=clock,
        on_failure=on_failure,
        presence=presence,
    )


def _sharing(runner: Runner, cores: CoreShare, clock: Clock) -> Runner:
    """The runner, made to follow its share of the cores if it can."""
    return SharingRunner(runner, cores, clock) if isinstance(runner, ResizableRunner) else runner


def step_limits(settings: WorkerSettings) -> StepLimits:
    return StepLimits(
        budget_tokens=settings.budget_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
    )


async def close(engine: Engine, transports: Transports, cache: KvCache) -> None:
    """Stop computing, then moving, then let the memory go."""
    await asyncio.to_thread(engine.stop, ENGINE_STOP_TIMEOUT_S)
    await transports.close()
    cache.close()
