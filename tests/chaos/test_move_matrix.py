"""Every step of a move between decode workers, and everything that can go wrong at it.

As `test_protocol_matrix`, for sequences that run: a decode worker drains, the coordinator moves
what runs there to the others, and at one step of that something happens.
"""

import asyncio
import os
from collections.abc import Callable

import pytest

from kvrelay.errors import DeadlinePassed
from kvrelay.types import Role
from tests.support.builders import prompt
from tests.support.handoff_proxy import (
    MOVE_STEPS,
    Act,
    cut,
    duplicate,
    first,
    late,
    lose,
    then,
)
from tests.support.proxied_pool import Node, ProxiedPool, proxied_pool
from tests.support.workers import until

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(60)]

PROMPTS = tuple(prompt(9 + 5 * i, variant=i) for i in range(4))
MAX_TOKENS = 48
STEP_S = 0.006
LATE_S = 0.1
NUM_DECODE = 3

Strike = Callable[[ProxiedPool], Act]


def source(pool: ProxiedPool) -> Node:
    """The worker that drains."""
    assert pool.leaving is not None
    return pool.leaving


def target(pool: ProxiedPool) -> Node:
    """A worker that goes on with what is moved, if it is known already."""
    others = [node for node in pool.of(Role.DECODE) if node is not pool.leaving]
    return next((node for node in others if node.is_busy), others[0])


def _lapse(pool: ProxiedPool) -> Act:
    return first(lambda: source(pool).lapse())


def _does(
    whom: Callable[[ProxiedPool], Node], what: Callable[[Node], object], when: Callable[..., Act]
) -> Strike:
    return lambda pool: when(pool.whole(lambda: what(whom(pool))))


FAULTS: dict[str, Strike] = {
    "lost": lambda pool: lose,
    "twice": lambda pool: duplicate,
    "late": lambda pool: late(LATE_S),
    "cut": lambda pool: cut,
    "hold-lapsed": _lapse,
}
for name, whom in (("source", source), ("target", target)):
    FAULTS |= {
        f"{name}-killed-before": _does(whom, Node.die, first),
        f"{name}-killed-after": _does(whom, Node.die, then),
        f"{name}-restarted": _does(whom, Node.restart, then),
        f"{name}-stopped": _does(whom, Node.stop, first),
    }

CI_STEPS = ("hand_over_decode", "complete", "release_answered")
"""Where a sequence changes hands. All steps with CHAOS_FULL in the environment, as `make chaos`
has it."""

TESTED_STEPS = MOVE_STEPS if os.environ.get("CHAOS_FULL") else CI_STEPS

ENDS_BY_DEADLINE = {
    (step, "lost") for step in ("opened", "blocks", "digests", "complete", "outputs")
}
"""As in `test_protocol_matrix`."""


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", TESTED_STEPS)
async def test_whatever_happens_to_a_move_the_tokens_are_right(step, fault):
    """
    Moved, moved again, left where they are or computed anew: no token is lost, told twice or
    another, and what comes afterwards is served as ever.
    """
    may_end = (step, fault) in ENDS_BY_DEADLINE
    async with proxied_pool(num_decode=NUM_DECODE, decode={"step_s": STEP_S}) as pool:
        moving = asyncio.create_task(pool.coordinator.mover.run())
        asking = [
            asyncio.create_task(pool.ask(p, MAX_TOKENS, timeout_s=1.5 if may_end else 20.0))
            for p in PROMPTS
        ]
        await until(lambda: pool.seen["outputs"] > 3 * len(PROMPTS))
        pool.leaving = next(node for node in pool.of(Role.DECODE) if node.is_busy)
        strike = FAULTS[fault](pool)
        rule = pool.at(step, lambda node: strike)
        await pool.leaving.drain()
        answers = await asyncio.gather(*asking)
        for prompt_ids, answer in zip(PROMPTS, answers, strict=True):
            pool.require_right(answer, prompt_ids, MAX_TOKENS)
            assert answer.error is None or (may_end and isinstance(answer.error, DeadlinePassed))

        assert rule.has_acted.is_set(), f"{step} was never seen"
        again = await pool.ask(PROMPTS[2], 12)
        pool.require_right(again, PROMPTS[2], 12)
        assert again.error is None
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
