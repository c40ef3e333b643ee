"""Readiness: a small request crosses the pool, now and then, and its tokens are compared.

Every prefill and every decode worker is crossed at least once when it joins. All crossings
are of one and the same request, so they must give the same tokens: a worker whose answer
differs serves wrong numbers, and the deployment says so instead of serving on.
"""

import asyncio
from collections.abc import Callable, Sequence

import structlog

from coordinator.pool import Pool
from coordinator.registry import Member
from coordinator.relay import Relay
from coordinator.router import Disaggregate, Placement, RouteRequest
from coordinator.session import Job
from kvrelay.clock import Clock
from kvrelay.errors import Incompatible, ServingError
from kvrelay.transfer.select import choose_offer
from kvrelay.types import Role, SamplingParams

log = structlog.get_logger(__name__)

PROMPT_TOKENS = 40
"""Two full blocks and a partial one at the usual block size."""

OUTPUT_TOKENS = 3
RETRY_S = 0.5


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
        self._answer: tuple[int, ...] | None = None
        self.not_ready_reason = "starting"

    @property
    def is_ready(self) -> bool:
        return not self.not_ready_reason

    async def run(self) -> None:
        """Keep readiness true. Ends when cancelled."""
        while True:
            members = self._pool.members()
            reason, wait_s = await self._look(members)
            if reason != self.not_ready_reason:
                self.not_ready_reason = reason
                log.info("canary.ready" if not reason else "canary.not_ready", reason=reason)
                self._on_change(not reason)
            await self._wait(wait_s, {_key(m) for m in members})

    async def _look(self, members: Sequence[Member]) -> tuple[str, float]:
        """Why the pool is not ready, if so, and how long to leave it alone."""
        missing = self._missing()
        if missing:
            return missing, self._interval_s
        try:
            for prefill, decode in self._pairs(members):
                await self._cross(prefill, decode)
        except ServingError as error:
            return f"canary failed: {error}", RETRY_S
        return "", self._interval_s

    def _missing(self) -> str:
        """Which workers are not there yet: all that are expected, later one of each kind."""
        for role, expected in self._needed().items():
            there = self._pool.count(role)
            if there < expected:
                return f"{there} of {expected} {role.value} workers joined"
        return ""

    def _needed(self) -> dict[Role, int]:
        if self._answer is None:
            return self._expect
        prefill_is_vital = self._disaggregate is Disaggregate.ALWAYS
        return {Role.PREFILL: int(prefill_is_vital), Role.DECODE: 1}

    def _pairs(self, members: Sequence[Member]) -> list[tuple[Member | None, Member]]:
        """So many crossings that each worker is in at least one."""
        decodes = [m for m in members if m.identity.role is Role.DECODE]
        prefills = [m for m in members if m.identity.role is Role.PREFILL]
        if self._disaggregate is Disaggregate.NEVER or not prefills:
            return [(None, decode) for decode in decodes]
        rounds = max(len(prefills), len(decodes))
        return [(prefills[i % len(prefills)], decodes[i % len(decodes)]) for i in range(rounds)]

    async def _cross(self, prefill: Member | None, decode: Member) -> None:
        probe = await self._relay.probe(self._job(), lambda _: _fixed(prefill, decode))
        if self._answer is None:
            self._answer = probe.token_ids
        if probe.token_ids != self._answer:
            pair = f"{prefill.worker_id if prefill else 'no prefill worker'} and {decode.worker_id}"
            raise Incompatible(f"{pair} gave other tokens than workers before them")

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

    async def _wait(self, wait_s: float, known: set[tuple[str, str]]) -> None:
        """Until it is time to look again: the interval, or a worker that is new or gone."""
        until_s = self._clock.now() + wait_s
        while {_key(m) for m in self._pool.members()} == known:
            try:
                async with asyncio.timeout(until_s - self._clock.now()):
                    await self._pool.wait_change()
            except TimeoutError:
                return


def _fixed(prefill: Member | None, decode: Member) -> Placement:
    offer = choose_offer(prefill.identity.offers, decode.identity.offers) if prefill else None
    return Placement(
        prefill=prefill,
        decode=decode,
        offer=offer,
        reason="canary",
        num_prefill_tokens=PROMPT_TOKENS,
    )


def _key(member: Member) -> tuple[str, str]:
    return (member.worker_id, member.identity.epoch)
