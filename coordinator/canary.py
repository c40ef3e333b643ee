"""Readiness: a small request crosses the pool, now and then, and its tokens are compared.

Each worker is crossed when it joins; later, what callers' own requests prove need not be
proved again. All crossings are of one and the same request, so they must give the same
tokens, wherever workers keep KV in the same dtypes: one whose answer differs serves wrong
numbers, and the deployment says so instead of serving on.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import structlog

from coordinator.pool import Pool
from coordinator.registry import Member
from coordinator.relay import Relay
from coordinator.router import Disaggregate, Placement, RouteRequest, common_offer
from coordinator.session import Job
from kvrelay.clock import Clock
from kvrelay.errors import ServingError
from kvrelay.types import Role, SamplingParams

log = structlog.get_logger(__name__)

PROMPT_TOKENS = 40
"""Two full blocks and a partial one at the usual block size."""

OUTPUT_TOKENS = 3
RETRY_S = 0.5

Pair = tuple[Member | None, Member]
"""Who prefills, None for the same, and who decodes."""


@dataclass(frozen=True, slots=True)
class _Answer:
    """The tokens of a crossing, and the KV dtypes of those who prefilled and decoded, on which
    tokens depend.
    """

    kv_dtypes: tuple[str, str]
    token_ids: tuple[int, ...]


class Canary:
    """Decides whether the pool is ready, by trying."""

    def __init__(
        self,
        *,
        relay: Relay,
        pool: Pool,
        clock: Clock,
        mint_id: Callable[[], str],
        disaggregate: Disaggregate,
        expect: dict[Role, int],
        interval_s: float,
        on_change: Callable[[bool], None],
    ) -> None:
        self._relay = relay
        self._pool = pool
        self._clock = clock
        self._mint_id = mint_id
        self._disaggregate = disaggregate
        self._expect = expect
        self._interval_s = interval_s
        self._on_change = on_change
        self._answers: dict[Member, _Answer] = {}
        """What those members that were crossed said; of members only."""

        self._was_ready = False
        self.not_ready_reason = "starting"

    @property
    def is_ready(self) -> bool:
        return not self.not_ready_reason

    async def run(self) -> None:
        """Keep readiness true. Ends when cancelled, and is ready no more."""
        try:
            while True:
                members = self._able()
                reason = await self._look(members)
                self._say(reason)
                wait_s = RETRY_S if reason and not self._missing(members) else self._interval_s
                await self._wait(wait_s, members)
        finally:
            self._say("stopping")

    def _able(self) -> list[Member]:
        return [m for m in self._pool.members() if m.takes_work]

    def _say(self, reason: str) -> None:
        if reason != self.not_ready_reason:
            self.not_ready_reason = reason
            log.info("canary.not_ready" if reason else "canary.ready", reason=reason)
            self._on_change(not reason)
        self._was_ready |= not reason

    async def _look(self, members: Sequence[Member]) -> str:
        """Why the pool is not ready, or nothing."""
        missing = self._missing(members)
        if missing:
            return missing
        self._answers = {m: answer for m, answer in self._answers.items() if m in members}
        if self._is_proved(members):
            return ""
        problems = [await self._cross(pair) for pair in _pairs(members, self._disaggregate)]
        for problem in filter(None, problems):
            log.warning("canary.failed", problem=problem)
        answers = set(self._answers.values())
        if len(answers) > len({answer.kv_dtypes for answer in answers}):
            return "workers give different tokens for the same request"
        if all(problems):
            return problems[0] if problems else "no decode worker can pull from a prefill worker"
        return ""

    def _missing(self, members: Sequence[Member]) -> str:
        """Which workers are not there yet: all that are expected, later one of each kind."""
        for role, expected in self._needed().items():
            there = sum(m.identity.role is role for m in members)
            if there < expected:
                return f"{there} of {expected} {role.value} workers joined"
        return ""

    def _needed(self) -> dict[Role, int]:
        if not self._was_ready:
            return self._expect
        prefill_is_vital = self._disaggregate is Disaggregate.ALWAYS
        return {Role.PREFILL: int(prefill_is_vital), Role.DECODE: 1}

    def _is_proved(self, members: Sequence[Member]) -> bool:
        """Whether everybody was crossed once, and some request ended well lately."""
        since_s = self._clock.now() - self._relay.last_success_s
        return self.is_ready and since_s < self._interval_s and self._answers.keys() >= {*members}

    async def _cross(self, pair: Pair) -> str:
        """Send the request through; what went wrong, if something did."""
        prefill, decode = pair
        try:
            token_ids = await self._relay.probe(self._job(), lambda _: _placement(pair))
        except ServingError as error:
            return f"canary by {_name(pair)} failed: {error}"
        answer = _Answer(((prefill or decode).kv_dtype, decode.kv_dtype), token_ids)
        for member in (prefill, decode):
            if member is not None:
                self._answers[member] = answer
        return ""

    def _job(self) -> Job:
        request_id = self._mint_id()
        vocab_size = self._relay.model.vocab_size
        prompt_ids = tuple(i % vocab_size for i in range(1, PROMPT_TOKENS + 1))
        return Job(
            request_id=request_id,
            prompt_ids=prompt_ids,
            sampling=SamplingParams(),
            max_tokens=OUTPUT_TOKENS,
            stop_token_ids=(),
            # Never a prefix hit: the KV must be computed and moved anew each time.
            cache_salt=request_id.encode(),
            route=RouteRequest(
                num_prompt=PROMPT_TOKENS,
                num_slots=PROMPT_TOKENS + OUTPUT_TOKENS - 1,
                block_hashes=(),
                block_size=self._pool.block_size,
            ),
        )

    async def _wait(self, wait_s: float, known: Collection[Member]) -> None:
        """Until it is time to look again: the interval, or a worker that is new or gone."""
        until_s = self._clock.now() + wait_s
        while set(self._able()) == set(known):
            try:
                async with asyncio.timeout(until_s - self._clock.now()):
                    await self._pool.wait_change()
            except TimeoutError:
                return


def _pairs(members: Sequence[Member], disaggregate: Disaggregate) -> list[Pair]:
    """So many crossings that each worker that can be in one is in at least one."""
    prefills = [m for m in members if m.identity.role is Role.PREFILL]
    decodes = [m for m in members if m.identity.role is Role.DECODE]
    if disaggregate is Disaggregate.NEVER:
        return [(None, decode) for decode in decodes]
    pairs: list[Pair] = []
    for i, decode in enumerate(decodes):
        sources = [p for p in prefills if common_offer(p, decode) is not None]
        if sources:
            pairs.append((sources[i % len(sources)], decode))
        elif disaggregate is Disaggregate.AUTO:
            pairs.append((None, decode))
    crossed = {prefill for prefill, _ in pairs}
    for prefill in prefills:
        pullers = [d for d in decodes if common_offer(prefill, d) is not None]
        if prefill not in crossed and pullers:
            pairs.append((prefill, pullers[0]))
    return pairs


def _placement(pair: Pair) -> Placement:
    prefill, decode = pair
    return Placement(
        prefill=prefill,
        decode=decode,
        offer=None if prefill is None else common_offer(prefill, decode),
        reason="canary",
        num_prefill_tokens=PROMPT_TOKENS,
    )


def _name(pair: Pair) -> str:
    return " and ".join(m.worker_id for m in pair if m is not None)
