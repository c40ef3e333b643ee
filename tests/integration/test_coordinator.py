"""The coordinator against scripted workers: real sockets and streams, tokens by formula."""

import asyncio
import contextlib
import time
from dataclasses import replace

import grpc
import pytest

from coordinator.request import GenerateSpec, TokenPrompt
from coordinator.router import Disaggregate
from kvrelay.errors import (
    DeadlinePassed,
    HandoffLost,
    InvalidRequest,
    KvCorrupt,
    NotFound,
    NoWorker,
    PeerUnavailable,
    PermissionDenied,
    QueueFull,
)
from kvrelay.events import Delta, Finished, Started
from kvrelay.rpc.channel import open_channel
from kvrelay.types import FinishReason, Role, WorkerLoad
from kvrelay.v1 import generate_pb2, generate_pb2_grpc
from tests.support.asking import Ask, Asker
from tests.support.scripted_coordinator import scripted_coordinator
from tests.support.scripted_workers import ScriptedWorker, oracle

PROMPT = (5, 6, 7, 8, 9)


def spec(max_tokens=6, **changes):
    fields = {"prompt": TokenPrompt(PROMPT), "max_tokens": max_tokens, "temperature": 0.0}
    return GenerateSpec(**(fields | changes))


async def until(condition):
    """Let the loop run until `condition()`."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.001)


async def collect(relay, a_spec, **kwargs):
    async with contextlib.aclosing(relay.generate(a_spec, **kwargs)) as events:
        return [event async for event in events]


def tokens(events):
    return [t for event in events if isinstance(event, Delta) for t in event.token_ids]


def positions(events):
    """Where each delta says it begins, beside where it must."""
    deltas = [e for e in events if isinstance(e, Delta)]
    expected, at = [], 0
    for delta in deltas:
        expected.append(at)
        at += len(delta.token_ids)
    return [d.position for d in deltas], expected


@contextlib.asynccontextmanager
async def deployment(*workers, **kwargs):
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            await stack.enter_async_context(worker)
        deployed = await stack.enter_async_context(scripted_coordinator(**kwargs))
        await deployed.join(*workers)
        yield deployed


async def test_a_request_crosses_both_workers_and_its_ledger_adds_up():
    """
    Started, gapless deltas, finished; the stages of the ledger sum to TTFT and to gap 1.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with deployment(p, d) as deployed:
        events = await collect(deployed.relay, spec())

        assert isinstance(events[0], Started)
        assert tokens(events) == oracle(PROMPT, 6)
        assert positions(events)[0] == positions(events)[1]
        finished = events[-1]
        assert isinstance(finished, Finished)
        assert finished.reason is FinishReason.LENGTH
        ledger = finished.ledger
        assert (ledger.prefill_worker, ledger.decode_worker) == ("p0", "d0")
        assert sum(ledger.ttft_stages.values()) == pytest.approx(ledger.ttft_s)
        assert sum(ledger.gap1_stages.values()) == pytest.approx(ledger.gap1_s)
        assert deployed.relay.explain(ledger.request_id) == ledger


async def test_the_first_token_does_not_wait_for_the_handoff():
    """
    The caller has token 1 while the decode worker still says nothing.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE, is_held=True)
    async with deployment(p, d) as deployed:
        async with contextlib.aclosing(deployed.relay.generate(spec())) as events:
            await anext(events)
            first = await anext(events)

            assert first.token_ids == tuple(oracle(PROMPT, 1))
            d.allow(100)
            rest = [event async for event in events]
        assert tokens([first, *rest]) == oracle(PROMPT, 6)


async def test_a_decode_worker_lost_in_mid_stream_is_invisible_to_the_caller():
    """
    The next one is given the emitted tokens and goes on at the next position.
    """
    p = ScriptedWorker("p0", Role.PREFILL)
    d0, d1 = (ScriptedWorker(f"d{i}", Role.DECODE, is_held=True) for i in range(2))
    async with deployment(p, d0, d1) as deployed:
        async with contextlib.aclosing(deployed.relay.generate(spec(8))) as events:
            seen = [await anext(events), await anext(events)]
            await until(lambda: d0.submits or d1.submits)
            first, other = (d0, d1) if d0.submits else (d1, d0)
            first.allow(4)
            while len(tokens(seen)) < 4:
                seen.append(await anext(events))
            await first.vanish()
            other.allow(100)
            seen += [event async for event in events]

        assert tokens(seen) == oracle(PROMPT, 8)
        assert positions(seen)[0] == positions(seen)[1]
        assert list(other.submits[0].emitted_token_ids) == oracle(PROMPT, 4)
        assert other.submits[0].attempt == 2
        assert seen[-1].ledger.lost_attempts == ("PEER_UNAVAILABLE",)


async def test_a_prefill_worker_lost_before_the_first_token_costs_only_time():
    """
    The prompt is prefilled again elsewhere.
    """
    p0, p1 = (ScriptedWorker(f"p{i}", Role.PREFILL, is_held=True) for i in range(2))
    d = ScriptedWorker("d0", Role.DECODE, is_held=True)
    async with deployment(p0, p1, d) as deployed:
        asking = asyncio.create_task(collect(deployed.relay, spec()))
        await asyncio.wait(
            [asyncio.create_task(w.heard.wait()) for w in (p0, p1)],
            return_when=asyncio.FIRST_COMPLETED,
        )
        first, other = (p0, p1) if p0.submits else (p1, p0)
        await first.vanish()
        other.allow(100)
        d.allow(100)

        events = await asking
        assert tokens(events) == oracle(PROMPT, 6)
        assert events[-1].ledger.ttft_stages["lost_attempts"] > 0
        first.heard.set()
        other.heard.set()


@pytest.mark.parametrize("is_draining", [True, False])
async def test_a_prefill_worker_that_drained_and_left_has_done_its_part(is_draining):
    """
    Its prompt is computed, and whether its KV arrived is for the decode worker to say; one that is
    simply gone may have taken the KV with it.
    """
    p0, p1 = (ScriptedWorker(f"p{i}", Role.PREFILL) for i in range(2))
    d = ScriptedWorker("d0", Role.DECODE, is_held=True)
    async with deployment(p0, p1, d) as deployed:
        async with contextlib.aclosing(deployed.relay.generate(spec())) as events:
            seen = [await anext(events), await anext(events)]
            first = p0 if p0.submits else p1
            first.load = replace(first.load, is_draining=is_draining)
            (member,) = (m for m in deployed.pool.members() if m.worker_id == first.worker_id)
            await until(lambda: member.load.is_draining == is_draining)
            rest = asyncio.create_task(_all(events))
            await first.vanish()
            await until(lambda: len(deployed.pool.members()) == 2)
            d.allow(100)
            seen += await rest

        assert tokens(seen) == oracle(PROMPT, 6)
        lost = () if is_draining else ("PEER_UNAVAILABLE",)
        assert seen[-1].ledger.lost_attempts == lost
        assert len(d.submits) == 1 + len(lost)


async def _all(events) -> list:
    return [event async for event in events]


async def test_a_lapsed_handoff_is_prefilled_again():
    """
    The attempt is given up, the request is not.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    d.fail_with = [HandoffLost("the hold lapsed")]
    async with deployment(p, d) as deployed:
        events = await collect(deployed.relay, spec())

        assert tokens(events) == oracle(PROMPT, 6)
        assert [s.attempt for s in p.submits] == [1, 2]
        assert p.submits[0].handoff_id != p.submits[1].handoff_id


async def test_corrupt_kv_twice_ends_the_request_as_data_loss():
    """
    Never a token from it, and no third try.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    d.fail_with = [KvCorrupt("block 1"), KvCorrupt("block 2"), KvCorrupt("block 3")]
    async with deployment(p, d) as deployed:
        with pytest.raises(KvCorrupt):
            await collect(deployed.relay, spec())
        assert len(d.submits) == 2


async def test_attempts_are_bounded():
    """
    A request that loses every worker fails as unavailable, with the count.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    d.fail_with = [HandoffLost("again") for _ in range(9)]
    async with deployment(p, d, max_attempts=3) as deployed:
        with pytest.raises(NoWorker) as failed:
            await collect(deployed.relay, spec())
        assert failed.value.details["attempts"] == "3"


async def test_without_a_worker_a_request_waits_its_limit_and_fails_as_unavailable():
    """
    A worker that comes in time serves it; none is an error that says how long was waited.
    """
    async with scripted_coordinator(queue_limit_s=0.2) as deployed:
        with pytest.raises(NoWorker) as failed:
            await collect(deployed.relay, spec())
        assert failed.value.details["queue_limit_s"] == "0.2"


async def test_a_worker_that_joins_late_serves_who_waited():
    """
    Waiting is on the pool's changes, not on a timer.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with p, d, scripted_coordinator(queue_limit_s=20) as deployed:
        asking = asyncio.create_task(collect(deployed.relay, spec()))
        await deployed.join(p, d)

        assert tokens(await asking) == oracle(PROMPT, 6)


async def test_a_caller_that_leaves_cancels_both_workers():
    """
    Closing the stream sends the cancels at once, and the books are closed.
    """
    p = ScriptedWorker("p0", Role.PREFILL, is_held=True)
    d = ScriptedWorker("d0", Role.DECODE, is_held=True)
    async with deployment(p, d) as deployed:
        asking = asyncio.create_task(collect(deployed.relay, spec()))
        await p.heard.wait()
        await d.heard.wait()

        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await until(lambda: p.cancels and d.cancels)
        assert deployed.relay.num_active == 0
        assert deployed.relay.explain(p.submits[0].request_id).outcome == "CANCELLED"


async def test_a_deadline_passes_in_the_phase_it_passes_in():
    """
    The error names the phase, and nothing goes on afterwards.
    """
    p = ScriptedWorker("p0", Role.PREFILL, is_held=True)
    d = ScriptedWorker("d0", Role.DECODE, is_held=True)
    async with deployment(p, d) as deployed:
        with pytest.raises(DeadlinePassed) as failed:
            await collect(deployed.relay, spec(), time_left_s=0.3)
        assert failed.value.details["phase"] == "prefilling"
        await until(lambda: p.cancels and d.cancels)
        assert deployed.relay.num_active == 0


async def test_a_stop_string_ends_the_stream_at_the_token_that_completes_it():
    """
    Its text is not part of the output; the decode worker is told to stop.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    answer = oracle(PROMPT, 20)
    stop = chr(0x100 + answer[3])
    cut = answer.index(answer[3])
    async with deployment(p, d) as deployed:
        events = await collect(deployed.relay, spec(20, stop=(stop,)))

        assert tokens(events) == answer[: cut + 1]
        text = "".join(e.text for e in events if isinstance(e, Delta))
        assert text == "".join(chr(0x100 + t) for t in answer[:cut])
        assert events[-1].reason is FinishReason.STOP
        assert events[-1].usage.completion_tokens == cut + 1


async def test_a_first_token_that_is_the_last_needs_no_decode_worker():
    """
    It ends with the prefill worker's word; the decode worker never said a thing.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE, is_held=True)
    async with deployment(p, d) as deployed:
        events = await collect(deployed.relay, spec(1))

        assert tokens(events) == oracle(PROMPT, 1)
        assert events[-1].reason is FinishReason.LENGTH
        assert events[-1].ledger.decode_worker == ""


async def test_a_caller_who_comes_back_late_is_told_everything_at_once():
    """
    The first token by itself; what came while nobody looked, in one delta without a gap.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with deployment(p, d) as deployed:
        async with contextlib.aclosing(deployed.relay.generate(spec(20))) as events:
            seen = [await anext(events), await anext(events)]
            # Behind ours on the same stream: at its end, all of ours has arrived.
            await collect(deployed.relay, spec(20))
            seen += [event async for event in events]

        sizes = [len(event.token_ids) for event in seen if isinstance(event, Delta)]
        assert sizes == [1, 19]
        assert tokens(seen) == oracle(PROMPT, 20)
        assert positions(seen)[0] == positions(seen)[1]


async def test_a_full_coordinator_refuses_before_any_work():
    """
    The refusal names the bound; no worker hears of the request.
    """
    p = ScriptedWorker("p0", Role.PREFILL, is_held=True)
    d = ScriptedWorker("d0", Role.DECODE, is_held=True)
    async with deployment(p, d, max_requests=1) as deployed:
        asking = asyncio.create_task(collect(deployed.relay, spec()))
        await p.heard.wait()

        with pytest.raises(QueueFull):
            await collect(deployed.relay, spec())
        assert len(p.submits) == 1
        p.allow(99)
        d.allow(99)
        await asking


async def test_a_worker_with_stale_news_is_not_heard():
    """
    Outputs of an attempt that was given up reach nobody.
    """
    p = ScriptedWorker("p0", Role.PREFILL)
    d0, d1 = (ScriptedWorker(f"d{i}", Role.DECODE, is_held=True) for i in range(2))
    async with deployment(p, d0, d1) as deployed:
        asking = asyncio.create_task(collect(deployed.relay, spec()))
        await p.heard.wait()
        await until(lambda: d0.submits or d1.submits)
        first, other = (d0, d1) if d0.submits else (d1, d0)
        member = next(m for m in deployed.pool.members() if m.worker_id == first.worker_id)
        deployed.pool.leave(member, "test")
        first.allow(99)
        other.allow(99)

        assert tokens(await asking) == oracle(PROMPT, 6)


async def test_a_member_that_falls_silent_is_expelled_and_may_come_back():
    """
    No heartbeat for the suspicion time: its requests are placed elsewhere.
    """
    d = ScriptedWorker("d0", Role.DECODE)
    async with d, scripted_coordinator(suspect_after_s=0.2) as deployed:
        running = asyncio.create_task(deployed.pool.run())
        seat = deployed.pool.join(d.identity)  # and never a heartbeat

        await asyncio.wait_for(seat.expelled.wait(), 5)
        assert deployed.pool.members() == []
        await deployed.join(d)
        running.cancel()


async def test_the_canary_crosses_the_pool_and_makes_it_ready():
    """
    Ready only once a handoff has worked; the reason is told until then.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with deployment(p, d) as deployed:
        assert deployed.canary.not_ready_reason == "starting"
        running = asyncio.create_task(deployed.canary.run())
        await until(lambda: deployed.canary.is_ready)

        assert len(p.submits) == len(d.submits) == 1
        running.cancel()


async def test_a_worker_whose_canary_differs_makes_the_pool_unready():
    """
    Wrong numbers are found by comparing what must be equal.
    """
    p, d0 = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    d1 = ScriptedWorker("d1", Role.DECODE)
    d1.token_offset = 1
    async with d1, deployment(p, d0) as deployed:
        running = asyncio.create_task(deployed.canary.run())
        await until(lambda: deployed.canary.is_ready)
        await deployed.join(d1)
        await until(lambda: not deployed.canary.is_ready)

        assert "different tokens" in deployed.canary.not_ready_reason
        running.cancel()


async def test_the_grpc_front_says_what_the_relay_says():
    """
    Same tokens, the ledger in the trailing metadata, typed statuses.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with deployment(p, d) as deployed, open_channel(deployed.address) as channel:
        stub = generate_pb2_grpc.GenerateServiceStub(channel)
        tokens_prompt = generate_pb2.TokenPrompt(token_ids=PROMPT)
        request = generate_pb2.GenerateRequest(tokens=tokens_prompt, max_tokens=6)
        call = stub.Generate(request)
        answers = [answer async for answer in call]

        assert [t for a in answers for t in a.delta.token_ids] == oracle(PROMPT, 6)
        assert answers[-1].finished.ledger.prefill_worker == "p0"
        trailing = dict(await call.trailing_metadata())
        assert trailing["kvrelay-ledger-bin"] == answers[-1].finished.ledger.SerializeToString()

        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Explain(generate_pb2.ExplainRequest(request_id="nobody"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_bad_fields_are_refused_by_name_before_anything_happens():
    """
    One table of bounds serves every way in.
    """
    cases = {
        "temperature": {"temperature": float("nan")},
        "top_p": {"top_p": 0.0},
        "min_p": {"min_p": 1.0},
        "top_k": {"top_k": -1},
        "seed": {"seed": 1 << 64},
        "stop": {"stop": ("",)},
        "stop_token_ids[0]": {"stop_token_ids": (1000,)},
        "model": {"model": "another"},
    }
    async with scripted_coordinator() as deployed:
        for field, change in cases.items():
            with pytest.raises(InvalidRequest) as refused:
                await collect(deployed.relay, spec(**change))
            assert refused.value.field == field
        for field, max_tokens in (("max_tokens", 0), ("max_tokens", 1 << 40), ("max_tokens", 508)):
            with pytest.raises(InvalidRequest) as refused:
                await collect(deployed.relay, spec(max_tokens))
            assert refused.value.field == field
        with pytest.raises(NotFound):
            deployed.relay.explain("nobody")


async def test_never_disaggregating_needs_no_prefill_worker():
    """
    Aggregated serving is a setting of the same processes.
    """
    d = ScriptedWorker("d0", Role.DECODE)
    async with deployment(d, disaggregate=Disaggregate.NEVER) as deployed:
        events = await collect(deployed.relay, spec())

        assert tokens(events) == oracle(PROMPT, 6)
        assert events[-1].ledger.prefill_worker == "d0"
        assert events[-1].ledger.gap1_stages == {}


async def test_the_last_worker_of_its_kind_may_be_lost_and_come_back():
    """
    A broken session ends the membership before anybody is told, so no attempt is wasted on it.
    """
    p = ScriptedWorker("p0", Role.PREFILL)
    d, again = (ScriptedWorker("d0", Role.DECODE, is_held=True) for _ in range(2))
    async with again, deployment(p, d, queue_limit_s=20) as deployed:
        asking = asyncio.create_task(collect(deployed.relay, spec(8)))
        await d.heard.wait()
        d.allow(3)
        await d.vanish()
        await deployed.until_left("d0")
        again.allow(99)
        await deployed.join(again)

        events = await asking
        assert tokens(events) == oracle(PROMPT, 8)
        assert events[-1].ledger.attempts == 2


async def test_a_worker_that_joins_again_in_the_same_epoch_is_served_as_new():
    """
    The old stream ends late, and takes nothing of the new membership with it.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with deployment(p, d) as deployed:
        old = next(m for m in deployed.pool.members() if m.worker_id == "d0")
        d.join_again(deployed.address)
        await until(lambda: old not in deployed.pool.members())

        events = await collect(deployed.relay, spec())
        assert tokens(events) == oracle(PROMPT, 6)
        assert {m.worker_id for m in deployed.pool.members()} == {"p0", "d0"}


async def test_workers_without_room_are_asked_again_when_the_pool_has_news():
    """
    A refusal for want of room is not a lost worker: it costs a wait, not an attempt each.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    d.fail_with = [QueueFull(what="sequences", queued=9, limit=9) for _ in range(2)]
    async with deployment(p, d) as deployed:
        events = await collect(deployed.relay, spec())

        assert tokens(events) == oracle(PROMPT, 6)
        assert events[-1].ledger.lost_attempts == ("QUEUE_FULL", "QUEUE_FULL")


async def test_the_books_of_a_request_are_closed_once():
    """
    However few ledgers are remembered, and however slow the caller is at the end.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with deployment(p, d, max_remembered=1) as deployed:
        async with contextlib.aclosing(deployed.relay.generate(spec())) as slow:
            async for event in slow:
                if isinstance(event, Finished):
                    await collect(deployed.relay, spec())

        assert deployed.relay.num_finished == 2


async def test_readiness_ends_with_the_canary():
    """
    A coordinator that drains says so, and is not found ready again.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    async with deployment(p, d) as deployed:
        running = asyncio.create_task(deployed.canary.run())
        await until(lambda: deployed.canary.is_ready)
        running.cancel()
        await asyncio.wait({running})

        assert deployed.canary.not_ready_reason == "stopping"


async def test_a_worker_asked_for_what_can_never_be_is_our_fault():
    """
    The caller hears of a bug, not that its own request was wrong or forbidden.
    """
    p = ScriptedWorker("p0", Role.PREFILL)
    d = ScriptedWorker("d0", Role.DECODE, is_held=True)
    p.fail_with = [PermissionDenied("not for you")]
    async with deployment(p, d) as deployed, Asker(deployed.address) as asker:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await asker.one(Ask(PROMPT, 4))

        assert failed.value.code() is grpc.StatusCode.INTERNAL
        assert "not for you" not in failed.value.details()
        assert deployed.relay.num_active == 0


async def test_a_broken_way_between_workers_is_answered_by_a_local_prefill():
    """
    In `auto`, a handoff that failed is not tried again: the decode worker prefills.
    """
    p, d = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    d.fail_with = [PeerUnavailable("p0 cannot be reached from d0")]
    async with deployment(p, d, disaggregate=Disaggregate.AUTO) as deployed:
        events = await collect(deployed.relay, spec())

        assert tokens(events) == oracle(PROMPT, 6)
        assert events[-1].ledger.prefill_worker == "d0"


async def test_who_drains_is_neither_crossed_nor_counted():
    """
    A rolling restart stays ready while somebody takes work, and says so when nobody does.
    """
    p, d0 = ScriptedWorker("p0", Role.PREFILL), ScriptedWorker("d0", Role.DECODE)
    d1 = ScriptedWorker("d1", Role.DECODE)
    async with deployment(p, d0, d1) as deployed:
        running = asyncio.create_task(deployed.canary.run())
        await until(lambda: deployed.canary.is_ready)
        num_crossings = len(d0.submits)
        d0.load = WorkerLoad(is_draining=True)
        await until(lambda: not deployed.pool.members()[1].takes_work)

        assert deployed.canary.is_ready
        assert len(d0.submits) == num_crossings
        d1.load = WorkerLoad(is_draining=True)
        await until(lambda: not deployed.canary.is_ready)
        assert deployed.canary.not_ready_reason == "0 of 1 decode workers joined"
        running.cancel()


async def test_a_coordinator_that_stood_still_expels_nobody():
    """
    Heartbeats that waited unread are no silence.
    """
    d = ScriptedWorker("d0", Role.DECODE)
    async with deployment(d, suspect_after_s=0.5, disaggregate=Disaggregate.NEVER) as deployed:
        running = asyncio.create_task(deployed.pool.run())
        member = deployed.pool.members()[0]
        await asyncio.sleep(0.01)
        time.sleep(1.2)  # noqa: ASYNC251 - the loop itself is what stands still
        await asyncio.sleep(0.3)

        assert deployed.pool.members() == [member]
        running.cancel()
