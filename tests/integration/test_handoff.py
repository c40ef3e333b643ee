"""A prefill and a decode worker, handing KV over by each transport, and every way to fail."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest

from decode_svc.holder import HolderClient
from decode_svc.landing import LandingLimits
from kvrelay.errors import QuiescenceLost
from kvrelay.transfer.base import KvTransport
from kvrelay.transfer.faulty import Fault, FaultScript, FaultyTransport
from tests.support import tiny_model
from tests.support.builders import prompt
from tests.support.clock import ManualClock
from tests.support.scripted_model import StepGate, expected_tokens
from tests.support.workers import (
    BLOCK_SIZE,
    CHUNK_TOKENS,
    HOLD_LIMITS,
    LAYOUT,
    LIMITS,
    DecodeBench,
    PrefillBench,
    Session,
    decode_session,
    decode_submit,
    decode_worker,
    handoff_stub,
    new_id,
    prefill_session,
    prefill_submit,
    prefill_worker,
    pull_of,
    pull_request,
    tokens_of,
    until,
)

TRANSPORTS = ("shm", "stream")
EDGES = sorted(
    {1, 2}
    | {BLOCK_SIZE + d for d in (-1, 0, 1)}
    | {CHUNK_TOKENS + d for d in (-1, 0, 1)}
    | {4 * CHUNK_TOKENS + d for d in (-1, 0, 1)}
)


@dataclass(kw_only=True)
class Pair:
    """A holder, a puller, and a coordinator's sessions with both."""

    holder: PrefillBench
    puller: DecodeBench
    prefills: Session
    decodes: Session

    async def submit_both(
        self,
        prompt_ids,
        transport: str,
        *,
        max_tokens: int = 8,
        emitted=(),
        pull: dict | None = None,
    ) -> tuple[str, str]:
        """Tell both at the same time, the puller first; returns request_id and handoff_id."""
        request_id, handoff_id = new_id(), new_id()
        names = {"request_id": request_id, "max_tokens": max_tokens}
        source = pull_of(self.holder, handoff_id, transport)
        await self.decodes.submit(
            **decode_submit(prompt_ids, pull=source, emitted_token_ids=emitted, **names)
        )
        await self.prefills.submit(**prefill_submit(prompt_ids, handoff_id=handoff_id, **names))
        return request_id, handoff_id

    async def is_idle(self) -> None:
        await until(lambda: self.holder.engine.is_idle and self.puller.engine.is_idle)


@contextlib.asynccontextmanager
async def pair(*, holder: dict | None = None, puller: dict | None = None) -> AsyncIterator[Pair]:
    async with (
        prefill_worker(**(holder or {})) as p,
        decode_worker(**(puller or {})) as d,
        prefill_session(p) as prefills,
        decode_session(d) as decodes,
    ):
        yield Pair(holder=p, puller=d, prefills=prefills, decodes=decodes)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("num_tokens", EDGES)
async def test_tokens_across_a_handoff_are_the_models_own(transport, num_tokens):
    """For lengths around block and chunk edges, position 0 is the holder's first token, the
    others follow it, and no block is left on either side."""
    async with pair() as both:
        request_id, _ = await both.submit_both(prompt(num_tokens), transport)
        first = await both.prefills.one_prefilled()
        outputs = await both.decodes.outputs(request_id)
        await both.is_idle()

        expected = expected_tokens(prompt(num_tokens), 8)
        assert first.token_id == expected[0]
        assert outputs[0].position == 0
        assert tokens_of(outputs) == expected
        timing = outputs[0].handoff
        assert timing.transport == transport
        assert timing.num_bytes == LAYOUT.num_blocks_for(num_tokens) * LAYOUT.block_num_bytes
        assert min(timing.transfer_s, timing.verify_s, timing.release_s, timing.join_s) >= 0
        assert timing.first_step_s > 0
        assert not any(output.HasField("handoff") for output in outputs[1:])
        assert both.puller.service.load().handoffs_total == 1
        assert both.holder.service.load().handoffs_total == 1


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_many_handoffs_at_once_keep_their_tokens_apart(transport):
    """Twelve prompts through one pair, all blocks shared fairly, each with its own tokens."""
    async with pair() as both:
        prompts = {}
        for i in range(12):
            ids = prompt(5 + 3 * i, variant=i)
            request_id, _ = await both.submit_both(ids, transport, max_tokens=20)
            prompts[request_id] = ids
        got = await both.decodes.collect(*prompts)
        await both.is_idle()

    assert all(tokens_of(got[r]) == expected_tokens(ids, 20) for r, ids in prompts.items())


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_prefix_that_both_know_is_not_moved(transport):
    """The second request with the same prompt moves only what the puller's index lacks."""
    async with pair() as both:
        for _ in range(2):
            request_id, _ = await both.submit_both(prompt(4 * BLOCK_SIZE + 2), transport)
            outputs = await both.decodes.outputs(request_id)

    assert tokens_of(outputs) == expected_tokens(prompt(4 * BLOCK_SIZE + 2), 8)
    assert outputs[0].handoff.num_bytes == LAYOUT.block_num_bytes
    assert outputs[0].handoff.cached_prompt_tokens == 4 * BLOCK_SIZE


async def test_bytes_move_while_the_holder_computes_on():
    """With the holder stopped before its last chunk, the chunks before it land already."""
    gate = StepGate()
    async with pair(holder={"gate": gate}) as both:
        request_id, _ = await both.submit_both(prompt(3 * CHUNK_TOKENS), "shm")
        gate.let_one_pass()
        gate.let_one_pass()
        early = 2 * CHUNK_TOKENS // BLOCK_SIZE * LAYOUT.block_num_bytes
        await until(lambda: both.puller.num_pulled_bytes == early)
        gate.open()
        outputs = await both.decodes.outputs(request_id)

    assert outputs[0].handoff.overlapped_num_bytes >= early


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_most_bytes_of_a_long_prompt_have_landed_when_its_prefill_ends(transport):
    """Of four chunks at least 70 % of the bytes, and the ledger says so."""
    gate = StepGate()
    async with pair(holder={"gate": gate}) as both:
        request_id, _ = await both.submit_both(prompt(4 * CHUNK_TOKENS), transport)
        for _ in range(3):
            gate.let_one_pass()
        early = 3 * CHUNK_TOKENS // BLOCK_SIZE * LAYOUT.block_num_bytes
        await until(lambda: both.puller.num_pulled_bytes == early)
        gate.open()
        outputs = await both.decodes.outputs(request_id)

    timing = outputs[0].handoff
    assert timing.num_bytes == 4 * CHUNK_TOKENS // BLOCK_SIZE * LAYOUT.block_num_bytes
    assert 0.7 <= timing.overlapped_num_bytes / timing.num_bytes <= 1.0


async def test_the_puller_reserves_nothing_before_there_are_bytes():
    """While the holder has not finished a block, the puller's pool is untouched."""
    gate = StepGate()
    async with pair(holder={"gate": gate}) as both:
        request_id, _ = await both.submit_both(prompt(20), "shm")
        await asyncio.to_thread(gate.wait_entered)
        await until(lambda: both.puller.service.load().handoff_holds == 1)
        held = both.puller.num_held_blocks
        gate.open()
        await both.decodes.outputs(request_id)

    assert held == 0


async def test_emitted_tokens_are_replayed_after_the_handoff():
    """A request that lost its decode worker goes on at its next position."""
    expected = expected_tokens(prompt(9), 8)
    async with pair() as both:
        request_id, _ = await both.submit_both(prompt(9), "shm", emitted=expected[:3])
        outputs = await both.decodes.outputs(request_id)

    assert outputs[0].position == 3
    assert tokens_of(outputs) == expected[3:]
    assert outputs[0].HasField("handoff")


def corrupting(transport: KvTransport) -> KvTransport:
    return FaultyTransport(transport, plan=FaultScript({0: frozenset({Fault.CORRUPT})}), seed=1)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_corrupted_block_never_joins(transport):
    """The attempt fails as KV_CORRUPT, without a token, and its blocks are given back."""
    async with pair(puller={"wrap": corrupting}) as both:
        request_id, _ = await both.submit_both(prompt(9), transport)
        failure = await both.decodes.one_failure()
        await until(lambda: both.puller.engine.is_idle)
        await both.prefills.cancel(request_id)
        await both.is_idle()

        assert failure.reason == "KV_CORRUPT"
        assert both.puller.runner.num_steps == 0


async def test_the_right_bytes_of_another_prompt_never_join():
    """The digest binds the bytes to the prompt that the puller has."""
    async with pair() as both:
        request_id, handoff_id = new_id(), new_id()
        source = pull_of(both.holder, handoff_id, "shm")
        await both.decodes.submit(
            **decode_submit(prompt(9, variant=1), request_id=request_id, pull=source)
        )
        await both.prefills.submit(
            **prefill_submit(prompt(9), request_id=request_id, handoff_id=handoff_id)
        )
        failure = await both.decodes.one_failure()
        await both.prefills.cancel(request_id)
        await both.is_idle()

    assert failure.reason == "KV_CORRUPT"


class Gated:
    """A transport whose pulls wait until the test lets them go."""

    def __init__(self, inner: KvTransport) -> None:
        self.inner = inner
        self.name = inner.name
        self.lands_on = inner.lands_on
        self.entered = asyncio.Event()
        self.go = asyncio.Event()

    def register(self, cache) -> None:
        self.inner.register(cache)

    def describe(self):
        return self.inner.describe()

    def can_pull(self, offer) -> bool:
        return self.inner.can_pull(offer)

    def prepare(self, remote) -> bool:
        return self.inner.prepare(remote)

    def still(self, remote, blocks):
        return self.inner.still(remote, blocks)

    async def pull(self, remote, copies):
        self.entered.set()
        await self.go.wait()
        return await self.inner.pull(remote, copies)

    async def close(self) -> None:
        await self.inner.close()


def gate_of(both: Pair, transport: str) -> Gated:
    return next(t for t in both.puller.transports.all if t.name == transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_hold_that_lapsed_in_mid_pull_never_joins(transport):
    """The holder's coordinator cancels between announcement and read: HANDOFF_LOST."""
    async with pair(puller={"wrap": Gated}) as both:
        request_id, _ = await both.submit_both(prompt(9), transport)
        await both.prefills.one_prefilled()
        gated = gate_of(both, transport)
        await gated.entered.wait()
        await both.prefills.cancel(request_id)
        await until(lambda: both.holder.engine.is_idle)
        gated.go.set()
        failure = await both.decodes.one_failure()
        await both.is_idle()

        assert failure.reason == "HANDOFF_LOST"
        assert failure.retryable
        assert both.puller.runner.num_steps == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_cancel_in_mid_pull_frees_both_sides(transport):
    """Once nothing writes any more the puller's blocks are free, and the holder's as well."""
    async with pair(puller={"wrap": Gated}) as both:
        request_id, _ = await both.submit_both(prompt(9), transport)
        await both.prefills.one_prefilled()
        await gate_of(both, transport).entered.wait()
        held = both.puller.num_held_blocks
        await both.decodes.cancel(request_id)
        await both.prefills.cancel(request_id)
        await both.is_idle()

        assert held == 3
        assert both.puller.num_held_blocks == both.holder.num_held_blocks == 0


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_broken_sessions_in_mid_pull_free_both_sides(transport):
    """A coordinator that dies takes its handoffs with it."""
    async with pair(puller={"wrap": Gated}) as both:
        await both.submit_both(prompt(9), transport)
        await both.prefills.one_prefilled()
        await gate_of(both, transport).entered.wait()
        both.decodes.call.cancel()
        both.prefills.call.cancel()
        await both.is_idle()

        assert both.puller.num_held_blocks == both.holder.num_held_blocks == 0


async def test_a_puller_that_dies_leaves_the_hold_to_its_timer():
    """With the pull's stream broken and nobody else coming, `hold_s` ends the hold."""
    async with pair(
        holder={"hold_limits": replace(HOLD_LIMITS, hold_s=0.05)}, puller={"wrap": Gated}
    ) as both:
        await both.submit_both(prompt(9), "shm")
        await both.prefills.one_prefilled()
        await gate_of(both, "shm").entered.wait()
        both.decodes.call.cancel()
        await until(lambda: both.holder.engine.is_idle)

        assert both.holder.num_expired_holds == 1


class Buggy:
    """Hears one announcement of a holder, then fails in a way that nobody foresaw."""

    def __init__(self, inner: HolderClient) -> None:
        self._inner = inner

    def wire_dtype(self, **terms):
        return self._inner.wire_dtype(**terms)

    async def announcements(self, source, **terms):
        async with contextlib.aclosing(self._inner.announcements(source, **terms)) as announcements:
            async for announcement in announcements:
                yield announcement
                raise RuntimeError("not foreseen")

    async def release(self, source, generations) -> None:
        await self._inner.release(source, generations)


async def test_a_bug_in_listening_ends_the_worker_and_holds_no_block():
    """Whatever ends the listener ends the landing: nothing waits for it for ever."""
    async with pair(puller={"wrap_holders": Buggy}) as both:
        request_id, _ = await both.submit_both(prompt(9), "shm")
        await until(lambda: both.puller.failures)
        await both.prefills.cancel(request_id)
        await both.is_idle()

        assert [type(error) for error in both.puller.failures] == [RuntimeError]
        assert both.puller.num_held_blocks == 0
        both.puller.failures.clear()


class Unquiet:
    """A transport whose pulls may go on writing after they have ended."""

    def __init__(self, inner: KvTransport) -> None:
        self._inner = inner

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    async def pull(self, remote, copies):
        raise QuiescenceLost("something may still write")


@pytest.mark.parametrize("is_cancelled", [False, True])
@pytest.mark.parametrize("layout", [LAYOUT, replace(LAYOUT, block_size=2 * BLOCK_SIZE)])
async def test_a_copy_that_may_go_on_ends_the_worker_with_all_it_holds(layout, is_cancelled):
    """Whether or not the request is called off meanwhile: no block is given back, and no part of
    the landing area."""
    async with pair(puller={"wrap": Unquiet, "layout": layout}) as both:
        request_id, _ = await both.submit_both(prompt(9), "shm")
        if is_cancelled:
            await both.decodes.cancel(request_id)
        await until(lambda: both.puller.failures or (is_cancelled and both.puller.engine.is_idle))
        await both.prefills.cancel(request_id)
        await until(lambda: both.holder.engine.is_idle)
        for _ in range(5):
            await asyncio.sleep(0)

        ended_at_once = bool(both.puller.failures)
        assert ended_at_once or is_cancelled  # called off before the pull began: nothing to fear
        assert (both.puller.num_held_blocks > 0) == ended_at_once
        assert (both.puller.area.num_taken_bytes > 0) == (ended_at_once and layout != LAYOUT)
        assert {type(error) for error in both.puller.failures} <= {QuiescenceLost}
        both.puller.failures.clear()
        for seq_id in tuple(both.puller.engine._scheduler._sequences):
            both.puller.engine.release(seq_id)


async def test_a_full_puller_waits_while_the_holder_holds():
    """The grant comes only when the other sequence has left; the hold's timer does not run."""
    gate, clock = StepGate(), ManualClock()
    async with pair(holder={"clock": clock}, puller={"num_blocks": 8, "gate": gate}) as both:
        busy = decode_submit(prompt(24, variant=1), max_tokens=8)
        await both.decodes.submit(**busy)
        await asyncio.to_thread(gate.wait_entered)
        request_id, _ = await both.submit_both(prompt(20), "shm")
        await both.prefills.one_prefilled()
        await until(lambda: both.puller.engine.load().waiting == 1)
        clock.advance(5 * HOLD_LIMITS.hold_s)
        both.holder.keeper.lapse_overdue()
        still_held = both.holder.num_held_blocks
        gate.open()
        got = await both.decodes.collect(busy["request_id"], request_id)

    assert still_held == 5
    assert tokens_of(got[request_id]) == expected_tokens(prompt(20), 8)


async def test_a_second_puller_is_refused():
    """Only the worker that the coordinator named may pull."""
    async with pair() as both, handoff_stub(both.holder) as stub:
        fields = prefill_submit(prompt(9), puller_id="decode-2")
        await both.prefills.submit(**fields)
        await both.prefills.one_prefilled()
        source = pull_of(both.holder, fields["handoff_id"], "shm")
        await both.decodes.submit(**decode_submit(prompt(9), pull=source))
        failure = await both.decodes.one_failure()
        right = stub.Pull(pull_request(both.holder, fields["handoff_id"], puller_id="decode-2"))
        opened = await right.read()

    assert failure.reason == "PERMISSION_DENIED"
    assert opened.HasField("opened")


async def test_another_epoch_of_the_holder_is_a_lost_handoff():
    """A holder that was restarted at the same address does not have it."""
    async with pair() as both:
        source = pull_of(both.holder, new_id(), "shm", epoch="0" * 16)
        await both.decodes.submit(**decode_submit(prompt(9), pull=source))
        failure = await both.decodes.one_failure()

    assert failure.reason == "HANDOFF_LOST"


async def test_a_holder_that_cannot_be_reached_is_reported_as_such():
    """The puller holds no blocks for it."""
    async with pair() as both:
        source = pull_of(both.holder, new_id(), "stream", address="127.0.0.1:1")
        await both.decodes.submit(**decode_submit(prompt(9), pull=source))
        failure = await both.decodes.one_failure()

        assert failure.reason == "PEER_UNAVAILABLE"
        assert both.puller.num_held_blocks == 0


async def test_a_handoff_too_large_for_the_puller_is_refused_at_once():
    """It does not wait for bytes that it could never take."""
    async with pair(puller={"num_blocks": 4}) as both:
        source = pull_of(both.holder, new_id(), "shm")
        await both.decodes.submit(**decode_submit(prompt(16), pull=source))

        assert (await both.decodes.one_failure()).reason == "KV_POOL_EXHAUSTED"


async def test_handoffs_under_way_are_bounded():
    """One more than `max_landings` is refused with QUEUE_FULL."""
    async with pair(puller={"max_landings": 1}) as both:
        for _ in range(2):
            source = pull_of(both.holder, new_id(), "shm")
            await both.decodes.submit(**decode_submit(prompt(9), pull=source))

        assert (await both.decodes.one_failure()).reason == "QUEUE_FULL"


async def test_a_first_token_that_ends_the_request_leaves_the_puller_waiting_to_be_cancelled():
    """The holder tells the finish and holds nothing; the puller reports no loss meanwhile."""
    async with pair() as both:
        request_id, _ = await both.submit_both(prompt(9), "shm", max_tokens=1)
        first = await both.prefills.one_prefilled()
        await both.decodes.cancel(request_id)
        fields = decode_submit(prompt(5))
        await both.decodes.submit(**fields)
        outputs = await both.decodes.outputs(fields["request_id"])
        await both.is_idle()

    assert first.finish_reason != 0
    assert tokens_of(outputs) == expected_tokens(prompt(5), 8)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_small_batches_land_whole(transport):
    """Fetching one block at a time gives the same tokens."""
    limits = LandingLimits(batch_num_bytes=1)
    async with pair(puller={"landing_limits": limits}) as both:
        request_id, _ = await both.submit_both(prompt(33), transport)
        outputs = await both.decodes.outputs(request_id)

    assert tokens_of(outputs) == expected_tokens(prompt(33), 8)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_landed_sequence_may_be_preempted_and_goes_on(transport):
    """With too few blocks for all, sequences are preempted, and no token changes."""
    async with pair(puller={"num_blocks": 14}) as both:
        prompts = {}
        for i in range(4):
            ids = prompt(9 + i, variant=i)
            request_id, _ = await both.submit_both(ids, transport, max_tokens=24)
            prompts[request_id] = ids
        got = await both.decodes.collect(*prompts)
        await both.is_idle()

        assert all(tokens_of(got[r]) == expected_tokens(ids, 24) for r, ids in prompts.items())
        assert both.puller.engine.load().preemptions_total > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_real_model_generates_the_same_with_and_without_a_handoff(transport, dtype):
    """A small random Llama: the tokens through both workers equal those of one alone, at
    lengths around block and chunk edges."""
    spec = tiny_model.tiny_spec()
    weights = tiny_model.tiny_weights(spec, dtype)
    lengths = (1, 15, 16, 17, 31, 32, 33, 64, 65, 130)
    limits = replace(LIMITS, budget_tokens=128, max_chunk_tokens=32)
    with (
        tiny_model.runner_of(spec, weights) as holders,
        tiny_model.runner_of(spec, weights) as pullers,
    ):
        async with pair(
            holder={"model": holders, "limits": limits}, puller={"model": pullers, "limits": limits}
        ) as both:
            alone: dict[str, int] = {}
            handed: dict[str, int] = {}
            for num_tokens in lengths:
                ids = [token_id % spec.vocab_size for token_id in prompt(num_tokens)]
                request_id, _ = await both.submit_both(ids, transport, max_tokens=12)
                handed[request_id] = num_tokens
                # Another salt, so that it computes its own prompt.
                fields = decode_submit(ids, max_tokens=12, cache_salt=b"alone")
                await both.decodes.submit(**fields)
                alone[fields["request_id"]] = num_tokens
            got = await both.decodes.collect(*alone, *handed)
            await both.is_idle()

    by_length = {num_tokens: tokens_of(got[name]) for name, num_tokens in alone.items()}
    assert {num_tokens: tokens_of(got[name]) for name, num_tokens in handed.items()} == by_length
    assert all(len(tokens) == 12 for tokens in by_length.values())


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_cancels_at_any_moment_leave_nothing_behind(transport, seed):
    """Forty handoffs through small pools, half of them cancelled at random moments on one side
    or both: the others keep their tokens, and every block comes back."""
    print(f"seed={seed}")
    rng = random.Random(seed)
    async with pair(holder={"num_blocks": 40}, puller={"num_blocks": 40}) as both:
        kept: dict[str, tuple[int, ...]] = {}
        got: dict[str, list[int]] = {}
        cancelled: set[str] = set()
        failed: set[str] = set()

        async def hear() -> None:
            while True:
                message = await both.decodes.call.read()
                failed.update(each.request_id for each in message.failed)
                for output in message.outputs:
                    tokens = got.setdefault(output.request_id, [])
                    assert output.position == len(tokens)
                    tokens += output.token_ids

        hearing = asyncio.create_task(hear())
        for i in range(40):
            ids = prompt(rng.randrange(1, 40), variant=rng.randrange(4))
            request_id, _ = await both.submit_both(ids, transport, max_tokens=6)
            for _ in range(rng.randrange(300)):
                await asyncio.sleep(0)
            if i % 2 == 0:
                kept[request_id] = ids
                continue
            cancelled.add(request_id)
            sessions = [both.prefills, both.decodes]
            rng.shuffle(sessions)
            for session in sessions:
                await session.cancel(request_id)
                for _ in range(rng.randrange(30)):
                    await asyncio.sleep(0)
        await until(lambda: all(len(got.get(name, ())) == 6 for name in kept) or hearing.done())
        await both.is_idle()
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)

        assert failed <= cancelled
        assert all(tuple(got[name]) == expected_tokens(ids, 6) for name, ids in kept.items())
        assert both.puller.num_held_blocks == both.holder.num_held_blocks == 0
