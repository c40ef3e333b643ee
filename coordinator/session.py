"""One request, from its admission to its end, over as many placements as it takes.

    1. place it: a prefill and a decode worker together, or a decode worker alone
    2. tell both at once, with the tokens the caller already has
    3. hand every new token on at once, whoever sampled it, in order of position
    4. a worker, handoff or KV lost: back to 1
    5. at the end, whatever end it is, both sides forget it and its ledger is closed

What the workers compute is a function of tokens, parameters and seed alone, so the tokens of
a second attempt continue those of the first, and a position that comes twice comes equal.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from coordinator.convert import FirstToken, HandoffCost, LocalPrefill, Lost, Output, Work
from coordinator.inbox import Inbox, Order, Said
from coordinator.lifecycle import Event, Patience, Phase, advance, verdict
from coordinator.pool import Pool
from coordinator.router import Placement, RouteRequest
from coordinator.turns import Turns
from kvrelay.clock import Clock
from kvrelay.errors import DeadlinePassed, NoWorker, Overloaded, ServingError
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
        self._turns = turns
        self._emitted: list[int] = []
        self._losses: list[ServingError] = []
        self._avoid: frozenset[str] = frozenset()
        self._refused_at_s: float | None = None

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
                placement = await self._place()
                async with contextlib.aclosing(self._attempt(placement)) as batches:
                    async for batch in batches:
                        yield batch
        except ServingError:
            self.phase = advance(self.phase, Event.GIVEN_UP)
            raise
        finally:
            if self.phase not in (Phase.FINISHED, Phase.FAILED):
                self.phase = advance(self.phase, Event.CALLER_GONE)

    def stop(self) -> None:
        """End the request after the tokens yielded last: a stop string was found in them."""
        self.phase = advance(self.phase, Event.LAST_TOKEN)

    async def _place(self) -> Placement:
        """Wait until the router finds workers, at most the queue limit.

        Going back to a worker that lost or refused this request waits for news of the pool
        first; trying it again at once would tell nothing new.
        """
        limit_s = self._patience.queue_limit_s
        until_s = self._clock.now() + limit_s
        is_news = not self._losses
        while True:
            self._require_time()
            placement = self._place_once(self._route())
            if placement is not None and (is_news or not placement.involves(self._avoid)):
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
        return replace(self._job.route, avoid=self._avoid)

    async def _attempt(self, placement: Placement) -> AsyncGenerator[NewTokens, None]:
        """Run one placement until the request finishes or the attempt is lost."""
        work = self._work()
        inbox = Inbox(self._turns)
        attempt = self._pool.dispatch(work, placement, self._job.route, inbox.put)
        self._began(placement)
        order = Order(len(self._emitted))
        decode_is_over = False
        try:
            while self.phase in (Phase.PREFILLING, Phase.DECODING):
                heard = await self._hear(inbox)
                if isinstance(heard, Lost):
                    self._lost(heard, placement)
                    continue
                batch = self._accept(heard, order, work, placement)
                if batch.finish is not None:
                    self.phase = advance(self.phase, Event.LAST_TOKEN)
                    decode_is_over = any(isinstance(it, Output) and it.finish for it in heard)
                if batch.token_ids:
                    self._emitted += batch.token_ids
                    yield batch
        finally:
            attempt.close(decode_is_over=decode_is_over)
            self._pool.settle(work, placement)

    def _work(self) -> Work:
        return Work(
            request_id=self._job.request_id,
            attempt=len(self._losses) + 1,
            handoff_id=self._mint_id(),
            prompt_ids=self._job.prompt_ids,
            emitted_ids=tuple(self._emitted),
            sampling=self._job.sampling,
            max_tokens=self._job.max_tokens,
            stop_token_ids=self._job.stop_token_ids,
            cache_salt=self._job.cache_salt,
        )

    def _began(self, placement: Placement) -> None:
        self.phase = advance(self.phase, Event.PLACED)
        prefiller = placement.prefill or placement.decode
        self._ledger.dispatched(self._clock.now())
        self._ledger.prefill_worker = prefiller.worker_id
        self._ledger.route_reason = placement.reason

    def _accept(
        self, heard: Sequence[Said], order: Order, work: Work, placement: Placement
    ) -> NewTokens:
        """The tokens that are now due."""
        due: list[int] = []
        finish = None
        for news in heard:
            self._note(news, work, placement)
            token_ids, finish = order.accept(news)
            due += token_ids
            if finish is not None:
                break
        return NewTokens(tuple(due), finish)

    def _note(self, news: Said, work: Work, placement: Placement) -> None:
        """Keep the books: the phase, the load we count on workers, the ledger."""
        if isinstance(news, FirstToken):
            self._pool.prefilled(work, placement)
            self._note_first_token(news, work)
        elif self.phase is Phase.PREFILLING:
            self.phase = advance(self.phase, Event.DECODE_STARTED)
            self._pool.prefilled(work, placement)
            self._ledger.decode_worker = placement.decode.worker_id
            self._note_start(news)

    def _note_first_token(self, news: FirstToken, work: Work) -> None:
        if not work.emitted_ids:
            self._note_prefill(news)
        if self._emitted and self._emitted[0] != news.token_id:
            log.error("request.token_differs", request_id=work.request_id, position=0)

    def _note_start(self, news: Output) -> None:
        if isinstance(news.cost, HandoffCost):
            self._note_handoff(news.cost)
        elif isinstance(news.cost, LocalPrefill) and not self._emitted:
            self._note_prefill(news.cost)

    def _note_prefill(self, cost: FirstToken | LocalPrefill) -> None:
        self._ledger.queue_s = cost.queue_s
        self._ledger.prefill_s = cost.prefill_s
        self._ledger.cached_prompt_tokens = cost.cached_prompt_tokens

    def _note_handoff(self, cost: HandoffCost) -> None:
        if len(self._emitted) <= 1:
            self._ledger.gap1_stages = dict(cost.stages)
        self._ledger.transport = cost.transport
        self._ledger.handoff_num_bytes = cost.num_bytes
        self._ledger.overlapped_num_bytes = cost.overlapped_num_bytes

    def _lost(self, news: Lost, placement: Placement) -> None:
        """Place it again, unless the losses so far say that this is its end."""
        if self.phase is Phase.DECODING and news.worker_id != placement.decode.worker_id:
            return  # the holder's part is over: its hold was released
        if not news.error.retryable:
            # A worker was asked for what can never be: our fault, not the caller's.
            raise RuntimeError(f"{news.worker_id} refused an attempt: {news.error.reason}")
        now_s = self._clock.now()
        self._losses.append(news.error)
        if isinstance(news.error, Overloaded) and self._refused_at_s is None:
            self._refused_at_s = now_s
        self._avoid |= placement.worker_ids if news.is_reported else {news.worker_id}
        self._ledger.lost(news.error.reason)
        log.info(
            "request.attempt_lost",
            request_id=self._job.request_id,
            attempt=len(self._losses),
            worker_id=news.worker_id,
            reason=news.error.reason,
            position=len(self._emitted),
        )
        refused_s = 0.0 if self._refused_at_s is None else now_s - self._refused_at_s
        error = verdict(self._losses, self._patience, refused_s=refused_s)
        if error is not None:
            raise error
        self.phase = advance(self.phase, Event.ATTEMPT_LOST)

    async def _hear(self, inbox: Inbox) -> Lost | Sequence[Said]:
        """What the workers say: the first token as soon as it is here, later ones in turn."""
        self._require_time()
        try:
            return await self._within(inbox.get(is_urgent=not self._emitted), None)
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
