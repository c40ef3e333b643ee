"""What both kinds of worker process start, run and end in the same way.

    1. load the model; nothing listens before that, so an address that answers can compute
    2. listen, join the pool, tell whoever started us; serve until the first signal
    3. refuse new work, let sessions end, at most `drain_s`; then stop everything and exit 0

An engine or a bug that leaves state nobody understands ends the process at once, exit 70.
"""

import asyncio
import json
import logging as stdlib_logging
import os
import secrets
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Literal, NoReturn, Protocol

import structlog
from pydantic import Field, StringConstraints, model_validator

from kvrelay.clock import Clock, MonotonicClock
from kvrelay.config import HostPort, ServiceSettings, SettingsError
from kvrelay.engine.batch import Rows, Runner
from kvrelay.engine.engine import Engine
from kvrelay.engine.request import StepResult
from kvrelay.engine.scheduler import Scheduler, StepLimits
from kvrelay.errors import Incompatible, InvalidRequest
from kvrelay.kv.block_pool import BlockPool
from kvrelay.kv.cache import KvCache
from kvrelay.kv.prefix_index import PrefixIndex
from kvrelay.model.runner import layout_of, load_runner
from kvrelay.model.spec import read_spec
from kvrelay.obs.metrics import WorkerMetrics
from kvrelay.rpc.membership import Membership
from kvrelay.rpc.server import RpcServer
from kvrelay.rpc.submit import ModelBounds
from kvrelay.store.manifest import model_digest, read_model_dir, resolve_model
from kvrelay.transfer.base import KvTransport
from kvrelay.types import Fingerprint, WorkerIdentity, WorkerLoad

log = structlog.get_logger(__name__)

EXIT_BROKEN = 70
ENGINE_STOP_TIMEOUT_S = 30.0


class WorkerSettings(ServiceSettings):
    """What an operator may choose for any worker. Checked once, here."""

    model: str
    """Name of a pulled model, or a directory."""

    coordinator: HostPort = "127.0.0.1:50051"
    """HOST:PORT of the coordinator whose pool this worker joins, for ever if need be."""

    worker_id: Annotated[str, StringConstraints(pattern=r"^([a-z0-9.-]{1,64})?$")] = ""
    """Stable name in the pool. Empty: made up at each start."""

    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads that compute. Workers that share a machine should share its cores."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and KV. Equal in all workers of a pool."""

    block_size: Literal[8, 16, 32, 64] = 16
    """Tokens per KV block. Equal in all workers of a pool."""

    num_blocks: int = Field(default=0, ge=0)
    """KV blocks of this worker. 0: as many as fit into `kv_memory_mib`."""

    kv_memory_mib: int = Field(default=256, ge=1)
    """Memory for KV if `num_blocks` is 0."""

    budget_tokens: int = Field(default=512, ge=1)
    """Most tokens in one step. Larger raises throughput, and the time between tokens of
    whoever decodes beside a long prompt."""

    max_chunk_tokens: int = Field(default=256, ge=1)
    """Most tokens of one prompt in one step. Smaller lets KV travel earlier."""

    max_sequences: int = Field(default=32, ge=1)
    """Most sequences in one step."""

    max_waiting: int = Field(default=1024, ge=1)
    """Sequences waiting for blocks before new ones are refused with QUEUE_FULL."""

    transport: Literal["auto", "shm", "stream"] = "auto"
    """How KV may travel. `auto` uses the best that a pair of workers has in common."""

    drain_s: float = Field(default=30.0, ge=0)
    """How long requests under way may go on after SIGTERM."""

    @model_validator(mode="before")
    @classmethod
    def _number_block_size(cls, given: object) -> object:
        """Choices are compared as they are, and text from a flag is not yet a number."""
        if isinstance(given, dict) and str(given.get("block_size", "")).isdigit():
            return {**given, "block_size": int(given["block_size"])}
        return given

    @model_validator(mode="after")
    def _possible(self) -> "WorkerSettings":
        if self.budget_tokens < self.max_sequences:
            raise ValueError(
                f"budget_tokens: {self.budget_tokens} is less than max_sequences, "
                f"{self.max_sequences}: every sequence needs a token in each step"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """Everything a worker computes with."""

    runner: Runner
    cache: KvCache
    fingerprint: Fingerprint
    bounds: ModelBounds


def die_of_signals() -> None:
    """Until `serve` drains on them there is nothing to save, and nobody wants a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def load_model(settings: WorkerSettings, clock: Clock) -> LoadedModel:
    """Load and warm up. Takes seconds; the caller closes the cache.

    Raises:
        ModelInvalid: naming the file and the problem.
        SettingsError: not a single block fits into the memory given.
    """
    started_s = clock.now()
    model_dir = resolve_model(settings.model)
    log.info("model.loading", model=read_model_dir(model_dir).name, dtype=settings.dtype)
    spec = read_spec(model_dir)
    layout = layout_of(spec, dtype=settings.dtype, block_size=settings.block_size)
    num_blocks = settings.num_blocks or (settings.kv_memory_mib << 20) // layout.block_num_bytes
    if num_blocks == 0:
        raise SettingsError(
            f"kv_memory_mib = {settings.kv_memory_mib}: "
            f"one block of this model takes {layout.block_num_bytes} bytes"
        )
    runner, cache, layout = load_runner(
        model_dir,
        dtype=settings.dtype,
        block_size=settings.block_size,
        num_blocks=num_blocks,
        num_threads=settings.threads,
        shareable=settings.transport != "stream",
    )
    loaded_s = clock.now()
    runner.warm_up()
    log.info(
        "model.loaded",
        num_blocks=num_blocks,
        kv_num_bytes=cache.num_bytes,
        load_s=round(loaded_s - started_s, 3),
        warm_up_s=round(clock.now() - loaded_s, 3),
    )
    fingerprint = Fingerprint(
        model_digest=model_digest(model_dir), numerics=runner.numerics, layout=layout
    )
    bounds = ModelBounds(vocab_size=spec.vocab_size, context_tokens=spec.max_position_embeddings)
    return LoadedModel(runner=runner, cache=cache, fingerprint=fingerprint, bounds=bounds)


class StepBridge:
    """Carries what the engine says from its threads to the event loop, one call per step."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, on_failure: Callable[[BaseException], None]
    ) -> None:
        self._loop = loop
        self._on_failure = on_failure
        self._take_step: Callable[[StepResult], None] | None = None

    def connect(self, take_step: Callable[[StepResult], None]) -> None:
        """Before the engine starts."""
        self._take_step = take_step

    def __call__(self, result: StepResult) -> None:
        self._loop.call_soon_threadsafe(self._deliver, result)

    def _deliver(self, result: StepResult) -> None:
        assert self._take_step is not None
        try:
            self._take_step(result)
        except BaseException as error:  # what one step said was half taken in: crash-only
            log.critical("worker.failed", exc_info=True)
            self._on_failure(error)
            raise


class TimedRunner:
    """A `Runner` whose steps are observed."""

    def __init__(self, runner: Runner, metrics: WorkerMetrics, clock: Clock) -> None:
        self._runner = runner
        self._metrics = metrics
        self._clock = clock

    def step(self, batch: Sequence[Rows]) -> list[int | None]:
        started_s = self._clock.now()
        sampled = self._runner.step(batch)
        self._metrics.step.observe(self._clock.now() - started_s)
        return sampled


def make_engine(
    runner: Runner,
    cache: KvCache,
    *,
    limits: StepLimits,
    sink: Callable[[StepResult], None],
    on_failure: Callable[[BaseException], None],
    clock: Clock,
) -> Engine:
    """An engine over all blocks of `cache`, not started."""
    index = PrefixIndex(block_size=cache.layout.block_size, key=secrets.token_bytes(32))
    scheduler = Scheduler(BlockPool(cache.num_blocks, index), index, limits=limits)
    return Engine(runner=runner, scheduler=scheduler, sink=sink, clock=clock, on_failure=on_failure)


def step_limits(settings: WorkerSettings) -> StepLimits:
    return StepLimits(
        budget_tokens=settings.budget_tokens,
        max_chunk_tokens=settings.max_chunk_tokens,
        max_sequences=settings.max_sequences,
        max_waiting=settings.max_waiting,
    )


def crash(error: BaseException) -> NoReturn:
    """End the process now, whatever thread we are in: no state of it can be trusted."""
    log.critical("worker.exits", error=type(error).__name__, exit_status=EXIT_BROKEN)
    stdlib_logging.shutdown()
    sys.stderr.flush()
    os._exit(EXIT_BROKEN)


class WorkerService(Protocol):
    """What `serve` needs of either service."""

    def load(self) -> WorkerLoad: ...
    def begin_drain(self) -> None: ...
    async def drained(self) -> None: ...


async def serve(
    settings: WorkerSettings,
    *,
    service: WorkerService,
    server: RpcServer,
    identity_at: Callable[[str], WorkerIdentity],
    metrics: WorkerMetrics,
) -> None:
    """Listen, be a member of the pool, and drain at the first signal.

    Raises:
        SettingsError: the pool serves something else.
    """
    stop = _stop_signal()
    bound = await server.start()
    identity = identity_at(settings.advertised(bound))

    def load() -> WorkerLoad:
        now = service.load()
        metrics.observe_load(now)
        return now

    membership = Membership(
        identity=identity,
        coordinator=settings.coordinator,
        load=load,
        clock=MonotonicClock(),
        tls=settings.tls,
    )
    joining = asyncio.create_task(membership.run())
    server.set_serving(True)
    log.info("worker.listening", grpc=identity.address, epoch=identity.epoch)
    _tell(settings.ready_fd, {"grpc": identity.address})
    try:
        await _until(stop, joining)
        log.info("worker.draining", drain_s=settings.drain_s)
        server.set_serving(False)
        service.begin_drain()
        membership.announce()
        with suppress(TimeoutError):
            async with asyncio.timeout(settings.drain_s):
                await service.drained()
        # The pool forgets us last, when the ends of our sessions have been sent.
        await server.drain(1.0)
        await membership.leave()
    finally:
        joining.cancel()
        await asyncio.gather(joining, return_exceptions=True)
        await server.stop()
        await service.drained()
        log.info("worker.stopped")


async def close(engine: Engine, transports: Sequence[KvTransport], cache: KvCache) -> None:
    """Stop computing, then moving, then let the memory go."""
    await asyncio.to_thread(engine.stop, ENGINE_STOP_TIMEOUT_S)
    for transport in transports:
        await transport.close()
    cache.close()


async def _until(stop: asyncio.Event, joining: "asyncio.Task[None]") -> None:
    """Wait for the signal. A membership ends by itself only when the pool refuses us."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({stopped, joining}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if joining.done():
        try:
            joining.result()
        except (Incompatible, InvalidRequest) as error:
            raise SettingsError(f"refused by the pool: {error}") from error


def _stop_signal() -> asyncio.Event:
    """Set by the first SIGTERM or SIGINT; a second one ends the process at once."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    return stop


def _tell(ready_fd: int, addresses: dict[str, str]) -> None:
    if ready_fd >= 0:
        with os.fdopen(ready_fd, "w") as pipe:
            pipe.write(json.dumps(addresses) + "\n")
