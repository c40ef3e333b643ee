"""Every step of the protocol, and everything that can go wrong at it.

A prefill and a decode worker (or two of each, where one is to die for good), the coordinator and
all that they say to each other are real; see `tests.support.proxied_pool`. Four requests are under
way, two of which begin alike, and whichever comes to the step first is struck. All four callers
must have the model's own tokens, the pool must still serve, and nothing may stay held.
"""

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from kvrelay.errors import DeadlinePassed
from kvrelay.types import Role
from tests.support.builders import prompt
from tests.support.handoff_proxy import (
    PREFILL_STEPS,
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

PROMPTS = (
    prompt(30),
    prompt(30)[:18] + prompt(9, variant=5),
    prompt(21, variant=2),
    prompt(7, variant=3),
)
MAX_TOKENS = 10
LATE_S = 0.1

Strike = Callable[[ProxiedPool], Act]


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at a step, in a pool with so many workers of each role."""

    strike: Strike
    num_each: int = 1


def _lapse(pool: ProxiedPool) -> Act:
    async def lapse() -> None:
        for node in pool.of(Role.PREFILL):
            await node.lapse()

    return first(lapse)


def _does(role: Role, what: Callable[[Node], object], when: Callable[..., Act]) -> Strike:
    return lambda pool: when(pool.whole(lambda: what(pool.busy(role))))


FAULTS: dict[str, Fault] = {
    "lost": Fault(lambda pool: lose),
    "twice": Fault(lambda pool: duplicate),
    "late": Fault(lambda pool: late(LATE_S)),
    "cut": Fault(lambda pool: cut),
    "hold-lapsed": Fault(_lapse),
}
for role in Role:
    FAULTS |= {
        f"{role.value}-killed-before": Fault(_does(role, Node.die, first), num_each=2),
        f"{role.value}-killed-after": Fault(_does(role, Node.die, then), num_each=2),
        f"{role.value}-restarted-before": Fault(_does(role, Node.restart, first)),
        f"{role.value}-restarted-after": Fault(_does(role, Node.restart, then)),
        f"{role.value}-stopped": Fault(_does(role, Node.stop, first)),
    }

ENDS_BY_DEADLINE = {
    *(("submit_decode", "lost"), ("pull_asked", "lost"), ("read_asked", "lost")),
    *(("opened", "lost"), ("blocks", "lost"), ("digests", "lost"), ("complete", "lost")),
    ("outputs", "lost"),
}
"""gRPC loses no message of a connection that lives. If it did, somebody would wait here for an
answer that cannot come, and only the caller's deadline would tell: for announcements at least where
one message has them all."""

BY_STREAM = ("read_asked", "frame", "release_asked", "release_answered")
"""Where memory is shared, bytes are no messages, and the fence is seen without asking."""


CI_FAULTS = ("lost", "twice", "late", "hold-lapsed", "killed-before", "restarted-after", "stopped")
"""Each kind once. All of them with CHAOS_FULL in the environment, as `make chaos` has it."""


def steps_and_faults() -> list[tuple[str, str]]:
    is_full = bool(os.environ.get("CHAOS_FULL"))
    faults = [name for name in FAULTS if is_full or name.endswith(CI_FAULTS)]
    return [(step, fault) for step in PREFILL_STEPS for fault in faults]


@pytest.mark.parametrize(("step", "fault"), steps_and_faults())
async def test_whatever_happens_the_tokens_are_right(step, fault):
    """
    Or, where only the caller's deadline can end it, they are the first ones and the status is
    typed; and what comes afterwards is served as ever.
    """
    transport = "stream" if step in BY_STREAM else "shm"
    may_end = (step, fault) in ENDS_BY_DEADLINE
    num = FAULTS[fault].num_each
    async with proxied_pool(num_prefill=num, num_decode=num, transport=transport) as pool:
        strike = FAULTS[fault].strike(pool)
        rule = pool.at(step, lambda node: strike)
        asking = (pool.ask(p, MAX_TOKENS, timeout_s=1.5 if may_end else 20.0) for p in PROMPTS)
        answers = await asyncio.gather(*asking)
        for prompt_ids, answer in zip(PROMPTS, answers, strict=True):
            pool.require_right(answer, prompt_ids, MAX_TOKENS)
            assert answer.error is None or (may_end and isinstance(answer.error, DeadlinePassed))

        assert rule.has_acted.is_set(), f"{step} was never seen"
        again = await pool.ask(PROMPTS[2], MAX_TOKENS + 2)
        pool.require_right(again, PROMPTS[2], MAX_TOKENS + 2)
        assert again.error is None


@pytest.mark.parametrize("transport", ["shm", "stream"])
async def test_without_a_fault_every_step_is_seen(transport):
    """
    The names of the steps are those of messages that are really sent.
    """
    async with proxied_pool(transport=transport) as pool:
        for prompt_ids in PROMPTS:
            answer = await pool.ask(prompt_ids, 4 * MAX_TOKENS)
            pool.require_right(answer, prompt_ids, 4 * MAX_TOKENS)
            assert answer.error is None
        expected = set(PREFILL_STEPS) - ({"read_asked", "frame"} if transport == "shm" else set())
        await until(lambda: expected <= set(pool.seen))

    assert pool.seen["opened"] == pool.seen["complete"] == len(PROMPTS)
