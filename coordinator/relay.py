"""The coordinator's one service, whatever the way in: a spec goes in, events come out.

gRPC and HTTP are fronts of this class. It validates, tokenizes once, admits or refuses at
once, runs the session, turns tokens into text, and closes the books.
"""

import asyncio
import contextlib
import functools
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import structlog

from coordinator.admission import Admission
from coordinator.detokenizer import Detokenizer
from coordinator.lifecycle import Patience, Phase
from coordinator.pool import Pool
from coordinator.request import (
    ChatMessage,
    ChatPrompt,
    GenerateSpec,
    ModelInfo,
    Prompt,
    TextPrompt,
    TokenPrompt,
    check,
    check_prompt,
    resolve_max_tokens,
)
from coordinator.router import Placement, RouteRequest
from coordinator.session import Job, NewTokens, Session
from coordinator.turns import Turns
from kvrelay.clock import Clock
from kvrelay.errors import Cancelled, NotFound, ServingError
from kvrelay.events import Delta, Event, Finished, Started, Usage
from kvrelay.kv.prefix_index import block_hashes
from kvrelay.obs.ledger import Ledger, LedgerBuilder
from kvrelay.types import FinishReason, SamplingParams

log = structlog.get_logger(__name__)

INLINE_CHARS = 2048
"""Longer texts are encoded in a thread: the loop would stand still for a millisecond or more."""


class Tokens(Protocol):
    """What is needed of a tokenizer; `coordinator.tokenizer.Tokenizer` is one."""

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def encode_chat(self, messages: Sequence[ChatMessage]) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class Books(Protocol):
    """Whoever counts requests; `kvrelay.obs.metrics.CoordinatorMetrics` does."""

    def observe_refused(self, reason: str) -> None: ...
    def observe_gap(self, gap_s: float) -> None: ...
    def observe_ended(self, ledger: Ledger) -> None: ...


class Relay:
    """Serves requests on a pool of workers."""

    def __init__(
        self,
        *,
        model: ModelInfo,
        tokenizer: Tokens,
        pool: Pool,
        admission: Admission,
        patience: Patience,
        books: Books,
        clock: Clock,
        mint_id: Callable[[], str],
        mint_seed: Callable[[], int],
        hash_key: bytes,
        max_remembered: int,
        turns: Turns,
    ) -> None:
        self.model = model
        self._tokenizer = tokenizer
        self._pool = pool
        self._admission = admission
        self._patience = patience
        self._books = books
        self._clock = clock
        self._mint_id = mint_id
        self._mint_seed = mint_seed
        self._hash_key = hash_key
        self._max_remembered = max_remembered
        self._turns = turns
        self._ledgers: OrderedDict[str, Ledger] = OrderedDict()
        self._sessions: dict[str, Session] = {}
        self._open: set[str] = set()  # requests whose books are not closed
        self._idle = asyncio.Event()
        self._idle.set()
        self.num_finished = 0
        self.last_success_s = float("-inf")
        """When a request last ended well, by the clock."""

        self.num_lost_attempts = 0

    @property
    def sessions(self) -> Mapping[str, Session]:
        """Of callers' requests under way, by request; always as it is now."""
        return self._sessions

    @property
    def num_active(self) -> int:
        return self._admission.num_requests

    @property
    def num_waiting(self) -> int:
        """Admitted requests that no worker has."""
        return sum(session.phase is Phase.QUEUED for session in self._sessions.values())

    async def generate(
        self, spec: GenerateSpec, *, time_left_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        """Serve one request: `Started`, then `Delta`s, then `Finished`.

        Closing the iterator early cancels the request and frees everything it holds.

        Raises:
            InvalidRequest: a field is outside its bounds.
            QueueFull, Draining: refused before any work.
            ServingError: see `Session.tokens`.
        """
        arrived_at_s = self._clock.now()
        deadline_s = None if time_left_s is None else arrived_at_s + time_left_s
        check(spec, self.model)
        ledger = LedgerBuilder(request_id=self._mint_id(), arrived_at_s=arrived_at_s)
        async with self._admitted(ledger):
            job = await self._job(spec, ledger)
            session = self._session(job, ledger, deadline_s, self._pool.place)
            self._sessions[job.request_id] = session
            yield Started(
                request_id=job.request_id,
                seed=job.sampling.seed,
                prompt_tokens=ledger.prompt_tokens,
            )
            detokenizer = Detokenizer(self._tokenizer, job.prompt_ids, spec.stop)
            reason = FinishReason.STOP
            async with contextlib.aclosing(session.tokens()) as batches:
                async for batch in batches:
                    delta = self._delta(batch, detokenizer, ledger)
                    if batch.finish is not None:
                        reason = batch.finish
                    elif detokenizer.stopped is not None:
                        session.stop()
                    yield delta
            rest = detokenizer.finish()
            if rest:
                yield Delta(position=ledger.completion_tokens, token_ids=(), text=rest)
            if detokenizer.stopped is not None:
                reason = FinishReason.STOP
            closed = self._close(ledger, reason.value)
            self.last_success_s = self._clock.now()
            yield Finished(reason=reason, usage=_usage(closed), ledger=closed)

    async def probe(
        self, job: Job, place: Callable[[RouteRequest], Placement | None]
    ) -> tuple[int, ...]:
        """Run a request that belongs to nobody on chosen workers; its tokens.

        Raises:
            ServingError: as `generate`.
        """
        now_s = self._clock.now()
        ledger = LedgerBuilder(request_id=job.request_id, arrived_at_s=now_s, tokenized_at_s=now_s)
        session = self._session(job, ledger, now_s + self._patience.queue_limit_s, place)
        token_ids: list[int] = []
        async with contextlib.aclosing(session.tokens()) as batches:
            async for batch in batches:
                token_ids += batch.token_ids
        return tuple(token_ids)

    async def tokenize(self, prompt: TextPrompt | ChatPrompt) -> list[int]:
        """Token ids, exactly as `generate` would see them.

        Raises:
            InvalidRequest: the prompt is outside its bounds.
        """
        check_prompt(prompt, self.model)
        return await self._encode(prompt)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens left out.

        Raises:
            InvalidRequest: an id is outside the vocabulary, or there are too many.
        """
        check_prompt(TokenPrompt(tuple(token_ids)), self.model)
        return self._tokenizer.decode(token_ids)

    def explain(self, request_id: str) -> Ledger:
        """The ledger of a request that ended lately.

        Raises:
            NotFound: it has not ended, or is no longer remembered.
        """
        ledger = self._ledgers.get(request_id)
        if ledger is None:
            raise NotFound(
                f"no ended request of that id among the last {self._max_remembered}",
                remembered=len(self._ledgers),
            )
        return ledger

    async def drain(self) -> None:
        """Take nothing new; return when the last admitted request has ended."""
        self._admission.drain()
        await self._idle.wait()

    async def _job(self, spec: GenerateSpec, ledger: LedgerBuilder) -> Job:
        """Tokenize once, and weigh what it comes to."""
        prompt_ids = tuple(await self._encode(spec.prompt))
        ledger.tokenized_at_s = self._clock.now()
        ledger.prompt_tokens = len(prompt_ids)
        max_tokens = resolve_max_tokens(spec, len(prompt_ids), self.model)
        self._admission.weigh(ledger.request_id, len(prompt_ids) + max_tokens)
        eos = () if spec.ignore_eos else self.model.eos_token_ids
        block_size = self._pool.block_size
        hashes = block_hashes(prompt_ids, block_size, key=self._hash_key, salt=b"")
        return Job(
            request_id=ledger.request_id,
            prompt_ids=prompt_ids,
            sampling=self._sampling(spec),
            max_tokens=max_tokens,
            stop_token_ids=tuple({*eos, *spec.stop_token_ids}),
            cache_salt=b"",
            route=RouteRequest(
                num_prompt=len(prompt_ids),
                num_slots=len(prompt_ids) + max_tokens - 1,
                block_hashes=tuple(hashes),
                block_size=block_size,
            ),
        )

    def _sampling(self, spec: GenerateSpec) -> SamplingParams:
        default = self.model.sampling
        return SamplingParams(
            temperature=default.temperature if spec.temperature is None else spec.temperature,
            top_k=default.top_k if spec.top_k is None else spec.top_k,
            top_p=default.top_p if spec.top_p is None else spec.top_p,
            min_p=default.min_p if spec.min_p is None else spec.min_p,
            seed=self._mint_seed() if spec.seed is None else spec.seed,
        )

    def _session(
        self,
        job: Job,
        ledger: LedgerBuilder,
        deadline_s: float | None,
        place: Callable[[RouteRequest], Placement | None],
    ) -> Session:
        return Session(
            job,
            pool=self._pool,
            place=place,
            patience=self._patience,
            ledger=ledger,
            clock=self._clock,
            mint_id=self._mint_id,
            deadline_s=deadline_s,
            turns=self._turns,
        )

    async def _encode(self, prompt: Prompt) -> list[int]:
        match prompt:
            case TokenPrompt(token_ids=token_ids):
                return list(token_ids)
            case TextPrompt(text=text):
                num_chars = len(text)
                encode = functools.partial(self._tokenizer.encode, text, add_special_tokens=True)
            case ChatPrompt(messages=messages):
                num_chars = sum(len(message.content) for message in messages)
                encode = functools.partial(self._tokenizer.encode_chat, messages)
        return encode() if num_chars <= INLINE_CHARS else await asyncio.to_thread(encode)

    def _delta(self, batch: NewTokens, detokenizer: Detokenizer, ledger: LedgerBuilder) -> Delta:
        """The tokens of a batch that belong to the output, with their text."""
        position = ledger.completion_tokens
        text = detokenizer.push(batch.token_ids)
        used = batch.token_ids[: detokenizer.num_used - position]
        now_s = self._clock.now()
        if position:
            self._books.observe_gap(now_s - ledger.last_token_at_s)
        ledger.tokens(now_s, len(used))
        return Delta(position=position, token_ids=used, text=text)

    @contextlib.asynccontextmanager
    async def _admitted(self, ledger: LedgerBuilder) -> AsyncIterator[None]:
        """Room for one request while it lives, and its books closed once, however it ends."""
        try:
            self._admission.admit(ledger.request_id)
        except ServingError as error:
            self._books.observe_refused(error.reason)
            raise
        self._open.add(ledger.request_id)
        self._idle.clear()
        outcome = "INTERNAL"
        try:
            yield
        except ServingError as error:
            outcome = error.reason
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = Cancelled.reason
            raise
        finally:
            if ledger.request_id in self._open:
                self._close(ledger, outcome)
            self._sessions.pop(ledger.request_id, None)
            self._admission.release(ledger.request_id)
            if not self.num_active:
                self._idle.set()

    def _close(self, builder: LedgerBuilder, outcome: str) -> Ledger:
        self._open.remove(builder.request_id)
        ledger = builder.build(outcome, self._clock.now())
        self._ledgers[ledger.request_id] = ledger
        while len(self._ledgers) > self._max_remembered:
            self._ledgers.popitem(last=False)
        self.num_finished += 1
        self.num_lost_attempts += len(ledger.lost_attempts)
        self._books.observe_ended(ledger)
        _log_ended(ledger)
        return ledger


def _usage(ledger: Ledger) -> Usage:
    return Usage(
        prompt_tokens=ledger.prompt_tokens,
        completion_tokens=ledger.completion_tokens,
        cached_prompt_tokens=ledger.cached_prompt_tokens,
    )


def _log_ended(ledger: Ledger) -> None:
    """The one line per request: everything about it but what it said."""
    log.info(
        "request.ended",
        request_id=ledger.request_id,
        outcome=ledger.outcome,
        prompt_tokens=ledger.prompt_tokens,
        completion_tokens=ledger.completion_tokens,
        cached_prompt_tokens=ledger.cached_prompt_tokens,
        attempts=ledger.attempts,
        lost_attempts=list(ledger.lost_attempts),
        prefill_worker=ledger.prefill_worker,
        decode_worker=ledger.decode_worker,
        route_reason=ledger.route_reason,
        transport=ledger.transport,
        handoff_num_bytes=ledger.handoff_num_bytes,
        ttft_s=round(ledger.ttft_s, 6),
        gap1_s=round(ledger.gap1_s, 6),
        tpot_s=round(ledger.tpot_s, 6),
        e2e_s=round(ledger.e2e_s, 6),
        **{f"{name}_s": round(value, 6) for name, value in ledger.ttft_stages.items()},
        **{f"gap1_{name}_s": round(value, 6) for name, value in ledger.gap1_stages.items()},
    )
