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
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from coordinator.convert import FirstToken, HandoffCost, LocalPrefill, Lost, News, Output, Work
from coordinator.lifecycle import Event, Phase, advance, verdict
from coordinator.pool import Pool
from coordinator.router import Placement, RouteRequest
from coordinator.workers import Attempt
from kvrelay.clock import Clock
from kvrelay.errors import DeadlinePassed, NoWorker, ServingError
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """How long and how often a request is tried."""

    max_attempts: int
    queue_limit_s: float
    """Longest wait for a suitable worker to appear."""


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
        limits: SessionLimits,
        ledger: LedgerBuilder,
        clock: Clock,
        mint_id: Callable[[], str],
        deadline_s: float | None,
    ) -> None:
        self.phase = Phase.QUEUED
        self.handoff_cost: HandoffCost | None = None
        self._job = job
        self._pool = pool
        self._place_once = place
        self._limits = limits
        self._ledger = ledger
        self._clock = clock
        self._mint_id = mint_id
        self._deadline_s = deadline_s
        self._emitted: list[int] = []
        self._losses: list[ServingError] = []
        self._avoid: frozenset[str] = frozenset()

    async def tokens(self) -> AsyncGenerator[NewTokens, None]:
        """Yield new tokens until the request has finished.

        Raises:
            NoWorker: none could take it within the queue limit, or every attempt was lost.
            DeadlinePassed: naming the phase.
            KvCorrupt: for the second time.
            ServingError: that a worker refused it with.
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
        """Wait until the router finds workers, at most the queue limit."""
        until_s = self._clock.now() + self._limits.queue_limit_s
        while (placement := self._place_once(self._route())) is None:
            try:
                await self._within(self._pool.wait_change(), until_s)
            except TimeoutError:
                self._require_time()
                raise NoWorker(
                    f"no suitable worker within {self._limits.queue_limit_s} s",
                    queue_limit_s=self._limits.queue_limit_s,
                ) from None
        self._require_time()
        return placement

    def _route(self) -> RouteRequest:
        return replace(self._job.route, avoid=self._avoid)

    async def _attempt(self, placement: Placement) -> AsyncGenerator[NewTokens, None]:
        """Run one placement until the request finishes or the attempt is lost."""
        work = self._work()
        inbox = _Inbox()
        attempt = self._pool.dispatch(work, placement, self._job.route, inbox.put)
        self._began(placement)
        order = _Order(len(self._emitted))
        decode_is_over = False
        try:
            while self.phase in (Phase.PREFILLING, Phase.DECODING):
                news = await self._next(inbox)
                if isinstance(news, Lost):
                    self._lost(news, placement)
                    continue
                self._note(news, work, placement, attempt)
                token_ids, finish = order.accept(news)
                if finish is not None:
                    self.phase = advance(self.phase, Event.LAST_TOKEN)
                    decode_is_over = isinstance(news, Output)
                if token_ids:
                    self._emitted += token_ids
                    yield NewTokens(token_ids, finish)
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
        self._ledger.decode_worker = placement.decode.worker_id
        self._ledger.route_reason = placement.reason

    def _note(
        self, news: FirstToken | Output, work: Work, placement: Placement, attempt: Attempt
    ) -> None:
        """Keep the books: the phase, the load we count on workers, the ledger."""
        if isinstance(news, FirstToken):
            self._pool.prefilled(work, placement)
            if not self._emitted:
                self._note_prefill(news)
            elif news.token_id != self._emitted[0]:
                log.error("request.token_differs", request_id=work.request_id, position=0)
            return
        if self.phase is Phase.DECODING:
            return
        self.phase = advance(self.phase, Event.DECODE_STARTED)
        self._pool.prefilled(work, placement)
        attempt.prefill_is_over()
        if isinstance(news.cost, HandoffCost):
            self.handoff_cost = news.cost
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
        self._losses.append(news.error)
        self._avoid |= {news.worker_id}
        if news.is_reported and placement.prefill is not None:
            # A handoff that failed says nothing of which end was at fault.
            self._avoid |= {placement.prefill.worker_id, placement.decode.worker_id}
        self._ledger.lost(news.error.reason)
        log.info(
            "request.attempt_lost",
            request_id=self._job.request_id,
            attempt=len(self._losses),
            worker_id=news.worker_id,
            reason=news.error.reason,
            position=len(self._emitted),
        )
        error = verdict(self._losses, max_attempts=self._limits.max_attempts)
        if error is not None:
            raise error
        self.phase = advance(self.phase, Event.ATTEMPT_LOST)

    async def _next(self, inbox: "_Inbox") -> News:
        self._require_time()
        try:
            news = inbox.pop()
            return news if news is not None else await self._within(inbox.get(), None)
        except TimeoutError:
            raise DeadlinePassed(self.phase.name.lower()) from None

    async def _within(self, awaitable: Awaitable[_T], until_s: float | None) -> _T:
        """Await until the earlier of `until_s` and the deadline; TimeoutError past it."""
        limits_s = [limit_s for limit_s in (until_s, self._deadline_s) if limit_s is not None]
        left_s = min(limits_s) - self._clock.now() if limits_s else None
        async with asyncio.timeout(left_s):
            return await awaitable

    def _require_time(self) -> None:
        if self._deadline_s is not None and self._clock.now() >= self._deadline_s:
            raise DeadlinePassed(self.phase.name.lower())


class _Inbox:
    """What one attempt has heard and not yet handled. Holds at most its tokens and its end."""

    def __init__(self) -> None:
        self._news: deque[News] = deque()
        self._arrived = asyncio.Event()

    def put(self, news: News) -> None:
        self._news.append(news)
        self._arrived.set()

    def pop(self) -> News | None:
        return self._news.popleft() if self._news else None

    async def get(self) -> News:
        while not self._news:
            self._arrived.clear()
            await self._arrived.wait()
        return self._news.popleft()


class _Order:
    """Puts tokens of one attempt in order of position: no gap, no repeat.

    The first token comes from the prefill worker and once more from the decode worker,
    whichever is faster.
    """

    def __init__(self, next_position: int) -> None:
        self._next = next_position
        self._early: dict[int, tuple[int, FinishReason | None]] = {}

    def accept(self, news: FirstToken | Output) -> tuple[tuple[int, ...], FinishReason | None]:
        """The tokens that are now due, and the finish reason if the last is among them."""
        for position, token_id, finish in _positions(news):
            if position >= self._next:
                self._early[position] = (token_id, finish)
        due: list[int] = []
        finish = None
        while finish is None and self._next in self._early:
            token_id, finish = self._early.pop(self._next)
            due.append(token_id)
            self._next += 1
        return tuple(due), finish


def _positions(news: FirstToken | Output) -> list[tuple[int, int, FinishReason | None]]:
    if isinstance(news, FirstToken):
        return [(0, news.token_id, news.finish)]
    last = len(news.token_ids) - 1
    return [
        (news.position + i, token_id, news.finish if i == last else None)
        for i, token_id in enumerate(news.token_ids)
    ]
