"""The step loop: one thread that asks the scheduler, runs the device and tells the service.

1. `submit` puts a request into the scheduler under the lock and wakes the thread.
2. The thread plans a step under the lock and computes it without, so requests arrive,
   land, join and leave while the device works.
3. It commits the step under the lock and hands one `StepResult` to the sink without.
4. With nothing to compute it waits on a condition; whoever changes something notifies.

It decides nothing. Whatever goes wrong in the loop ends the engine: a worker whose
scheduler or device failed must not serve from a state nobody understands.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from kvrelay.clock import Clock
from kvrelay.engine.batch import Runner
from kvrelay.engine.cores import Presence, Unseen
from kvrelay.engine.plan import StepPlan
from kvrelay.engine.request import ChunkDone, EngineRequest, Frozen, Granted, StepResult
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import State
from kvrelay.engine.timing import StepMeter, Stopwatch
from kvrelay.errors import Draining
from kvrelay.kv.block_pool import BlockCounts
from kvrelay.types import BlockId, LinkSpeed, WorkerLoad

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy an engine is. All counts are gauges unless named `_total`."""

    blocks: BlockCounts
    waiting: int
    running: int
    queued_prompt_tokens: int
    prefill_tokens_per_s: float
    step_s: float
    preemptions_total: int

    def worker_load(
        self,
        *,
        handoff_holds: int,
        handoffs_total: int,
        waiting_handoffs: int,
        is_draining: bool,
        links: tuple[LinkSpeed, ...] = (),
    ) -> WorkerLoad:
        """What a worker tells its pool, given what only its service knows."""
        return WorkerLoad(
            free_blocks=self.blocks.free,
            cached_blocks=self.blocks.cached,
            held_blocks=self.blocks.held,
            waiting_sequences=self.waiting,
            running_sequences=self.running,
            handoff_holds=handoff_holds,
            queued_prompt_tokens=self.queued_prompt_tokens,
            prefill_tokens_per_s=self.prefill_tokens_per_s,
            step_s=self.step_s,
            handoffs_total=handoffs_total,
            preemptions_total=self.preemptions_total,
            is_draining=is_draining,
            waiting_handoffs=waiting_handoffs,
            links=links,
        )


class Engine:
    """Runs one scheduler on one device. Every method is thread-safe.

    The sink is called without the lock, from the engine's thread for what a step says,
    and from the caller's own thread for grants that `submit` or `release` made possible:
    a grant may so arrive before `submit` returns. A result may still be on its way to the
    sink when `release` returns, so the sink ignores sequences it no longer knows.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        scheduler: Scheduler,
        sink: Callable[[StepResult], None],
        clock: Clock,
        on_failure: Callable[[BaseException], None],
        presence: Presence | None = None,
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._sink = sink
        self._clock = clock
        self._on_failure = on_failure
        self._presence = presence or Unseen()
        self._changed = threading.Condition()
        self._stopwatch = Stopwatch()
        self._meter = StepMeter()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to compute. Once."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Finish the step being computed, and no other; the thread is gone on return.

        Raises:
            TimeoutError: the step takes longer than that; the process should exit.
        """
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        if not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine is still in a step after {timeout_s} s")

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            Draining: the engine is stopping.
            InvalidRequest, QueueFull, KvPoolExhausted: see `Scheduler.add`.
        """
        with self._changed:
            if self._is_stopping:
                raise Draining("the engine is stopping")
            self._scheduler.add(request)
            self._stopwatch.queue(request.seq_id, self._clock.now())
            granted = self._scheduler.grant()
            self._changed.notify_all()
        self._tell(StepResult(granted=granted))

    def join(self, seq_id: str, output_ids: tuple[int, ...], num_landed: int) -> None:
        """Let a landed sequence run; the KV of its first `num_landed` tokens is verified.

        Raises:
            NotFound, InvalidRequest: see `Scheduler.join`.
        """
        with self._changed:
            done = self._scheduler.join(seq_id, output_ids, num_landed)
            if done is None:
                self._stopwatch.queue(seq_id, self._clock.now())
                self._changed.notify_all()
                return
            granted = self._finished(seq_id)
        self._tell(StepResult(emitted=(done,), granted=granted))

    def offer(self, seq_id: str) -> ChunkDone:
        """See `Scheduler.offer`."""
        with self._changed:
            return self._scheduler.offer(seq_id)

    def limit(self, seq_id: str, limit_tokens: int) -> None:
        """See `Scheduler.limit`."""
        with self._changed:
            frozen = self._scheduler.limit(seq_id, limit_tokens)
        self._tell_frozen(frozen)

    def freeze(self, seq_id: str) -> None:
        """See `Scheduler.freeze`; the sink is told when it is held."""
        with self._changed:
            frozen = self._scheduler.freeze(seq_id)
        self._tell_frozen(frozen)

    def resume(self, seq_id: str) -> None:
        """See `Scheduler.resume`."""
        with self._changed:
            self._scheduler.resume(seq_id)
            self._changed.notify_all()

    def release(self, seq_id: str) -> None:
        """Forget a sequence in whatever state; an unknown one has left before.

        Its blocks are given back at once, or when the step ends that it is part of. The
        caller promises that nobody still writes to the blocks of a landing sequence.
        """
        with self._changed:
            if not self._scheduler.release(seq_id):
                return
            granted = self._finished(seq_id)
        self._tell(StepResult(granted=granted))

    def load(self) -> EngineLoad:
        with self._changed:
            scheduler = self._scheduler
            return EngineLoad(
                blocks=scheduler.pool.counts,
                waiting=scheduler.count(State.WAITING),
                running=scheduler.count(State.RUNNING),
                queued_prompt_tokens=scheduler.queued_prompt_tokens,
                prefill_tokens_per_s=self._meter.prefill_tokens_per_s,
                step_s=self._meter.step_s,
                preemptions_total=scheduler.num_preemptions,
            )

    def pin(self, blocks: Sequence[BlockId]) -> None:
        """Add a holder to blocks, whatever becomes of those they have; `unpin` takes it away."""
        with self._changed:
            self._scheduler.pin(blocks)

    def unpin(self, blocks: Sequence[BlockId]) -> None:
        with self._changed:
            self._scheduler.unpin(blocks)
            granted = self._scheduler.grant()
            self._changed.notify_all()
        self._tell(StepResult(granted=granted))

    def generations(self, blocks: Sequence[BlockId]) -> list[int]:
        """See `BlockPool.generation`; of all at one instant."""
        with self._changed:
            return [self._scheduler.pool.generation(block) for block in blocks]

    @property
    def is_idle(self) -> bool:
        """No sequence is left in any state, held and landing ones included."""
        with self._changed:
            return self._scheduler.is_empty

    def check(self) -> None:
        """Prove the invariants of scheduler and pool; an AssertionError names the broken one."""
        with self._changed:
            self._scheduler.check()

    def _run(self) -> None:
        try:
            while (plan := self._next_plan()) is not None:
                self._tell(StepResult(granted=plan.granted, withdrawn=plan.withdrawn))
                if plan.rows:
                    self._sink(self._compute(plan))
        except BaseException as error:  # crash-only: the worker exits, whatever it was
            log.critical("engine.failed", exc_info=True)
            with self._changed:
                self._is_stopping = True
            self._on_failure(error)

    def _next_plan(self) -> StepPlan | None:
        """Wait until there is something to do; None when it is time to stop."""
        with self._changed:
            while not self._is_stopping:
                plan = self._scheduler.plan()
                if plan.rows or plan.granted or plan.withdrawn:
                    self._presence.busy(bool(plan.rows))
                    return plan
                self._presence.busy(False)
                self._changed.wait()
        return None

    def _compute(self, plan: StepPlan) -> StepResult:
        started_s = self._clock.now()
        sampled = self._runner.step(plan.rows)
        ended_s = self._clock.now()
        with self._changed:
            return self._commit(plan, sampled, started_s, ended_s)

    def _commit(
        self, plan: StepPlan, sampled: Sequence[int | None], started_s: float, ended_s: float
    ) -> StepResult:
        self._meter.record(plan.rows, ended_s - started_s)
        self._stopwatch.begin_step((seq.seq_id for seq in plan.sequences), started_s)
        outcome = self._scheduler.commit(sampled)
        cached = {seq.seq_id: seq.num_cached_tokens for seq in plan.sequences}
        timings = (
            self._stopwatch.emit(
                emitted.seq_id, ended_s, num_cached_tokens=cached[emitted.seq_id] or 0
            )
            for emitted in outcome.emitted
        )
        return StepResult(
            emitted=outcome.emitted,
            chunks=outcome.chunks,
            frozen=outcome.frozen,
            timings=tuple(timing for timing in timings if timing is not None),
        )

    def _finished(self, seq_id: str) -> tuple[Granted, ...]:
        """A sequence left: its room may be somebody's turn."""
        self._stopwatch.forget(seq_id)
        self._changed.notify_all()
        return self._scheduler.grant()

    def _tell_frozen(self, frozen: Frozen | None) -> None:
        if frozen is not None:
            self._tell(StepResult(frozen=(frozen,)))

    def _tell(self, result: StepResult) -> None:
        if result != StepResult():
            self._sink(result)
