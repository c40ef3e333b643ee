import asyncio, time, itertools
import pytest
from tests.support.proxied_pool import *
from tests.support.builders import prompt
from tests.support.handoff_proxy import *
from kvrelay.types import Role

STEPS1 = PREFILL_STEPS
PROMPTS = [
    prompt(30),
    prompt(30)[:18] + prompt(9, variant=5),
    prompt(21, variant=2),
    prompt(7, variant=3),
]


def busy(pool, role):
    nodes = pool.of(role)
    return next(
        (
            n
            for n in nodes
            if n.bench.service.load().handoff_holds or n.bench.service.load().running_sequences
        ),
        nodes[0],
    )


async def lapse(pool):
    for n in pool.of(Role.PREFILL):
        for h in list(n.bench.keeper._kept):
            n.bench.keeper.lapse(h)


def stop(pool, role):
    async def hook():
        n = busy(pool, role)
        n.proxy.stop()
        asyncio.get_running_loop().call_later(0.3, n.proxy.resume)

    return hook


FAULTS = {
    "lost": (1, lambda pool: lambda node: lose),
    "twice": (1, lambda pool: lambda node: duplicate),
    "late": (1, lambda pool: lambda node: late(0.15)),
    "cut": (1, lambda pool: lambda node: cut),
    "lapsed": (1, lambda pool: lambda node: first(lambda: lapse(pool))),
}
for role in Role:
    FAULTS[f"{role.value} killed before"] = (
        2,
        lambda pool, role=role: lambda node: first(pool.whole(lambda: busy(pool, role).die())),
    )
    FAULTS[f"{role.value} killed after"] = (
        2,
        lambda pool, role=role: lambda node: then(pool.whole(lambda: busy(pool, role).die())),
    )
    FAULTS[f"{role.value} restarted before"] = (
        1,
        lambda pool, role=role: lambda node: first(pool.whole(lambda: busy(pool, role).restart())),
    )
    FAULTS[f"{role.value} restarted after"] = (
        1,
        lambda pool, role=role: lambda node: then(pool.whole(lambda: busy(pool, role).restart())),
    )
    FAULTS[f"{role.value} stopped"] = (
        1,
        lambda pool, role=role: lambda node: first(stop(pool, role)),
    )


async def scenario(step, fault):
    n, act = FAULTS[fault]
    t = time.monotonic()
    async with proxied_pool(
        num_prefill=n,
        num_decode=n,
        transport="stream" if step in ("read_asked", "frame") else "shm",
    ) as pool:
        rule = pool.at(step, act(pool))
        got = await asyncio.gather(*(pool.ask(p, 10, timeout_s=3) for p in PROMPTS))
        for p, a in zip(PROMPTS, got):
            pool.require_right(a, p, 10)
        assert rule.has_acted.is_set()
        a = await pool.ask(PROMPTS[2], 12)
        pool.require_right(a, PROMPTS[2], 12)
        assert a.error is None, a
    print(
        f"RES {step:18s} {fault:26s} {time.monotonic() - t:5.2f}",
        [type(a.error).__name__ for a in got if a.error],
    )


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("step", STEPS1)
async def test_m(step, fault):
    await scenario(step, fault)
