"""A decode worker behind real gRPC that prefills by itself: sessions and outputs."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from kvrelay.errors import ServingError
from kvrelay.rpc.status import from_grpc
from kvrelay.v1 import decode_pb2
from tests.support.builders import prompt
from tests.support.scripted_model import StepGate, expected_tokens
from tests.support.workers import (
    LIMITS,
    WAIT_S,
    decode_session,
    decode_submit,
    decode_worker,
    new_id,
    tokens_of,
    until,
)

PULL = {
    "handoff_id": "0" * 32,
    "worker_id": "prefill-0",
    "epoch": "0" * 16,
    "address": "127.0.0.1:1",
    "offer": {"name": "stream"},
}


async def refusal(awaitable) -> tuple[grpc.StatusCode, ServingError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WAIT_S):
            await awaitable
    return caught.value.code(), from_grpc(caught.value)


@pytest.mark.parametrize("num_tokens", [1, 4, 5, 8, 9, 33])
async def test_a_prompt_without_a_source_is_prefilled_here(num_tokens):
    """Positions begin at 0 and the first output says what the prefill cost."""
    async with decode_worker() as bench, decode_session(bench) as session:
        fields = decode_submit(prompt(num_tokens))
        await session.submit(**fields)
        outputs = await session.outputs(fields["request_id"])

    assert outputs[0].position == 0
    assert tokens_of(outputs) == expected_tokens(prompt(num_tokens), 8)
    assert outputs[0].HasField("prefill")
    assert not any(output.HasField("prefill") for output in outputs[1:])


async def test_emitted_tokens_are_replayed_and_not_sent_again():
    """Outputs go on at the next position, with the tokens an undisturbed run would give."""
    expected = expected_tokens(prompt(9), 8)
    async with decode_worker() as bench, decode_session(bench) as session:
        fields = decode_submit(prompt(9), emitted_token_ids=expected[:3])
        await session.submit(**fields)
        outputs = await session.outputs(fields["request_id"])

    assert outputs[0].position == 3
    assert tokens_of(outputs) == expected[3:]


async def test_one_message_carries_all_requests_of_a_step():
    """Requests that run together are told together."""
    gate = StepGate()
    async with decode_worker(gate=gate) as bench, decode_session(bench) as session:
        for i in range(4):
            await session.submit(**decode_submit(prompt(3, variant=i)))
        await until(lambda: bench.engine.load().waiting + bench.engine.load().running == 4)
        gate.open()
        most = 0
        num_finished = 0
        while num_finished < 4:
            message = await session.read()
            most = max(most, len(message.outputs))
            num_finished += sum(output.finish_reason != 0 for output in message.outputs)

    assert most == 4


async def test_a_slow_reader_is_told_everything_in_merged_messages():
    """What is not read is merged per attempt, gapless, whatever the stream's own buffers hold."""
    async with decode_worker() as bench, decode_session(bench) as session:
        fields = decode_submit(prompt(3), max_tokens=200)
        await session.submit(**fields)
        await until(lambda: bench.runner.num_steps > 0 and bench.engine.is_idle)
        outputs = await session.outputs(fields["request_id"])

    assert tokens_of(outputs) == expected_tokens(prompt(3), 200)


async def test_a_cancel_frees_the_blocks_within_a_step():
    """A running attempt is computed no further than the step under way."""
    gate = StepGate()
    async with decode_worker(gate=gate) as bench, decode_session(bench) as session:
        fields = decode_submit(prompt(9), max_tokens=200)
        await session.submit(**fields)
        await asyncio.to_thread(gate.wait_entered)
        await session.cancel(fields["request_id"])
        await session.submit(**decode_submit(prompt(3), max_tokens=0))
        await session.one_failure()  # so the cancel before it was obeyed
        gate.open()
        await until(lambda: bench.engine.is_idle)

        assert bench.num_held_blocks == 0
        assert bench.runner.num_steps == 1


async def test_a_broken_session_frees_everything():
    """Running and waiting attempts of a coordinator that went away end within a step."""
    limits = replace(LIMITS, max_sequences=1)
    async with decode_worker(limits=limits) as bench:
        async with decode_session(bench) as session:
            await session.submit(**decode_submit(prompt(9), max_tokens=200))
            await session.submit(**decode_submit(prompt(9), max_tokens=200))
            await session.read()
        await until(lambda: bench.engine.is_idle)

        assert bench.num_held_blocks == 0


async def test_sessions_do_not_cancel_each_others_attempts():
    """A cancel names attempts of its own session only."""
    async with (
        decode_worker() as bench,
        decode_session(bench) as ours,
        decode_session(bench) as theirs,
    ):
        fields = decode_submit(prompt(9), max_tokens=100)
        await ours.submit(**fields)
        await theirs.cancel(fields["request_id"])
        outputs = await ours.outputs(fields["request_id"])

    assert len(tokens_of(outputs)) == 100


async def test_stale_and_unknown_cancels_are_ignored():
    """Another attempt's number, or a request nobody knows, changes nothing."""
    async with decode_worker() as bench, decode_session(bench) as session:
        fields = decode_submit(prompt(9), attempt=2)
        await session.cancel(new_id())
        await session.submit(**fields)
        await session.cancel(fields["request_id"], attempt=1)
        outputs = await session.outputs(fields["request_id"])

    assert outputs[0].attempt == 2


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [997]}, "token_ids"),
        ({"emitted_token_ids": [997]}, "emitted_token_ids"),
        ({"emitted_token_ids": [1] * 8}, "emitted_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"cache_salt": bytes(65)}, "cache_salt"),
        ({"pull": {"handoff_id": "x"}}, "pull.handoff_id"),
        *(
            ({"pull": {**PULL, name: value}}, f"pull.{name}")
            for name, value in [
                ("worker_id", ""),
                ("worker_id", "a" * 65),
                ("epoch", "0" * 17),
                ("address", "127.0.0.1:0"),
                ("address", "x" * 300 + ":1"),
                ("ticket", bytes(65)),
                ("other_offers", [{"name": f"t{i}"} for i in range(16)]),
            ]
        ),
    ],
)
async def test_a_bad_submit_fails_by_field_and_the_session_goes_on(changes, field):
    """Each malformed field is named, and the next submit is served."""
    async with decode_worker() as bench, decode_session(bench) as session:
        await session.submit(**decode_submit(prompt(5), **changes))
        failure = await session.one_failure()
        fields = decode_submit(prompt(5))
        await session.submit(**fields)
        await session.outputs(fields["request_id"])

    assert failure.reason == "INVALID_REQUEST"
    assert failure.details["field"] == field


@pytest.mark.parametrize(
    "changes", [{"puller_id": ""}, {"puller_id": "a" * 65}, {"handoff_id": "x"}]
)
async def test_a_bad_order_to_hand_over_ends_the_session(changes):
    """Only a coordinator that is none says so, and there is no attempt to answer for."""
    order = {"request_id": new_id(), "attempt": 1, "handoff_id": new_id(), "puller_id": "right"}
    async with decode_worker() as bench, decode_session(bench) as session:
        message = decode_pb2.HandOver(**{**order, **changes})
        await session.call.write(decode_pb2.DecodeRequest(hand_over=message))
        code, error = await refusal(session.read())

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details["field"] == f"hand_over.{next(iter(changes))}"


async def test_a_request_larger_than_the_pool_is_refused_at_once():
    """It could never finish, so it does not wait."""
    async with decode_worker(num_blocks=4) as bench, decode_session(bench) as session:
        await session.submit(**decode_submit(prompt(10)))

        assert (await session.one_failure()).reason == "KV_POOL_EXHAUSTED"


async def test_a_draining_worker_finishes_what_it_has():
    """The session ends by itself after the last token."""
    gate = StepGate()
    async with decode_worker(gate=gate) as bench, decode_session(bench) as session:
        fields = decode_submit(prompt(5), max_tokens=50)
        await session.submit(**fields)
        await asyncio.to_thread(gate.wait_entered)
        bench.service.begin_drain()
        async with decode_session(bench) as late:
            code, _ = await refusal(late.read())
        gate.open()
        outputs = await session.outputs(fields["request_id"])
        end = await session.read()

    assert code is grpc.StatusCode.UNAVAILABLE
    assert tokens_of(outputs) == expected_tokens(prompt(5), 50)
    assert end is grpc.aio.EOF
