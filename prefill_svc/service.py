"""The sessions of coordinators with a prefill worker.

    1. a submit goes to the engine, and a hold begins under its handoff_id
    2. each step's chunks advance holds; a first token completes its hold and is told at once
    3. a cancel, or the end of the session, takes everything back

An attempt lives here until its hold has ended, whoever ended it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import structlog

from kvrelay.engine.engine import Engine
from kvrelay.engine.request import ChunkDone, Emitted, SequenceTiming, StepResult
from kvrelay.errors import Draining, InvalidRequest, ServingError
from kvrelay.rpc.session import Attempt, Session, converse
from kvrelay.rpc.submit import ModelBounds
from kvrelay.types import WorkerLoad
from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1 import prefill_pb2_grpc as pb_grpc
from prefill_svc import convert
from prefill_svc.convert import Outcome
from prefill_svc.holds import Hold
from prefill_svc.keeper import HoldKeeper

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Live:
    """An attempt that holds blocks, or will."""

    attempt: Attempt
    session: Session[Outcome]
    hold: Hold


class PrefillService(pb_grpc.PrefillServiceServicer):
    """Turns messages into engine calls and back; decides nothing.

    Everything but the engine's own work happens in the event loop.
    """

    def __init__(
        self, *, engine: Engine, keeper: HoldKeeper, bounds: ModelBounds, worker_id: str, epoch: str
    ) -> None:
        self._engine = engine
        self._keeper = keeper
        self._bounds = bounds
        self._header = convert.header_to_wire(worker_id, epoch)
        self._live: dict[str, _Live] = {}  # by seq_id
        self._sessions: set[Session[Outcome]] = set()
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    async def Prefill(
        self,
        request_iterator: AsyncIterator[pb.PrefillRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.PrefillResponse]:
        """See `PrefillService.Prefill` in protos/kvrelay/v1/prefill.proto."""
        session = self._open()
        instructions = converse(request_iterator, session.outbox, partial(self._obey, session))
        try:
            async with aclosing(instructions) as batches:
                async for outcomes in batches:
                    yield convert.outcomes_to_wire(self._header, outcomes)
        finally:
            self._close(session)

    def take_step(self, result: StepResult) -> None:
        """What an engine step says. Called in the event loop; late news of the gone is dropped."""
        timings = {timing.seq_id: timing for timing in result.timings}
        for chunk in result.chunks:
            self._advance(chunk)
        for emitted in result.emitted:
            self._complete(emitted, timings.get(emitted.seq_id))

    def load(self) -> WorkerLoad:
        """How this worker is now."""
        load = self._engine.load()
        holds = self._keeper.holds
        return WorkerLoad(
            free_blocks=load.blocks.free,
            cached_blocks=load.blocks.cached,
            held_blocks=load.blocks.held,
            waiting_sequences=load.waiting,
            running_sequences=load.running,
            handoff_holds=holds.num_waiting_for_release,
            queued_prompt_tokens=load.queued_prompt_tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_s=load.step_s,
            handoffs_total=holds.num_released,
            preemptions_total=load.preemptions_total,
            is_draining=self._is_draining,
        )

    def begin_drain(self) -> None:
        """Take nothing new; each session ends once its last attempt has."""
        self._is_draining = True
        for session in self._sessions:
            self._end_if_drained(session)

    async def drained(self) -> None:
        """Return once no session is left."""
        await self._idle.wait()

    def _open(self) -> Session[Outcome]:
        if self._is_draining:
            raise Draining("this worker is leaving the pool")
        session: Session[Outcome] = Session(_latest)
        self._sessions.add(session)
        self._idle.clear()
        log.info("session.opened", num_sessions=len(self._sessions))
        return session

    def _close(self, session: Session[Outcome]) -> None:
        num_cancelled = len(session.attempts)
        for attempt in list(session.attempts):
            self._cancel(session, attempt)
        self._sessions.discard(session)
        if not self._sessions:
            self._idle.set()
        log.info("session.closed", num_cancelled=num_cancelled)

    def _obey(self, session: Session[Outcome], message: pb.PrefillRequest) -> None:
        match message.WhichOneof("instruction"):
            case "submit":
                self._submit(session, message.submit)
            case "cancel":
                self._cancel(session, convert.attempt_from_wire(message.cancel))
            case _:
                raise InvalidRequest("instruction", "one of submit or cancel must be given")

    def _submit(self, session: Session[Outcome], message: pb.PrefillSubmit) -> None:
        # An attempt without a proper name cannot fail by itself: that ends the session.
        attempt = convert.attempt_from_wire(message)
        try:
            self._start(session, convert.submit_from_wire(message, self._bounds))
        except ServingError as error:
            session.outbox.put(attempt, Outcome(attempt=attempt, failure=error))

    def _start(self, session: Session[Outcome], submit: convert.Submit) -> None:
        if self._is_draining:
            raise Draining("this worker is leaving the pool")
        attempt = submit.attempt
        if attempt.seq_id in self._live:
            raise InvalidRequest("attempt", f"{attempt.number} was submitted before")
        self._engine.submit(submit.request)
        try:
            hold = self._keeper.begin(
                submit.handoff_id,
                puller_id=submit.puller_id,
                seq_id=attempt.seq_id,
                prompt_ids=submit.request.prompt_ids,
                on_end=partial(self._end, attempt.seq_id),
            )
        except ServingError:
            self._engine.release(attempt.seq_id)
            raise
        self._live[attempt.seq_id] = _Live(attempt, session, hold)
        session.attempts.add(attempt)

    def _cancel(self, session: Session[Outcome], attempt: Attempt) -> None:
        session.outbox.drop(attempt)
        live = self._live.get(attempt.seq_id)
        if live is not None and live.session is session:
            self._keeper.lapse(live.hold)

    def _advance(self, chunk: ChunkDone) -> None:
        live = self._live.get(chunk.seq_id)
        if live is not None:
            self._keeper.advance(live.hold, chunk)

    def _complete(self, emitted: Emitted, timing: SequenceTiming | None) -> None:
        live = self._live.get(emitted.seq_id)
        if live is None:
            return
        assert timing is not None, "a first token without its timing"
        (token_id,) = emitted.token_ids
        outcome = Outcome(
            attempt=live.attempt,
            token_id=token_id,
            finish=emitted.finish,
            queue_s=timing.queue_s,
            prefill_s=timing.prefill_s,
            cached_prompt_tokens=timing.num_cached_tokens,
        )
        live.session.outbox.put(live.attempt, outcome)
        if emitted.finish is None:
            self._keeper.complete(live.hold, token_id)
        else:
            self._keeper.finish(live.hold)

    def _end(self, seq_id: str) -> None:
        """The keeper says that nothing is held any more."""
        live = self._live.pop(seq_id)
        live.session.end(live.attempt)
        self._end_if_drained(live.session)

    def _end_if_drained(self, session: Session[Outcome]) -> None:
        if self._is_draining and not session.attempts:
            session.outbox.close()


def _latest(before: Outcome, after: Outcome) -> Outcome:
    """An attempt says one thing; only a protocol violation makes it say two."""
    del before
    return after
