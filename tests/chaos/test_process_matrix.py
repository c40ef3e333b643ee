"""Steps of the protocol at which a real process is killed, or stopped and resumed.

A proxy stands for good where each worker says that it can be reached, so a worker that is started
again is found at the same address, as another start of the same worker. The message-level matrix is
in `test_protocol_matrix`; here real processes die, with all that they have open.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.asking import Ask, Asker
from tests.support.deployment import Deployment, deployment
from tests.support.handoff_proxy import HandoffProxy, first, proxy_before, then
from tests.support.prompts import prompts

pytestmark = [pytest.mark.chaos, pytest.mark.realmodel, pytest.mark.timeout(300)]

ALWAYS = ("--disaggregate", "always")
STOPPED_S = 1.0
"""Shorter than what makes a worker suspect, so it is itself that goes on."""

MAX_TOKENS = 24
NUM_AT_ONCE = 4
ROLES = ("prefill", "decode")
IS_FULL = bool(os.environ.get("CHAOS_FULL"))


@dataclass(slots=True)
class Scene:
    """A deployment of one worker of each role, each behind its proxy."""

    it: Deployment
    asker: Asker
    proxies: dict[str, HandoffProxy]

    async def kill(self, role: str) -> None:
        """Its process is gone, and what listened there with it."""
        await self.it.signal(f"{role}-0", signal.SIGKILL)
        await self.proxies[role].break_all()

    async def stop(self, role: str) -> None:
        pid = await self.it.signal(f"{role}-0", signal.SIGSTOP)
        asyncio.get_running_loop().call_later(STOPPED_S, os.kill, pid, signal.SIGCONT)


async def follow(proxies: dict[str, HandoffProxy]) -> None:
    """Have each proxy lead to whichever process is that worker now."""
    while True:
        for process in psutil.Process().children(recursive=True):
            try:
                words = process.cmdline()
                role = next((role for role in ROLES if f"{role}_svc" in words), None)
                if role is None or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                ports = [c.laddr.port for c in process.net_connections() if c.status == "LISTEN"]
            except psutil.Error:
                continue
            if ports:
                proxies[role].upstream = f"127.0.0.1:{ports[0]}"
        await asyncio.sleep(0.05)


@asynccontextmanager
async def proxied(model: Path, log_dir: Path) -> AsyncIterator[Scene]:
    async with proxy_before() as prefill, proxy_before() as decode:
        proxies = {"prefill": prefill, "decode": decode}
        following = asyncio.create_task(follow(proxies))
        env = {f"KVRELAY_{role.upper()}_ADVERTISE": proxies[role].address for role in ROLES}
        try:
            async with (
                deployment(model, log_dir=log_dir, flags=ALWAYS, env=env) as it,
                Asker(it.grpc) as asker,
            ):
                yield Scene(it, asker, proxies)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)


STRIKES = [
    ("prefill", Scene.kill, "blocks", first),
    ("decode", Scene.kill, "opened", then),
    ("prefill", Scene.stop, "release_asked", first),
    ("decode", Scene.stop, "complete", first),
]
MORE_STRIKES = [
    ("prefill", Scene.kill, "complete", then),
    ("decode", Scene.kill, "outputs", then),
    ("prefill", Scene.stop, "pull_asked", first),
    ("prefill", Scene.stop, "blocks", then),
    ("decode", Scene.stop, "submit_decode", then),
    ("decode", Scene.stop, "outputs", then),
]
"""Only with CHAOS_FULL in the environment, as `make chaos` has it."""


async def test_processes_die_or_stop_at_each_step_and_every_stream_is_right(real_model, tmp_path):
    """
    Four callers at a time, each with a prompt that no worker has seen: whatever happens to the
    processes, they have the tokens of a calm repetition, and nothing stays held.
    """
    unseen = iter([p for p in prompts(real_model) if len(p) >= 30])
    async with proxied(real_model, tmp_path) as scene:
        for role, do, step, when in STRIKES + (MORE_STRIKES if IS_FULL else []):
            asks = [Ask(next(unseen), MAX_TOKENS, 0.7, seed=i) for i in range(NUM_AT_ONCE)]
            hook = when(lambda do=do, role=role: do(scene, role))
            rules = [proxy.at(step, hook) for proxy in scene.proxies.values()]
            for rule in rules:
                rule.has_acted = rules[0].has_acted
            answers = await scene.asker.all(asks, at_once=NUM_AT_ONCE)
            assert rules[0].has_acted.is_set(), step
            for proxy in scene.proxies.values():
                proxy.calm()
            await scene.it.until(lambda pool: len(pool.members) == len(ROLES), within_s=60.0)
            calm = await scene.asker.all(asks, at_once=1)
            told = f"{role} {do.__name__} at {step}"
            assert [a.token_ids for a in answers] == [a.token_ids for a in calm], told
