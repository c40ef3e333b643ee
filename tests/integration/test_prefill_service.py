"""A prefill worker behind real gRPC: sessions, holds, and what becomes of both."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from kvrelay.rpc.status import from_grpc
from kvrelay.transfer.digest import block_digest
from kvrelay.v1 import handoff_pb2
from tests.support.builders import prompt
from tests.support.scripted_model import StepGate, expected_tokens
from tests.support.workers import (
    BLOCK_SIZE,
    HOLD_LIMITS,
    WAIT_S,
    asked,
    handoff_stub,
    new_id,
    prefill_session,
    prefill_submit,
    prefill_worker,
    pull_request,
    until,
)


async def pulled(stub, request):
    """All messages of a pull up to its `complete`."""
    messages = []
    async with asyncio.timeout(WAIT_S):
        call = stub.Pull(request)
        async for message in call:
            messages.append(message)
            if message.HasField("complete"):
                call.cancel()
                return messages
    raise AssertionError("the pull ended without complete")


def generations_of(messages) -> list[int]:
    return [b.generation for m in messages if m.HasField("blocks") for b in m.blocks.blocks]


def release_request(bench, handoff_id, generations, **changes):
    return handoff_pb2.ReleaseRequest(
        **asked(bench, handoff_id, **changes), generations=generations
    )


async def refusal(awaitable):
    """The error that a call ends with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(WAIT_S):
            await awaitable
    return caught.value.code(), from_grpc(caught.value)


async def refused_pull(stub, request):
    async def first():
        async for _ in stub.Pull(request):
            pass

    return await refusal(first())


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9, 31, 32, 33])
async def test_a_prompt_is_announced_block_by_block_and_its_first_token_told(num_tokens):
    """Runs of blocks follow each other without a gap and add up to the prompt's blocks."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(num_tokens))
        await session.submit(**fields)
        first = await session.one_prefilled()
        async with handoff_stub(bench) as stub:
            messages = await pulled(stub, pull_request(bench, fields["handoff_id"]))

    assert first.token_id == expected_tokens(prompt(num_tokens), 1)[0]
    assert messages[0].opened.num_tokens == num_tokens
    assert messages[0].opened.num_blocks == -(-num_tokens // BLOCK_SIZE)
    runs = [m.blocks for m in messages if m.HasField("blocks")]
    starts = [sum(len(r.blocks) for r in runs[:i]) for i in range(len(runs))]
    assert [run.first_index for run in runs] == starts
    assert sum(len(run.blocks) for run in runs) == messages[0].opened.num_blocks
    told = [m.digests for m in messages if m.HasField("digests")]
    starts = [sum(len(r.digests) for r in told[:i]) for i in range(len(told))]
    assert [run.first_index for run in told] == starts
    assert sum(len(run.digests) for run in told) == messages[0].opened.num_blocks
    assert messages[-1].complete.output_token_ids == [first.token_id]
    assert messages[-1].complete.num_tokens == num_tokens
    assert not messages[0].opened.is_running


async def test_blocks_are_announced_while_the_prompt_is_still_computed():
    """After the first chunk its blocks are announced; the rest waits for the next chunk."""
    gate = StepGate()
    async with prefill_worker(gate=gate) as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(20))
        await session.submit(**fields)
        gate.let_one_pass()
        async with handoff_stub(bench) as stub:
            call = stub.Pull(pull_request(bench, fields["handoff_id"]))
            early = [await call.read()]
            while sum(len(m.digests.digests) for m in early) < 2:
                early.append(await call.read())
            gate.open()
            last = await call.read()
            while not last.HasField("complete"):
                last = await call.read()

    assert early[0].HasField("opened")
    assert sum(len(m.blocks.blocks) for m in early) == 2
    assert last.complete.num_tokens == 20


async def test_a_released_hold_gives_its_blocks_back_and_may_be_released_again():
    """The same release is OK twice; the blocks are free after the first."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(10))
        await session.submit(**fields)
        await session.one_prefilled()
        async with handoff_stub(bench) as stub:
            messages = await pulled(stub, pull_request(bench, fields["handoff_id"]))
            release = release_request(bench, fields["handoff_id"], generations_of(messages))
            held_before = bench.num_held_blocks
            answer = await stub.Release(release)
            held_after = bench.num_held_blocks
            await stub.Release(release)

        assert (held_before, held_after) == (3, 0)
        assert answer.header.epoch == bench.epoch
        assert bench.service.load().handoffs_total == 1


async def test_a_cancel_in_mid_prompt_frees_every_block():
    """Cancelling between two chunks stops the prefill within the step under way."""
    gate = StepGate()
    async with prefill_worker(gate=gate) as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(40))
        await session.submit(**fields)
        await asyncio.to_thread(gate.wait_entered)
        await session.cancel(fields["request_id"])
        await until(lambda: bench.keeper.holds.is_empty)
        gate.open()
        await until(lambda: bench.engine.is_idle)

        assert bench.num_held_blocks == 0
        assert bench.runner.num_steps == 1


async def test_a_broken_session_lapses_its_holds():
    """When the coordinator goes away, complete and computing holds end alike."""
    async with prefill_worker() as bench, handoff_stub(bench) as stub:
        fields = prefill_submit(prompt(10))
        async with prefill_session(bench) as session:
            await session.submit(**fields)
            await session.one_prefilled()
        await until(lambda: bench.engine.is_idle)
        code, error = await refused_pull(stub, pull_request(bench, fields["handoff_id"]))

    assert code is grpc.StatusCode.NOT_FOUND
    assert error.reason == "HANDOFF_LOST"


async def test_a_lapsed_hold_refuses_its_release():
    """Whoever comes with a release after a cancel is told to drop the bytes."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(10))
        await session.submit(**fields)
        await session.one_prefilled()
        async with handoff_stub(bench) as stub:
            messages = await pulled(stub, pull_request(bench, fields["handoff_id"]))
            await session.cancel(fields["request_id"])
            await until(lambda: bench.engine.is_idle)
            code, error = await refusal(
                stub.Release(release_request(bench, fields["handoff_id"], generations_of(messages)))
            )

    assert code is grpc.StatusCode.NOT_FOUND
    assert error.reason == "HANDOFF_LOST"


async def test_wrong_generations_are_refused_and_the_hold_stays():
    """A release that was told of other blocks is not granted."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(10))
        await session.submit(**fields)
        await session.one_prefilled()
        async with handoff_stub(bench) as stub:
            messages = await pulled(stub, pull_request(bench, fields["handoff_id"]))
            wrong = [generation + 1 for generation in generations_of(messages)]
            code, error = await refusal(
                stub.Release(release_request(bench, fields["handoff_id"], wrong))
            )

        assert (code, error.reason) == (grpc.StatusCode.NOT_FOUND, "HANDOFF_LOST")
        assert bench.num_held_blocks == 3


async def test_only_the_named_puller_of_this_epoch_and_layout_may_pull():
    """Another worker, another epoch and another fingerprint each get their own refusal."""
    async with (
        prefill_worker() as bench,
        prefill_session(bench) as session,
        handoff_stub(bench) as stub,
    ):
        fields = prefill_submit(prompt(10))
        await session.submit(**fields)
        await session.one_prefilled()
        request = pull_request(bench, fields["handoff_id"])
        other = pull_request(bench, fields["handoff_id"], puller_id="decode-2")
        stale = pull_request(bench, fields["handoff_id"], epoch="0" * 16)
        foreign = pull_request(bench, fields["handoff_id"])
        foreign.fingerprint.layout.num_layers = 7
        codes = [(await refused_pull(stub, each))[0] for each in (other, stale, foreign)]
        still = await pulled(stub, request)

    assert codes == [
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.FAILED_PRECONDITION,
    ]
    assert still[-1].HasField("complete")


async def test_a_pull_that_comes_before_its_prompt_waits_for_it():
    """The puller may be faster than the submit."""
    async with (
        prefill_worker() as bench,
        prefill_session(bench) as session,
        handoff_stub(bench) as stub,
    ):
        fields = prefill_submit(prompt(10))
        pulling = asyncio.create_task(pulled(stub, pull_request(bench, fields["handoff_id"])))
        await until(lambda: not bench.keeper.holds.is_empty)
        await session.submit(**fields)
        messages = await pulling

    assert messages[0].opened.num_tokens == 10


async def test_a_pull_whose_prompt_never_comes_is_given_up():
    """It waits at most `unclaimed_hold_s`, and is counted."""
    limits = replace(HOLD_LIMITS, unclaimed_hold_s=0.05)
    async with prefill_worker(hold_limits=limits) as bench, handoff_stub(bench) as stub:
        code, error = await refused_pull(stub, pull_request(bench, new_id()))

        assert (code, error.reason) == (grpc.StatusCode.NOT_FOUND, "HANDOFF_LOST")
        assert bench.num_expired_holds == 1


async def test_a_complete_hold_that_nobody_pulls_is_given_up():
    """After `hold_s` without a puller its blocks are free."""
    limits = replace(HOLD_LIMITS, hold_s=0.05)
    async with prefill_worker(hold_limits=limits) as bench, prefill_session(bench) as session:
        await session.submit(**prefill_submit(prompt(10)))
        await session.one_prefilled()
        await until(lambda: bench.engine.is_idle)

        assert bench.num_expired_holds == 1


async def test_a_first_token_that_ends_the_request_holds_nothing():
    """With one token wanted, the blocks are free as soon as it is sampled."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        await session.submit(**prefill_submit(prompt(10), max_tokens=1))
        first = await session.one_prefilled()

        assert first.finish_reason != 0
        assert bench.engine.is_idle


async def test_read_streams_the_bytes_of_announced_blocks_only():
    """Frames carry exactly the blocks; an index that was not announced is refused."""
    async with (
        prefill_worker() as bench,
        prefill_session(bench) as session,
        handoff_stub(bench) as stub,
    ):
        fields = prefill_submit(prompt(10))
        await session.submit(**fields)
        await session.one_prefilled()
        messages = await pulled(stub, pull_request(bench, fields["handoff_id"]))
        read = handoff_pb2.ReadRequest(**asked(bench, fields["handoff_id"]), indexes=[2, 0])
        frames = [frame async for frame in stub.Read(read)]
        offsets = [
            b.offset_bytes for m in messages if m.HasField("blocks") for b in m.blocks.blocks
        ]
        size = bench.cache.layout.block_num_bytes
        held = [bytes(bench.cache.range_bytes(offsets[i], size)) for i in (2, 0)]
        every = [bytes(bench.cache.range_bytes(offset, size)) for offset in offsets]
        digests = [d for m in messages if m.HasField("digests") for d in m.digests.digests]
        read.indexes[:] = [3]
        code, _ = await refusal(_drain(stub.Read(read)))

    assert [frame.data for frame in frames] == held
    assert [frame.index for frame in frames] == [2, 0]
    assert digests == [block_digest(memoryview(block)) for block in every]
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def _drain(call):
    async for _ in call:
        pass


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [997]}, "token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"handoff_id": "x"}, "handoff_id"),
        ({"puller_id": ""}, "puller_id"),
        ({"cache_salt": bytes(65)}, "cache_salt"),
        ({"stop_token_ids": [4000]}, "stop_token_ids"),
        ({"sampling": None}, "sampling.temperature"),
    ],
)
async def test_a_bad_submit_fails_by_field_and_the_session_goes_on(changes, field):
    """Each malformed field is named, and the next submit is served."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        await session.submit(**prefill_submit(prompt(5), **changes))
        failure = await session.one_failure()
        await session.submit(**prefill_submit(prompt(5)))
        await session.one_prefilled()

    assert failure.reason == "INVALID_REQUEST"
    assert failure.details["field"] == field


async def test_a_prompt_larger_than_the_pool_is_refused_at_once():
    """It could never be admitted, so it does not wait."""
    async with prefill_worker(num_blocks=4) as bench, prefill_session(bench) as session:
        await session.submit(**prefill_submit(prompt(17)))

        assert (await session.one_failure()).reason == "KV_POOL_EXHAUSTED"


async def test_an_attempt_without_a_name_ends_the_session():
    """Nothing could be answered to it."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        await session.submit(**prefill_submit(prompt(5), request_id="short"))
        code, _ = await refusal(session.read())

    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_handoff_id_is_used_once():
    """A second submit under the same handoff fails and takes no blocks."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(5))
        await session.submit(**fields)
        await session.one_prefilled()
        await session.submit(**prefill_submit(prompt(50), handoff_id=fields["handoff_id"]))
        failure = await session.one_failure()

        assert failure.details["field"] == "handoff_id"
        await until(lambda: bench.num_held_blocks == 2)


async def test_a_draining_worker_finishes_its_holds_and_refuses_new_work():
    """The session ends by itself once the last hold was given up; a new one is refused."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        fields = prefill_submit(prompt(5))
        await session.submit(**fields)
        await session.one_prefilled()
        bench.service.begin_drain()
        await session.submit(**prefill_submit(prompt(5)))
        failure = await session.one_failure()
        async with prefill_session(bench) as late:
            code, _ = await refusal(late.read())
        await session.cancel(fields["request_id"])
        end = await session.read()

    assert failure.reason == "DRAINING"
    assert code is grpc.StatusCode.UNAVAILABLE
    assert end is grpc.aio.EOF


async def test_unknown_cancels_are_ignored():
    """A cancel of an attempt nobody knows changes nothing."""
    async with prefill_worker() as bench, prefill_session(bench) as session:
        await session.cancel(new_id())
        await session.submit(**prefill_submit(prompt(5)))

        assert (await session.one_prefilled()).attempt == 1
