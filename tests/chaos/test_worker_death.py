"""Does it stay right when workers die? Real processes, the real model, SIGKILL and SIGSTOP.

The oracle is the same deployment before anything was hurt: tokens are a function of the request,
so every stream must end exactly as it did then.
"""

import asyncio
import os
import signal

import pytest

from tests.support.asking import Answer, Ask, deployed
from tests.support.prompts import prompts

pytestmark = [pytest.mark.chaos, pytest.mark.realmodel, pytest.mark.timeout(240)]

ALWAYS = ("--disaggregate", "always")


async def read_until(stream, answer: Answer, num_tokens: int) -> None:
    """Take responses until the caller has that many tokens."""
    while len(answer.token_ids) < num_tokens:
        answer.take(await anext(stream))


async def worker_of(it, request_role) -> str:
    """The worker of that role on which our one request is placed."""
    pool = await it.until(lambda pool: any(_has(m, request_role) for m in pool.members))
    return next(m.identity.worker_id for m in pool.members if _has(m, request_role))


def _has(member, role) -> bool:
    return member.identity.role.value == role and member.placed_sequences > 0


async def test_a_stream_survives_the_death_of_its_decode_worker(real_model, tmp_path):
    """
    SIGKILL in mid-stream with another alive: the stream is whole, its tokens the same, be they
    greedy or sampled.
    """
    prompt = prompts(real_model)[40]
    async with deployed(real_model, tmp_path, *ALWAYS, num_decode=2) as (it, asker):
        for temperature in (0.0, 0.9):
            ask = Ask(prompt, max_tokens=96, temperature=temperature, seed=11)
            expected = (await asker.one(ask)).token_ids
            answer = Answer()
            stream = aiter(asker.stub.Generate(ask.message, timeout=120))
            await read_until(stream, answer, 8)

            killed = await worker_of(it, "decode")
            pid = await it.signal(killed, signal.SIGKILL)
            async for response in stream:
                answer.take(response)

            assert answer.token_ids == expected
            assert list(answer.ledger.lost_attempts) == ["PEER_UNAVAILABLE"]
            assert answer.ledger.decode_worker != killed
            await it.until_restarted(killed, old_pid=pid)


async def test_a_stream_survives_the_death_of_its_prefill_worker_in_mid_prompt(
    real_model, tmp_path
):
    """
    SIGKILL while the prompt is computed: it is prefilled again elsewhere, the answer the same.
    """
    ask = Ask(prompts(real_model)[-1], max_tokens=16)
    async with deployed(real_model, tmp_path, *ALWAYS, num_prefill=2) as (it, asker):
        asking = asyncio.create_task(asker.one(ask))
        name = await worker_of(it, "prefill")
        pid = await it.signal(name, signal.SIGKILL)
        answer = await asking
        await it.until_restarted(name, old_pid=pid)

        assert list(answer.ledger.lost_attempts) == ["PEER_UNAVAILABLE"]
        assert answer.ledger.prefill_worker != name
        assert answer.token_ids == (await asker.one(ask)).token_ids


async def test_sixteen_streams_survive_one_death_after_another(real_model, tmp_path):
    """
    Every worker is killed once under load, and every caller has the tokens of the calm run.
    """
    asks = [Ask(p, 40, temperature=0.7, seed=i) for i, p in enumerate(prompts(real_model)[20:36])]
    async with deployed(real_model, tmp_path, *ALWAYS, num_prefill=2, num_decode=2) as (it, asker):
        expected = [a.token_ids for a in await asker.all(asks, at_once=16)]
        for name in ("decode-0", "prefill-0", "decode-1", "prefill-1"):
            asking = asyncio.create_task(asker.all(asks, at_once=16))
            await it.until(lambda pool: pool.active_requests >= 16)
            pid = await it.signal(name, signal.SIGKILL)
            answers = await asking

            assert [a.token_ids for a in answers] == expected
            await it.until_restarted(name, old_pid=pid)


async def test_a_decode_worker_that_stops_answering_is_replaced(real_model, tmp_path):
    """
    SIGSTOP looks like nothing at all: silence is noticed, and late words are not heard.
    """
    ask = Ask(prompts(real_model)[30], max_tokens=64)
    async with deployed(real_model, tmp_path, *ALWAYS, num_decode=2) as (it, asker):
        expected = (await asker.one(ask)).token_ids
        answer = Answer()
        stream = aiter(asker.stub.Generate(ask.message, timeout=120))
        await read_until(stream, answer, 4)
        pid = await it.signal(await worker_of(it, "decode"), signal.SIGSTOP)
        try:
            async for response in stream:
                answer.take(response)
        finally:
            os.kill(pid, signal.SIGCONT)

        assert answer.token_ids == expected
        await it.until(lambda pool: len(pool.members) == 3)


async def test_the_last_decode_worker_may_die_too(real_model, tmp_path):
    """
    With nobody left the stream waits for the restart, and then goes on.
    """
    ask = Ask(prompts(real_model)[25], max_tokens=48)
    async with deployed(real_model, tmp_path, *ALWAYS) as (it, asker):
        expected = (await asker.one(ask)).token_ids
        answer = Answer()
        stream = aiter(asker.stub.Generate(ask.message, timeout=120))
        await read_until(stream, answer, 4)
        await it.signal("decode-0", signal.SIGKILL)
        async for response in stream:
            answer.take(response)

        assert answer.token_ids == expected
