"""The fence: KV of a hold that lapsed is never joined, however right its bytes may be."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from kvrelay.rpc import status
from kvrelay.transfer.base import BlockCopy, KvTransport, PullStats, RemoteHold
from tests.support.builders import prompt
from tests.support.handoff_proxy import proxy_before
from tests.support.scripted_model import expected_tokens
from tests.support.workers import (
    PrefillBench,
    decode_session,
    decode_submit,
    decode_worker,
    new_id,
    prefill_session,
    prefill_submit,
    prefill_worker,
    pull_of,
    tokens_of,
    until,
)

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(60)]

PROMPT = prompt(21)
MAX_TOKENS = 6


class Lapsing:
    """As `inner`, but once all bytes of the first handoff have landed, and the holder has said its
    last word, its hold lapses; its blocks go to somebody else."""

    def __init__(self, inner: KvTransport) -> None:
        self.holder: PrefillBench | None = None
        self.has_lapsed = False
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        stats = await self._inner.pull(remote, copies)
        assert self.holder is not None
        keeper = self.holder.keeper
        hold = keeper.holds.alive(remote.handoff_id)
        assert hold is not None
        if not self.has_lapsed and copies[-1].index == hold.num_blocks - 1:
            self.has_lapsed = True
            await until(lambda: keeper._kept[hold].last_word is not None)
            for _ in range(20):  # what was said arrives, in this process, within a few turns
                await asyncio.sleep(0.005)
            keeper.lapse(hold)
        return stats


@pytest.mark.parametrize("transport", ["shm", "stream"])
async def test_a_hold_that_lapsed_before_the_fence_is_lost(transport):
    """
    All bytes are here and right, the last word was heard, and that it lapsed was not: still there
    is no token of them, and the next attempt has them all.
    """
    lapsing: list[Lapsing] = []

    def wrap(inner: KvTransport) -> Lapsing:
        lapsing.append(Lapsing(inner))
        return lapsing[-1]

    async with (
        prefill_worker() as holder,
        proxy_before(holder.address) as proxy,
        decode_worker(wrap=wrap) as puller,
        prefill_session(holder) as prefills,
        decode_session(puller) as decodes,
    ):
        proxy.hides_lapses = True
        for each in lapsing:
            each.holder = holder
        request_id = new_id()
        reasons, outputs = [], []
        for attempt in (1, 2):
            handoff_id = new_id()
            names = {"request_id": request_id, "attempt": attempt, "max_tokens": MAX_TOKENS}
            source = pull_of(holder, handoff_id, transport, address=proxy.address)
            await decodes.submit(**decode_submit(PROMPT, pull=source, **names))
            await prefills.submit(**prefill_submit(PROMPT, handoff_id=handoff_id, **names))
            while not (outputs and outputs[-1].finish_reason):
                message = await decodes.read()
                outputs += message.outputs
                reasons += [status.from_failure(failed.failure).reason for failed in message.failed]
                if message.failed:
                    break

        assert any(each.has_lapsed for each in lapsing)
        assert reasons == ["HANDOFF_LOST"]
        assert tokens_of(outputs) == expected_tokens(PROMPT, MAX_TOKENS)
        await until(lambda: holder.engine.is_idle and puller.engine.is_idle)
