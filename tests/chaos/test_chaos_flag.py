"""`kvrelay up --chaos`: handoffs go wrong all the time, and callers do not notice."""

import asyncio
import json
from collections import Counter
from pathlib import Path

import grpc
import pytest

from tests.support.asking import Answer, Ask, Asker, deployed
from tests.support.prompts import prompts

pytestmark = [pytest.mark.chaos, pytest.mark.realmodel, pytest.mark.timeout(240)]

ALWAYS = ("--disaggregate", "always")
CHAOS = (
    "corrupt=0.1,drop=0.15,delay=0.3:20ms,truncate=0.05,duplicate=0.2,reorder=0.2,"
    "stall=0.05:300ms,seed=7"
)


TYPED = (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE)
"""KV that was corrupt twice, and attempts that were all lost: with so much going wrong, both are
to be expected of some."""


async def right_or_typed(asker: Asker, ask: Ask) -> Answer | None:
    """None where it ended with a status that says why."""
    try:
        return await asker.one(ask)
    except grpc.aio.AioRpcError as error:
        if error.code() not in TYPED:
            raise
        return None


def said(log_dir: Path, worker_id: str, event: str) -> list[dict]:
    lines = (log_dir / f"{worker_id}.log").read_text().splitlines()
    entries = (json.loads(line) for line in lines if line.startswith("{"))
    return [entry for entry in entries if entry.get("event") == event]


async def test_tokens_stay_right_under_chaos(real_model, tmp_path):
    """
    With every third pull harmed and most late, all tokens are those of a calm deployment; each
    fault is counted in the log, which warns at the start.
    """
    asks = [Ask(p, 12, temperature=0.7, seed=i) for i, p in enumerate(prompts(real_model)[:36])]
    async with deployed(real_model, tmp_path / "calm", *ALWAYS) as (_, asker):
        expected = [answer.token_ids for answer in await asker.all(asks, at_once=8)]
    async with deployed(real_model, tmp_path / "chaos", *ALWAYS, "--chaos", CHAOS) as (it, asker):
        room = asyncio.Semaphore(8)

        async def one(ask: Ask) -> Answer | None:
            async with room:
                return await right_or_typed(asker, ask)

        answers = await asyncio.gather(*(one(ask) for ask in asks))

    served = [answer is not None for answer in answers]
    assert sum(served) >= 0.8 * len(asks)
    for answer, tokens in zip(answers, expected, strict=True):
        assert answer is None or answer.token_ids == tokens
    lost = Counter(reason for a in answers if a is not None for reason in a.ledger.lost_attempts)
    assert lost, "nothing went wrong"
    (warned,) = said(it.log_dir, "decode-0", "transfer.chaos")
    assert warned["level"] == "warning"
    injected = said(it.log_dir, "decode-0", "transfer.fault_injected")
    faults = Counter(fault for entry in injected for fault in entry["faults"])
    assert faults["corrupt"] > 0
    assert faults["drop"] > 0
    assert not said(it.log_dir, "prefill-0", "transfer.chaos"), "prefill workers pull nothing"
