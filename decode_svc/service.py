"""The sessions of coordinators with a decode worker.

    1. a submit goes to the engine, or first to the lander if its KV is held elsewhere
    2. each step's tokens are told at once, with the first of them what came before them
    3. a running attempt that is to move is held for another worker, while it runs on
    4. a cancel, or the end of the session, takes everything back

An attempt lives here until it has finished, failed, moved or been cancelled.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import grpc
import structlog

from decode_svc import convert
from decode_svc.convert import HandoffCost, Outcome, PrefillCost
from decode_svc.landing import Landed, Lander
from decode_svc.under_way import Source
from kvrelay.clock import Clock
from kvrelay.engine.engine import Engine
from kvrelay.engine.request import (
    ChunkDone,
    Emitted,
    EngineRequest,
    SequenceTiming,
    StepResult,
)
from kvrelay.errors import (
    Cancelled,
    InvalidRequest,
    NotFound,
    QueueFull,
    QuiescenceLost,
    ServingError,
)
from kvrelay.handoff.holds import Hold, HoldState
from kvrelay.handoff.keeper import HoldKeeper
from kvrelay.rpc.convert import header_to_wire
from kvrelay.rpc.session import Attempt, Session
from kvrelay.rpc.sessions import Sessions
from kvrelay.rpc.submit import ModelBounds
from kvrelay.transfer.speeds import LinkSpeeds
from kvrelay.types import WorkerLoad
from kvrelay.v1 import decode_pb2 as pb
from kvrelay.v1 import decode_pb2_grpc as pb_grpc

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Live:
    """An attempt that is landing, waiting or generating."""

    attempt: Attempt
    session: Session[Outcome]
    prompt_ids: tuple[int, ...]
    landing: asyncio.Task[None] | None = None
    """Brings its KV here. None once it has joined, or if it computes its prompt itself."""

    landed: Landed | None = None
    """What came by handoff and has not been told yet."""

    num_told: int = 0
    """Generated tokens that the caller had when the attempt was submitted."""

    hold: Hold | None = None
    """Of another worker that shall go on with it."""

    offer: int = 0
    """The engine's number of that."""


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    """Turns messages into engine calls and back; decides nothing.

    Everything but the engine's own work happens in the event loop.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        lander: Lander,
        bounds: ModelBounds,
        keeper: HoldKeeper,
        max_landings: int,
        speeds: LinkSpeeds,
        clock: Clock,
        on_failure: Callable[[BaseException], None],
        worker_id: str,
        epoch: str,
    ) -> None:
        self._engine = engine
        self._lander = lander
        self._bounds = bounds
        self._keeper = keeper
        self._max_landings = max_landings
        self._speeds = speeds
        self._clock = clock
        self._on_failure = on_failure
        self._header = header_to_wire(worker_id, epoch)
        self._live: dict[str, _Live] = {}  # by seq_id
        self._landings: set[asyncio.Task[None]] = set()
        self._num_landed = 0
        self._sessions: Sessions[Outcome, pb.DecodeSubmit] = Sessions(
            start=self._start,
            cancel=self._cancel,
            others={"hand_over": self._hand_over, "cancel_hand_over": self._cancel_hand_over},
            failed=_failed,
            merge=_merged,
        )

    async def Decode(
        self,
        request_iterator: AsyncIterator[pb.DecodeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[pb.DecodeResponse]:
        """See `DecodeService.Decode` in protos/kvrelay/v1/decode.proto."""
        await context.send_initial_metadata(())  # the session stands: work may be placed here
        async with aclosing(self._sessions.converse(request_iterator)) as batches:
            async for outcomes in batches:
                yield convert.outcomes_to_wire(self._header, outcomes)

    def take_step(self, result: StepResult) -> None:
        """What an engine step says. Called in the event loop; late news of the gone is dropped."""
        timings = {timing.seq_id: timing for timing in result.timings}
        for grant in result.granted:
            self._lander.granted(grant)
        for emitted in result.emitted:
            self._tell(emitted, timings.get(emitted.seq_id))
        for chunk in result.chunks:
            self._advance(chunk)
        for frozen in result.frozen:
            if (hold := self._advance(frozen.done)) is not None:
                self._keeper.complete(hold, frozen.output_ids)
        for seq_id in result.withdrawn:
            live = self._live.get(seq_id)
            if live is not None and live.hold is not None:
                self._keeper.lapse(live.hold)

    def load(self) -> WorkerLoad:
        """How this worker is now."""
        return self._engine.load().worker_load(
            handoff_holds=self._lander.num_landing,
            handoffs_total=self._num_landed,
            waiting_handoffs=self._lander.num_waiting_for_blocks,
            links=self._speeds.speeds(self._clock.now()),
            is_draining=self._sessions.is_draining,
        )

    def begin_drain(self) -> None:
        self._sessions.begin_drain()

    async def drained(self) -> None:
        """Return once no session is left, and nothing writes into our cache."""
        await self._sessions.drained()
        await asyncio.gather(*self._landings, return_exceptions=True)

    def _start(self, session: Session[Outcome], attempt: Attempt, message: pb.DecodeSubmit) -> None:
        submit = convert.submit_from_wire(attempt, message, self._bounds)
        if attempt.seq_id in self._live:
            raise InvalidRequest("attempt", f"{attempt.number} was submitted before")
        live = _Live(attempt, session, submit.request.prompt_ids)
        if submit.source is None:
            self._engine.submit(submit.request)
        else:
            self._require_room()
            live.num_told = len(submit.request.output_ids)
            source = Source(submit.source, submit.is_running)
            live.landing = asyncio.create_task(self._land(live, submit.request, source))
            self._landings.add(live.landing)
            live.landing.add_done_callback(self._landing_done)
        self._live[attempt.seq_id] = live

    def _require_room(self) -> None:
        queued, limit = len(self._landings), self._max_landings
        if queued >= limit:
            raise QueueFull(what="handoffs", queued=queued, limit=limit)

    async def _land(self, live: _Live, request: EngineRequest, source: Source) -> None:
        try:
            await self._lander.land(request, source, partial(self._landed, live))
        except QuiescenceLost:
            raise  # nobody knows what is still written: see `_landing_done`
        except ServingError as error:
            self._fail(live, error)

    def _landing_done(self, task: "asyncio.Task[None]") -> None:
        self._landings.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a copy that may not be over, or our bug: crash-only
            log.critical("landing.unsafe", exc_info=error)
            self._on_failure(error)

    def _landed(self, live: _Live, landed: Landed) -> None:
        if self._live.get(live.attempt.seq_id) is not live:
            raise Cancelled("called off while it landed")
        live.landed = landed
        live.landing = None
        self._num_landed += 1

    def _fail(self, live: _Live, error: ServingError) -> None:
        if self._live.get(live.attempt.seq_id) is not live:
            return  # called off meanwhile: nobody wants to know
        log.info("handoff.failed", reason=error.reason, problem=str(error))
        live.session.outbox.put(live.attempt, _failed(live.attempt, error))
        self._end(live)

    def _cancel(self, session: Session[Outcome], attempt: Attempt) -> None:
        live = self._live.get(attempt.seq_id)
        if live is None or live.session is not session:
            return
        if live.landing is not None:
            live.landing.cancel()  # it gives its blocks back when nothing writes to them
        else:
            self._engine.release(attempt.seq_id)
        self._end(live)

    # Moving away

    def _hand_over(self, session: Session[Outcome], attempt: Attempt, message: pb.HandOver) -> None:
        """Hold a running attempt for another worker. One that does not run leaves nothing to
        pull: its puller is refused, and the attempt goes on here.
        """
        order = convert.hand_over_from_wire(attempt, message)
        if self._keeper.holds.was_begun(order.handoff_id):
            return  # said twice
        live = self._live.get(attempt.seq_id)
        if live is None or live.session is not session or live.hold is not None:
            self._keeper.refuse(order.handoff_id, puller_id=order.puller_id)
            return
        try:
            done = self._engine.offer(attempt.seq_id)
        except NotFound as error:
            log.info("handoff.not_offered", reason=str(error))
            self._keeper.refuse(order.handoff_id, puller_id=order.puller_id)
            return
        live.hold = self._keeper.begin(
            order.handoff_id,
            puller_id=order.puller_id,
            seq_id=attempt.seq_id,
            prompt_ids=live.prompt_ids,
            on_end=partial(self._hold_ended, live),
            is_running=True,
        )
        live.offer = done.offer
        self._keeper.advance(live.hold, done)

    def _cancel_hand_over(
        self, session: Session[Outcome], attempt: Attempt, message: pb.CancelHandOver
    ) -> None:
        live = self._live.get(attempt.seq_id)
        if live is None or live.session is not session or live.hold is None:
            return
        if live.hold.handoff_id == message.handoff_id:
            self._keeper.lapse(live.hold)

    def _hold_ended(self, live: _Live, state: HoldState) -> None:
        hold, live.hold = live.hold, None
        assert hold is not None
        if state is HoldState.RELEASED:
            moved = Outcome(attempt=live.attempt, num_moved_outputs=len(hold.output_ids))
            live.session.outbox.put(live.attempt, moved)
            self._engine.release(live.attempt.seq_id)
            self._end(live)
        elif state is HoldState.LAPSED:
            self._engine.resume(live.attempt.seq_id)

    def _advance(self, chunk: ChunkDone) -> Hold | None:
        """Tell the hold that this is said for; None if it has ended. A step's news may be on its
        way while its sequence is handed over anew.
        """
        live = self._live.get(chunk.seq_id)
        if live is None or live.hold is None or live.offer != chunk.offer:
            return None
        self._keeper.advance(live.hold, chunk)
        return live.hold

    # Outcomes

    def _tell(self, emitted: Emitted, timing: SequenceTiming | None) -> None:
        live = self._live.get(emitted.seq_id)
        if live is None:
            return
        position, token_ids = emitted.position, emitted.token_ids
        if live.landed is not None:
            # What the holder generated and the caller may not have: it may be lost since then.
            untold = live.landed.output_ids[live.num_told :]
            position, token_ids = position - len(untold), (*untold, *token_ids)
        outcome = Outcome(
            attempt=live.attempt,
            position=position,
            token_ids=token_ids,
            finish=emitted.finish,
            cost=_cost(live.landed, timing),
        )
        live.landed = None
        live.session.outbox.put(live.attempt, outcome)
        if emitted.finish is not None:
            self._end(live)

    def _end(self, live: _Live) -> None:
        del self._live[live.attempt.seq_id]
        if live.hold is not None:
            self._keeper.finish(live.hold)
        self._sessions.end(live.session, live.attempt)


def _failed(attempt: Attempt, failure: ServingError) -> Outcome:
    return Outcome(attempt=attempt, failure=failure)


def _cost(landed: Landed | None, timing: SequenceTiming | None) -> HandoffCost | PrefillCost | None:
    """What came before the first token told; None with every later one."""
    if landed is not None:
        if timing is None:  # its first token was its last, so it took no step here
            return landed.cost
        return replace(landed.cost, join_s=timing.queue_s, first_step_s=timing.prefill_s)
    if timing is None:
        return None
    return PrefillCost(
        queue_s=timing.queue_s,
        prefill_s=timing.prefill_s,
        cached_prompt_tokens=timing.num_cached_tokens,
    )


def _merged(before: Outcome, after: Outcome) -> Outcome:
    """Two things an attempt has to say, as one."""
    is_last_word = after.failure is not None or after.num_moved_outputs is not None
    assert before.position + len(before.token_ids) == after.position or is_last_word
    return Outcome(
        attempt=before.attempt,
        position=before.position,
        token_ids=before.token_ids + after.token_ids,
        finish=after.finish,
        cost=before.cost or after.cost,
        failure=after.failure,
        num_moved_outputs=after.num_moved_outputs,
    )
