"""Short ways to make what engine tests need; only what matters is named at the call."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvrelay.clock import MonotonicClock
from kvrelay.engine.engine import Engine
from kvrelay.engine.plan import StepLimits, StepOutcome, StepPlan
from kvrelay.engine.request import (
    ChunkDone,
    EngineRequest,
    Frozen,
    Goal,
    Granted,
    Origin,
    SequenceTiming,
    StepResult,
)
from kvrelay.engine.scheduler import Scheduler
from kvrelay.kv.block_pool import BlockPool
from kvrelay.kv.prefix_index import PrefixIndex
from kvrelay.types import FinishReason, SamplingParams, StopParams
from tests.support.scripted_model import ScriptedModel, StepGate

BLOCK_SIZE = 4
SECRET = b"a key for tests"


def prompt(num_tokens: int, *, variant: int = 0) -> tuple[int, ...]:
    """Tokens that differ between variants from the first on."""
    return tuple((variant * 131 + i * 7) % 997 for i in range(num_tokens))


def request(
    seq_id: str = "a",
    prompt_ids: tuple[int, ...] | None = None,
    *,
    max_tokens: int = 4,
    output_ids: tuple[int, ...] = (),
    origin: Origin = Origin.COMPUTE,
    goal: Goal = Goal.FINISH,
    stop_token_ids: frozenset[int] = frozenset(),
    salt: bytes = b"",
    landing_tokens: int = 0,
) -> EngineRequest:
    return EngineRequest(
        seq_id=seq_id,
        prompt_ids=prompt(6) if prompt_ids is None else prompt_ids,
        output_ids=output_ids,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=max_tokens, stop_token_ids=stop_token_ids),
        origin=origin,
        goal=goal,
        cache_salt=salt,
        landing_tokens=landing_tokens,
    )


def index(*, block_size: int = BLOCK_SIZE) -> PrefixIndex:
    return PrefixIndex(block_size=block_size, key=SECRET)


def scheduler(
    *,
    num_blocks: int = 32,
    block_size: int = BLOCK_SIZE,
    budget_tokens: int = 32,
    max_chunk_tokens: int = 32,
    max_sequences: int = 8,
    max_waiting: int = 64,
) -> Scheduler:
    known = index(block_size=block_size)
    limits = StepLimits(
        budget_tokens=budget_tokens,
        max_chunk_tokens=max_chunk_tokens,
        max_sequences=max_sequences,
        max_waiting=max_waiting,
    )
    return Scheduler(BlockPool(num_blocks, known), known, limits=limits)


def step(sched: Scheduler, model: ScriptedModel) -> tuple[StepPlan, StepOutcome]:
    """Plan, compute and commit one step; an empty plan is not computed."""
    plan = sched.plan()
    if not plan.rows:
        return plan, StepOutcome(emitted=(), chunks=(), frozen=())
    return plan, sched.commit(model.step(plan.rows))


class Recorder:
    """A sink that keeps everything, and wakes whoever waits for some of it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.results: list[StepResult] = []
        self.tokens: dict[str, tuple[int, ...]] = {}
        """Per sequence, from its first emitted position on."""
        self.finishes: dict[str, FinishReason] = {}
        self.grants: dict[str, Granted] = {}
        self.chunks: dict[str, list[ChunkDone]] = {}
        self.frozen: dict[str, Frozen] = {}
        self.withdrawn: list[str] = []
        self.timings: dict[str, SequenceTiming] = {}
        self.failure: BaseException | None = None
        self._next_positions: dict[str, int] = {}

    def __call__(self, result: StepResult) -> None:
        with self._changed:
            self.results.append(result)
            for emitted in result.emitted:
                before = self._next_positions.get(emitted.seq_id, emitted.position)
                assert emitted.position == before, "a gap or a repeat"
                self._next_positions[emitted.seq_id] = before + len(emitted.token_ids)
                known = self.tokens.get(emitted.seq_id, ())
                self.tokens[emitted.seq_id] = known + emitted.token_ids
                assert emitted.seq_id not in self.finishes, "it had finished"
                if emitted.finish is not None:
                    self.finishes[emitted.seq_id] = emitted.finish
            self.grants.update({granted.seq_id: granted for granted in result.granted})
            for chunk in result.chunks:
                self.chunks.setdefault(chunk.seq_id, []).append(chunk)
            self.frozen.update({each.done.seq_id: each for each in result.frozen})
            self.withdrawn += result.withdrawn
            for timing in result.timings:
                assert timing.seq_id not in self.timings, "timed twice"
                self.timings[timing.seq_id] = timing
            self._changed.notify_all()

    def on_failure(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            self._changed.notify_all()

    def wait_finished(self, *seq_ids: str, timeout_s: float = 20.0) -> None:
        self._wait(lambda: all(s in self.finishes for s in seq_ids), timeout_s)

    def wait_granted(self, *seq_ids: str, timeout_s: float = 20.0) -> None:
        self._wait(lambda: all(s in self.grants for s in seq_ids), timeout_s)

    def wait_tokens(self, seq_id: str, num_tokens: int, timeout_s: float = 20.0) -> None:
        self._wait(lambda: len(self.tokens.get(seq_id, ())) >= num_tokens, timeout_s)

    def wait_frozen(self, seq_id: str, timeout_s: float = 20.0) -> Frozen:
        self._wait(lambda: seq_id in self.frozen, timeout_s)
        return self.frozen[seq_id]

    def wait_failed(self, timeout_s: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.failure is not None, timeout_s)

    def _wait(self, condition, timeout_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or condition(), timeout_s)
            assert self.failure is None, repr(self.failure)
            assert condition(), "timed out"


@dataclass(frozen=True, slots=True)
class EngineUnderTest:
    """An engine with the parts a test looks at."""

    engine: Engine
    model: ScriptedModel
    sink: Recorder

    def submit_all(self, requests: Sequence[EngineRequest]) -> None:
        for each in requests:
            self.engine.submit(each)


@contextmanager
def running_engine(
    sched: Scheduler | None = None, *, gate: StepGate | None = None, clock=None, presence=None
) -> Iterator[EngineUnderTest]:
    """A started engine on a scripted model; at the end stopped, and its invariants proven."""
    sink = Recorder()
    model = ScriptedModel(block_size=BLOCK_SIZE, gate=gate)
    engine = Engine(
        runner=model,
        scheduler=scheduler() if sched is None else sched,
        sink=sink,
        clock=clock or MonotonicClock(),
        on_failure=sink.on_failure,
        presence=presence,
    )
    engine.start()
    try:
        yield EngineUnderTest(engine, model, sink)
    finally:
        if gate is not None:
            gate.open()
        engine.stop(timeout_s=10.0)
    engine.check()
