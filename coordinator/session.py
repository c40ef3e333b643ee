"""One request, from its admission to its end, over as many placements as it takes.

    1. place it: a prefill and a decode worker together, or a decode worker alone
    2. tell both at once, with the tokens the caller already has
    3. hand every new token on at once, whoever sampled it, in order of position
    4. a worker, handoff or KV lost: back to 1
    5. asked to move: a second attempt goes on where the first is; until it has said something, both
       are heard, and if it fails it was nothing
    6. at the end, whatever end it is, both sides forget it and its ledger is closed

What the workers compute is a function of tokens, parameters and seed alone, so the tokens of
a second attempt continue those of the first, and a position that comes twice comes equal.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from coordinator.convert import (
    FirstToken,
    HandoffCost,
    LocalPrefill,
    Lost,
    Moved,
    Output,
    Work,
)
from coordinator.inbox import Ended, Inbox, Order, Said
from coordinator.lifecycle import Event, Losses, Patience, Phase, advance
from coordinator.moves import Movable, Move, MoveOutcome, MoveReason
from coordinator.pool import Pool
from coordinator.router import Placement, RouteRequest
from coordinator.runs import MoveWatch, Run
from coordinator.turns import Turns
from kvrelay.clock import Clock
from kvrelay.errors import DeadlinePassed, HandoffLost, NoWorker, ServingError
from kvrelay.obs.ledger import LedgerBuilder
from kvrelay.types import FinishReason, SamplingParams

log = structlog.get_logger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An admitted request: everything that decides its tokens."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    cache_salt: bytes
    route: RouteRequest


@dataclass(frozen=True, slots=True)
class NewTokens:
    """Tokens the caller has not seen, in order, and whether they end the request."""

    token_ids: tuple[int, ...]
    finish: FinishReason | None


class Session:
    """Drives one request. `tokens` is consumed once; closing it early cancels the request."""

    def __init__(
        self,
        job: Job,
        *,
        pool: Pool,
        place: Callable[[RouteRequest], Placement | None],
        patience: Patience,
        ledger: LedgerBuilder,
        clock: Clock,
        mint_id: Callable[[], str],
        deadline_s: float | None,
        turns: Turns,
    ) -> None:
        self.phase = Phase.QUEUED
        self._job = job
        self._pool = pool
        self._place_once = place
        self._patience = patience
        self._ledger = ledger
        self._clock = clock
        self._mint_id = mint_id
        self._deadline_s = deadline_s
        self._inbox = Inbox(turns)
        self._order = Order(0)
        self._run: Run | None = None
        self._successor: Run | None = None
        self._num_attempts = 0
        self._emitted: list[int] = []
        self._losses = Losses(patience)
        self._num_relieved = 0
        self._num_failed_moves = 0

    async def tokens(self) -> AsyncGenerator[NewTokens, None]:
        """Yield new tokens until the request has finished.

        Raises:
            NoWorker: none could take it within the queue limit, or every attempt was lost.
            DeadlinePassed: naming the phase.
            KvCorrupt: for the second time.
            Overloaded: no worker had room within the queue limit.
        """
        try:
            while self.phase is not Phase.FINISHED:
                if self.phase is Phase.QUEUED:
                    self._begin(await self._place())
                heard = await self._hear()
                if isinstance(heard, Lost):
                    self._lost(heard)
                elif isinstance(heard, Moved):
                    self._moved(heard)
                elif (batch := self._accept(heard)).token_ids:
                    yield batch
        except ServingError:
            self.phase = advance(self.phase, Event.GIVEN_UP)
            raise
        finally:
            self._end_runs()
            if self.phase not in (Phase.FINISHED, Phase.FAILED):
                self.phase = advance(self.phase, Event.CALLER_GONE)

    def stop(self) -> None:
        """End the request after the tokens yielded last: a stop string was found in them."""
        self.phase = advance(self.phase, Event.LAST_TOKEN)

    @property
    def movable(self) -> Movable | None:
        """What a planner of moves needs to know; None while it cannot move."""
        run = self._run
        if self.phase is not Phase.DECODING or run is None or self._successor is not None:
            return None
        return Movable(
            request_id=self._job.request_id,
            source=run.placement.decode,
            num_tokens=len(self._job.prompt_ids) + len(self._emitted),
            num_slots=self._job.route.num_slots,
            last_token_at_s=self._ledger.last_token_at_s,
            num_relieved=self._num_relieved,
            num_failed=self._num_failed_moves,
        )

    def move(self, move: Move, *, on_end: Callable[[MoveOutcome], None]) -> None:
        """Have another decode worker go on with it. `on_end` is told once how that came out."""
        run = self._run
        assert run is not None
        assert self.movable is not None
        assert move.source is run.placement.decode
        self._num_relieved += move.reason is MoveReason.RELIEF
        watch = MoveWatch(move, put=self._inbox.put, on_lost=self._move_failed, on_end=on_end)
        placement = Placement(
            prefill=None,
            decode=move.target,
            offer=move.offer,
            reason=f"{move.reason.value} of {move.source.worker_id}",
            num_prefill_tokens=0,
            running=move.source,
        )
        self._successor = self._dispatch(placement, watch=watch, running_attempt=run.number)

    async def _place(self) -> Placement:
        """Wait until the router finds workers, at most the queue limit.

        Going back to a worker that lost or refused this request waits for news of the pool
        first; trying it again at once would tell nothing new.
        """
        limit_s = self._patience.queue_limit_s
        until_s = self._clock.now() + limit_s
        is_news = not self._losses.errors
        while True:
            self._require_time()
            placement = self._place_once(self._route())
            if placement is not None and (is_news or not placement.involves(self._losses.suspects)):
                return placement
            try:
                await self._within(self._pool.wait_change(), until_s)
            except TimeoutError:
                self._require_time()
                raise NoWorker(
                    f"no suitable worker within {limit_s} s: {self._pool.able}",
                    queue_limit_s=limit_s,
                ) from None
            is_news = True

    def _route(self) -> RouteRequest:
        losses = self._losses
        return replace(self._job.route, avoid=losses.suspects, kv_dtype=losses.kv_dtype)

    def _begin(self, placement: Placement) -> None:
        self._run = self._dispatch(placement)
        self._order = Order(len(self._emitted))
        self.phase = advance(self.phase, Event.PLACED)
        prefiller = placement.prefill or placement.decode
        self._ledger.dispatched(self._clock.now())
        self._ledger.prefill_worker = prefiller.worker_id
        self._ledger.route_reason = placement.reason

    def _dispatch(
        self,
        placement: Placement,
        *,
        watch: MoveWatch | None = None,
        running_attempt: int = 0,
    ) -> Run:
        self._num_attempts += 1
        work = Work(
            request_id=self._job.request_id,
            attempt=self._num_attempts,
            handoff_id=self._mint_id(),
            prompt_ids=self._job.prompt_ids,
            emitted_ids=tuple(self._emitted),
            sampling=self._job.sampling,
            max_tokens=self._job.max_tokens,
            stop_token_ids=self._job.stop_token_ids,
            cache_salt=self._job.cache_salt,
            running_attempt=running_attempt,
        )
        hear = self._inbox.put if watch is None else watch.hear
        attempt = self._pool.dispatch(work, placement, self._job.route, hear)
        return Run(work, placement, attempt, watch)

    def _close(self, run: Run) -> None:
        run.close()
        self._pool.settle(run.work, run.placement)

    def _end_runs(self) -> None:
        """Whatever still runs or moves is called off."""
        runs, self._run, self._successor = (self._run, self._successor), None, None
        for run in runs:
            if run is not None:
                self._close(run)

    def _accept(self, heard: Sequence[Said]) -> NewTokens:
        """The tokens that are now due."""
        num_before = len(self._emitted)
        finish = None
        for news in heard:
            run = self._run
            if run is None or news.attempt != run.number:
                run = self._successor_of(news)
            if run is None:
                continue  # of an attempt that was given up
            self._note(news, run)
            token_ids, finish = self._order.accept(news)
            self._emitted += token_ids
            if finish is not None:
                run.is_over = isinstance(news, Output)
                self.phase = advance(self.phase, Event.LAST_TOKEN)
                break
        return NewTokens(tuple(self._emitted[num_before:]), finish)

    def _successor_of(self, news: Said) -> Run | None:
        """The attempt that was to go on and just did, if it is the one that says so."""
        if self._successor is not None and news.attempt == self._successor.number:
            return self._succeed(self._successor)
        return None

    def _succeed(self, successor: Run) -> Run:
        """From here on only the other worker is heard. Whatever the one that it left had to say
        comes from there again.
        """
        left, self._run, self._successor = self._run, successor, None
        assert left is not None
        assert successor.watch is not None
        left.is_over = True
        self._close(left)
        successor.watch.is_alone = True
        successor.attempt.took_over()
        self._ledger.moved()
        self._ledger.decode_worker = successor.decode_worker
        log.info(
            "request.moved",
            request_id=self._job.request_id,
            attempt=successor.number,
            source=left.decode_worker,
            target=successor.decode_worker,
            reason=successor.watch.move.reason.value,
            position=len(self._emitted),
        )
        return successor

    def _note(self, news: Said, run: Run) -> None:
        """Keep the books: the phase, the load we count on workers, the ledger."""
        if isinstance(news, FirstToken):
            run.is_prefilled = True
            self._pool.prefilled(run.work, run.placement)
            if not run.work.emitted_ids:
                self._note_prefill(news)
            self._note_repeated(0, (news.token_id,))
            return
        if news.position < len(self._emitted):
            self._note_repeated(news.position, news.token_ids)
        if self.phase is Phase.PREFILLING:
            self.phase = advance(self.phase, Event.DECODE_STARTED)
            self._pool.prefilled(run.work, run.placement)
            self._ledger.decode_worker = run.decode_worker
            self._note_start(news.cost)

    def _note_repeated(self, position: int, token_ids: Sequence[int]) -> None:
        """Tokens that were told before must be the same. They need not be where workers keep KV in
        different dtypes.
        """
        known = self._emitted[position : position + len(token_ids)]
        if known == list(token_ids[: len(known)]):
            return
        is_promised = len({member.kv_dtype for member in self._pool.members()}) == 1
        log.log(
            logging.ERROR if is_promised else logging.WARNING,
            "request.token_differs",
            request_id=self._job.request_id,
            position=position,
        )

    def _note_start(self, cost: HandoffCost | LocalPrefill | None) -> None:
        """What came before the decode worker's first word."""
        if isinstance(cost, LocalPrefill):
            if not self._emitted:
                self._note_prefill(cost)
        elif cost is not None:
            if len(self._emitted) <= 1:
                self._ledger.gap1_stages = dict(cost.stages)
            self._ledger.transport = cost.transport
            self._ledger.handoff_num_bytes = cost.num_bytes
            self._ledger.overlapped_num_bytes = cost.overlapped_num_bytes

    def _note_prefill(self, cost: FirstToken | LocalPrefill) -> None:
        self._ledger.queue_s = cost.queue_s
        self._ledger.prefill_s = cost.prefill_s
        self._ledger.cached_prompt_tokens = cost.cached_prompt_tokens

    def _lost(self, news: Lost) -> None:
        """The attempt cannot go on."""
        run = self._run
        if run is None or news.attempt != run.number:
            return  # it was given up before
        if self.phase is Phase.DECODING and news.worker_id != run.decode_worker:
            return  # the holder's part is over: its hold was released
        if news.is_orderly and run.is_prefilled and news.worker_id != run.decode_worker:
            return  # it left because its part is over; if not, whoever pulls from it says so
        if self._successor is not None:
            # Had it handed over? The other worker knows, and tells: by a token, or by a loss.
            self._succeed(self._successor)
            return
        suspects = _suspects(news, run.placement)
        self._give_up(run, news.error, worker_id=news.worker_id, suspects=suspects)

    def _moved(self, news: Moved) -> None:
        run = self._run
        if run is None or news.attempt != run.number:
            return
        run.is_over = True
        if self._successor is not None:
            self._succeed(self._successor)
            return
        # Its new worker was lost after it had taken over, and before it said a word.
        error = HandoffLost(f"{run.decode_worker} handed it over to a worker that was lost")
        self._give_up(run, error, worker_id=run.decode_worker, suspects=frozenset())

    def _move_failed(self, news: Lost) -> None:
        """It goes on where it is."""
        failed, self._successor = self._successor, None
        assert failed is not None
        self._close(failed)
        self._num_failed_moves += 1
        log.log(
            logging.INFO if news.error.retryable else logging.ERROR,
            "request.move_failed",
            request_id=self._job.request_id,
            attempt=news.attempt,
            target=failed.decode_worker,
            reason=news.error.reason,
            problem=str(news.error),
        )

    def _give_up(
        self, run: Run, error: ServingError, *, worker_id: str, suspects: Set[str]
    ) -> None:
        """Place it again, unless the losses so far say that this is its end."""
        if not error.retryable:
            # A worker was asked for what can never be: our fault, not the caller's.
            raise RuntimeError(f"{worker_id} refused an attempt: {error.reason}")
        self._ledger.lost(error.reason)
        log.info(
            "request.attempt_lost",
            request_id=self._job.request_id,
            attempt=run.number,
            worker_id=worker_id,
            reason=error.reason,
            position=len(self._emitted),
        )
        self._end_runs()
        final = self._losses.add(
            error, suspects, kv_dtype=run.placement.decode.kv_dtype, now_s=self._clock.now()
        )
        if final is not None:
            raise final
        self.phase = advance(self.phase, Event.ATTEMPT_LOST)

    async def _hear(self) -> Ended | Sequence[Said]:
        """What the workers say: the first token as soon as it is here, later ones in turn."""
        self._require_time()
        try:
            return await self._within(self._inbox.get(is_urgent=not self._emitted), None)
        except TimeoutError:
            raise DeadlinePassed(self.phase.name.lower()) from None

    async def _within(self, awaitable: Awaitable[_T], until_s: float | None) -> _T:
        """Await until the earlier of `until_s` and the deadline; TimeoutError past it."""
        limits_s = [limit_s for limit_s in (until_s, self._deadline_s) if limit_s is not None]
        if not limits_s:
            return await awaitable
        async with asyncio.timeout(min(limits_s) - self._clock.now()):
            return await awaitable

    def _require_time(self) -> None:
        if self._deadline_s is not None and self._clock.now() >= self._deadline_s:
            raise DeadlinePassed(self.phase.name.lower())


def _suspects(news: Lost, placement: Placement) -> Set[str]:
    """Who may be the cause. A worker that takes a sequence over speaks of the one it comes from."""
    if not news.is_reported:
        return {news.worker_id}
    return placement.worker_ids if placement.running is None else set()
