"""What stands between an engine's thread and the rest of its worker."""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from kvrelay.clock import Clock
from kvrelay.engine.batch import Rows, Runner
from kvrelay.engine.request import StepResult
from kvrelay.obs.metrics import WorkerMetrics

log = structlog.get_logger(__name__)


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
