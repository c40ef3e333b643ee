"""Running requests move between decode workers: real processes, the real model, real signals.

The oracle is the same deployment before anything moved: tokens are a function of the request, so
every stream must end exactly as it did then, wherever its tokens came from.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kvrelay.client import Pool
from kvrelay.v1 import common_pb2
from tests.support.asking import Answer, Ask, deployed
from tests.support.deployment import Deployment
from tests.support.prompts import prompts

pytestmark = [pytest.mark.chaos, pytest.mark.realmodel, pytest.mark.timeout(300)]

ONLY_IN_FULL = pytest.mark.skipif(
    not os.environ.get("CHAOS_FULL"),
    reason="with CHAOS_FULL, as `make chaos` has it; test_move_matrix.py has it in one process",
)

ALWAYS = ("--disaggregate", "always")
NUM_STREAMS = 16
MAX_TOKENS = 192
GAP_LIMIT_S = 0.3


@dataclass(slots=True)
class Scene:
    """Streams that all run on `source`, while `target`, which is alive again, has none."""

    it: Deployment
    expected: list[list[int]]
    asking: "asyncio.Task[list[Answer]]"
    ledgers: list[common_pb2.Ledger] = field(default_factory=list)
    source: str = "decode-0"
    target: str = "decode-1"

    def said(self, worker_id: str, event: str) -> list[dict[str, object]]:
        """What a process logged of one kind, in all its lives."""
        return [entry for entry in self._entries(worker_id) if entry.get("event") == event]

    def _entries(self, worker_id: str) -> Iterator[dict[str, object]]:
        for line in (self.it.log_dir / f"{worker_id}.log").read_text().splitlines():
            if line.startswith("{"):
                yield json.loads(line)

    async def ended(self) -> None:
        """Every stream has ended, with the tokens of the calm run."""
        answers = await self.asking
        assert [answer.token_ids for answer in answers] == self.expected
        self.ledgers = [answer.ledger for answer in answers]

    @property
    def lost_attempts(self) -> list[str]:
        return [reason for ledger in self.ledgers for reason in ledger.lost_attempts]

    @property
    def move_gaps_s(self) -> list[float]:
        return [gap_s for ledger in self.ledgers for gap_s in ledger.move_gaps_s]


@asynccontextmanager
async def scene(
    model: Path, log_dir: Path, *, num_running: int = NUM_STREAMS
) -> AsyncIterator[Scene]:
    """All streams are on one decode worker because the other was no member when they came.

    Args:
        num_running: how many of them it is waited for to run; the others may wait.
    """
    asks = [
        Ask(prompt, MAX_TOKENS, temperature=0.7 * (i % 2), seed=i)
        for i, prompt in enumerate(prompts(model)[20 : 20 + NUM_STREAMS])
    ]
    async with deployed(model, log_dir, *ALWAYS, num_decode=2) as (it, asker):
        expected = [a.token_ids for a in await asker.all(asks, at_once=NUM_STREAMS)]
        pid = await it.signal("decode-1", signal.SIGSTOP)
        try:
            await it.until(lambda pool: _decode_workers(pool) == {"decode-0"})
            asking = asyncio.create_task(asker.all(asks, at_once=NUM_STREAMS))
            await it.until(lambda pool: _num_running(pool, "decode-0") == num_running)
        finally:
            os.kill(pid, signal.SIGCONT)
        await it.until(lambda pool: _decode_workers(pool) == {"decode-0", "decode-1"})
        assert (await it.pool()).active_requests == NUM_STREAMS, "some have ended before it began"
        yield Scene(it, expected, asking)


def _decode_workers(pool: Pool) -> set[str]:
    return {m.identity.worker_id for m in pool.members if m.identity.role.value == "decode"}


def _num_running(pool: Pool, worker_id: str) -> int:
    return sum(m.load.running_sequences for m in pool.members if m.identity.worker_id == worker_id)


async def test_a_draining_worker_hands_sixteen_streams_over(real_model, tmp_path):
    """
    Without one lost attempt, so no token is computed again; no caller waits long; the worker that
    drained ends by itself, long before its streams do.
    """
    async with scene(real_model, tmp_path) as on:
        preemptions = (await on.it.worker(on.target)).load.preemptions_total
        pid = await on.it.signal(on.source, signal.SIGTERM)
        await on.ended()

        assert on.lost_attempts == []
        assert [len(ledger.move_gaps_s) for ledger in on.ledgers] == [1] * NUM_STREAMS
        assert {ledger.decode_worker for ledger in on.ledgers} == {on.target}
        assert {ledger.attempts for ledger in on.ledgers} == {1}
        assert (await on.it.worker(on.target)).load.preemptions_total == preemptions
        assert max(on.move_gaps_s) < GAP_LIMIT_S
        assert on.said(on.source, "worker.stopped")
        await on.it.until_restarted(on.source, old_pid=pid)


@ONLY_IN_FULL
@pytest.mark.parametrize("victim", ["source", "target"])
async def test_either_side_of_a_move_may_die(real_model, tmp_path, victim):
    """
    SIGKILL while streams move: each has the tokens of the calm run, whatever had moved by then.
    """
    async with scene(real_model, tmp_path) as on:
        pids = {name: (await on.it.worker(name)).identity.pid for name in (on.source, on.target)}
        os.kill(pids[on.source], signal.SIGTERM)
        await on.it.until(lambda pool: _num_running(pool, on.target) > 0)
        killed = getattr(on, victim)
        with suppress(ProcessLookupError):  # all has moved by now, and it has left
            os.kill(pids[killed], signal.SIGKILL)
        await on.ended()

        assert set(on.lost_attempts) <= {"PEER_UNAVAILABLE", "HANDOFF_LOST", "DRAINING"}
        await on.it.until_restarted(killed, old_pid=pids[killed])


@ONLY_IN_FULL
async def test_a_crowded_worker_is_relieved(real_model, tmp_path, monkeypatch):
    """
    Half of the streams wait for a place in its step while the other worker has all of its own:
    some move, one after the other, and those that waited run.
    """
    monkeypatch.setenv("KVRELAY_DECODE_MAX_SEQUENCES", "8")
    async with scene(real_model, tmp_path, num_running=8) as on:
        await on.it.until(lambda pool: _num_running(pool, on.target) > 0)
        await on.ended()

        assert on.lost_attempts == []
        assert 1 <= len(on.move_gaps_s) <= 8
        assert {ledger.decode_worker for ledger in on.ledgers} == {on.source, on.target}
        assert max(on.move_gaps_s) < GAP_LIMIT_S
