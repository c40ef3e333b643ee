"""The sessions of coordinators with a prefill worker.

    1. a submit goes to the engine, and a hold begins under its handoff_id
    2. each step's chunks advance holds; a first token completes its hold and is told at once
    3. a cancel, or the end of the session, takes everything back

An attempt lives here until its hold has ended, whoever ended it.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from kvrelay.engine.engine import Engine
from kvrelay.engine.request import ChunkDone, Emitted, SequenceTiming, StepResult
from kvrelay.errors import InvalidRequest, ServingError
from kvrelay.handoff.holds import Hold, HoldState
from kvrelay.handoff.keeper import HoldKeeper
from kvrelay.rpc.convert import header_to_wire
from kvrelay.rpc.session import Attempt, Session
from kvrelay.rpc.sessions import Sessions
from kvrelay.rpc.submit import ModelBounds
from kvrelay.types import WorkerLoad
from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1 import prefill_pb2_grpc as pb_grpc
from prefill_svc import convert
from prefill_svc.convert import Outcome

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True)
class _Live:
    """An attempt that holds blocks, or will."""

    attempt: Attempt
    session: Session[Outcome]
    hold: Hold


class PrefillServicer(pb_grpc.PrefillServiceServicer):
    """Turns messages into engine calls and back; decides nothing.

    Everything but the engine's own work happens in the event loop.
    """

    def __init__(
        self, *, engine: Engine, keeper: HoldKeeper, bounds: ModelBounds, worker_id: str, epoch: str
    ) -> None:
        self._engine = engine
        self._keeper = keeper
        self._bounds = bounds
        self._header = header_to_wire(worker_id, epoch)
        self._live: dict[str, _Live] = {}  # by seq_id
        self._sessions: Sessions[Outcome, pb.PrefillSubmit] = Sessions(
            start=self._start, cancel=self._cancel, failed=_failed, merge=_latest
        )

    async def Prefill(
        self,
        request_iterator: AsyncIterator[pb.PrefillRequest],
        context: Context,
    ) -> AsyncIterator[pb.PrefillResponse]:
        """See `PrefillService.Prefill` in protos/kvrelay/v1/prefill.proto."""
        await context.send_initial_metadata(())  # the session stands: work may be placed here
        async with aclosing(self._sessions.converse(request_iterator)) as batches:
            async for outcomes in batches:
                yield convert.outcomes_to_wire(self._header, outcomes)

    def take_step(self, result: StepResult) -> None:
        """What an engine step says. Called in the event loop; late news of the gone is dropped."""
        timings = {timing.seq_id: timing for timing in result.timings}
        for chunk in result.chunks:
            self._advance(chunk)
        for emitted in result.emitted:
            self._complete(emitted, timings.get(emitted.seq_id))

    def load(self) -> WorkerLoad:
        """How this worker is now."""
        holds = self._keeper.holds
        return self._engine.load().worker_load(
            handoff_holds=holds.num_waiting_for_release,
            handoffs_total=holds.num_released,
            waiting_handoffs=holds.num_waiting_for_release,
            is_draining=self._sessions.is_draining,
        )

    def begin_drain(self) -> None:
        self._sessions.begin_drain()

    async def drained(self) -> None:
        await self._sessions.drained()

    def _start(
        self, session: Session[Outcome], attempt: Attempt, message: pb.PrefillSubmit
    ) -> None:
        submit = convert.submit_from_wire(attempt, message, self._bounds)
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

    def _cancel(self, session: Session[Outcome], attempt: Attempt) -> None:
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
            self._keeper.complete(live.hold, (token_id,))
        else:
            self._keeper.finish(live.hold)

    def _end(self, seq_id: str, state: HoldState) -> None:
        """The keeper says that nothing is held any more, however that came."""
        del state
        self._engine.release(seq_id)
        live = self._live.pop(seq_id)
        self._sessions.end(live.session, live.attempt)


def _failed(attempt: Attempt, failure: ServingError) -> Outcome:
    return Outcome(attempt=attempt, failure=failure)


def _latest(before: Outcome, after: Outcome) -> Outcome:
    """An attempt says one thing; only a protocol violation makes it say two."""
    del before
    return after
