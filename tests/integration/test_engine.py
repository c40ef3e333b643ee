"""The engine's thread on the scripted model: real locks and conditions, no tensors."""

import threading

import pytest

from kvrelay.engine.batch import Path, Rows
from kvrelay.engine.request import Goal, Origin
from kvrelay.errors import Draining, InvalidRequest, KvPoolExhausted, NotFound
from kvrelay.kv.block_pool import BlockCounts
from kvrelay.types import BlockId, FinishReason, SamplingParams
from tests.support.builders import prompt, request, running_engine, scheduler
from tests.support.clock import ManualClock
from tests.support.scripted_model import ScriptedModel, StepGate, expected_tokens


def _requests(num_requests: int, *, max_tokens: int = 12):
    """Prompts of many lengths; every third shares a prefix with the one before."""
    for i in range(num_requests):
        yield request(f"s{i}", prompt(3 + 5 * i % 37, variant=i // 3), max_tokens=max_tokens)


def _engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


@pytest.mark.parametrize("num_requests", [1, 16])
def test_tokens_do_not_depend_on_how_many_run(num_requests: int):
    """
    One request alone and sixteen at once give the oracle's tokens.
    """
    requests = list(_requests(num_requests))
    with running_engine(scheduler(num_blocks=400, max_sequences=16)) as run:
        run.submit_all(requests)
        run.sink.wait_finished(*(each.seq_id for each in requests))

        assert run.engine.load().preemptions_total == 0
        assert run.engine.is_idle
    for each in requests:
        assert run.sink.tokens[each.seq_id] == expected_tokens(each.prompt_ids, 12)
        assert run.sink.finishes[each.seq_id] is FinishReason.LENGTH


def test_tokens_do_not_depend_on_chunks_or_preemption():
    """
    With a tiny budget and a pool that holds few of them, the tokens are the same.
    """
    requests = list(_requests(16, max_tokens=20))
    tight = scheduler(num_blocks=16, budget_tokens=8, max_chunk_tokens=5, max_sequences=8)
    with running_engine(tight) as run:
        run.submit_all(requests)
        run.sink.wait_finished(*(each.seq_id for each in requests))

        load = run.engine.load()
        assert load.preemptions_total > 0
        assert load.blocks.held == 0
        assert run.model.most_rows <= 8
    for each in requests:
        assert run.sink.tokens[each.seq_id] == expected_tokens(each.prompt_ids, 20)


def test_a_handoff_between_two_engines_continues_the_tokens():
    """
    One engine holds a finished prompt, another lands its blocks and goes on from its token.
    """
    prompt_ids = prompt(10)
    with running_engine() as prefill, running_engine() as decode:
        prefill.engine.submit(request("p", prompt_ids, goal=Goal.HOLD, max_tokens=6))
        prefill.sink.wait_tokens("p", 1)
        decode.engine.submit(request("d", prompt_ids, origin=Origin.LAND, max_tokens=6))
        decode.sink.wait_granted("d")
        held = prefill.sink.chunks["p"][-1]
        assert held.num_computed == 10
        for source, target in zip(
            held.block_table, decode.sink.grants["d"].block_table, strict=True
        ):
            decode.model.copy_block(prefill.model, source, target)

        decode.engine.join("d", prefill.sink.tokens["p"], 10)
        decode.sink.wait_finished("d")
        assert prefill.engine.load().blocks.held == 3
        prefill.engine.release("p")

        assert prefill.engine.is_idle
        assert decode.engine.is_idle
        assert prefill.engine.load().blocks.held == 0
    tokens = prefill.sink.tokens["p"] + decode.sink.tokens["d"]
    assert tokens == expected_tokens(prompt_ids, 6)


def test_a_grant_does_not_wait_for_the_running_step():
    """
    It is made by `submit` itself while the device is busy.
    """
    gate = StepGate()
    with running_engine(gate=gate) as run:
        run.engine.submit(request("busy", prompt(6)))
        gate.wait_entered()

        run.engine.submit(request("land", prompt(9, variant=1), origin=Origin.LAND))

        assert len(run.sink.grants["land"].block_table) == 3
        assert run.sink.tokens == {}
        run.engine.release("land")
        run.engine.release("busy")


def test_a_release_grants_to_the_next_in_line():
    """
    The blocks of one landing sequence go to the next at once, without a step.
    """
    with running_engine(scheduler(num_blocks=4)) as run:
        run.engine.submit(request("a", prompt(12, variant=1), origin=Origin.LAND))
        run.engine.submit(request("b", prompt(12, variant=2), origin=Origin.LAND))
        run.sink.wait_granted("a")
        assert run.engine.load().waiting == 1

        run.engine.release("a")

        run.sink.wait_granted("b")
        assert run.model.num_steps == 0
        run.engine.release("b")
        assert run.engine.is_idle


def test_a_release_wakes_an_idle_engine():
    """
    What waits for the blocks of a hold is computed as soon as they are given back.
    """
    with running_engine(scheduler(num_blocks=4)) as run:
        run.engine.submit(request("hold", prompt(14), goal=Goal.HOLD))
        run.engine.submit(request("a", prompt(6, variant=1), max_tokens=2))
        run.sink.wait_tokens("hold", 1)
        assert run.engine.load().waiting == 1

        run.engine.release("hold")

        run.sink.wait_finished("a")


def test_a_join_wakes_an_idle_engine():
    """
    A landed sequence runs without any other event, and its queueing starts at the join.
    """
    clock = ManualClock()
    with running_engine(clock=clock) as run:
        run.engine.submit(request("a", prompt(6), origin=Origin.LAND, max_tokens=3))
        run.engine.submit(request("b", prompt(5, variant=1), max_tokens=1))
        run.sink.wait_finished("b")
        run.model.land(run.sink.grants["a"].block_table, prompt(6))
        clock.advance(3.0)

        run.engine.join("a", expected_tokens(prompt(6), 1), 6)
        run.sink.wait_finished("a")

    assert run.sink.timings["a"].queue_s == 0.0


def test_a_release_in_mid_step_frees_when_the_step_ends():
    """
    Until then the device may write to the blocks; then they are free and nothing is emitted.
    """
    gate = StepGate()
    with running_engine(gate=gate) as run:
        run.engine.submit(request("a", prompt(6), max_tokens=9))
        gate.wait_entered()

        run.engine.release("a")
        assert run.engine.load().blocks.held == 2
        run.engine.submit(request("b", prompt(3, variant=1), max_tokens=1))
        gate.open()
        run.sink.wait_finished("b")

        assert run.engine.is_idle
        assert run.engine.load().blocks.held == 0
    assert "a" not in run.sink.tokens


def test_a_cancelled_long_prompt_stops_after_its_chunk():
    """
    The other chunks of it are never computed.
    """
    gate = StepGate()
    with running_engine(scheduler(budget_tokens=8), gate=gate) as run:
        run.engine.submit(request("a", prompt(60)))
        gate.wait_entered()
        run.engine.release("a")
        gate.let_one_pass()
        run.engine.submit(request("b", prompt(2, variant=1), max_tokens=1))
        gate.wait_entered()
        gate.open()
        run.sink.wait_finished("b")

        assert run.model.num_rows == 8 + 2


def test_unknown_releases_are_ignored():
    """
    A release that crosses a finish on its way does no harm.
    """
    with running_engine() as run:
        run.engine.submit(request("a", max_tokens=2))
        run.sink.wait_finished("a")

        run.engine.release("a")
        run.engine.release("never heard of")

        run.engine.check()
        assert run.engine.is_idle


def test_a_join_that_is_finished_already_says_so():
    """
    The sink hears of the end, and the blocks are free.
    """
    with running_engine() as run:
        run.engine.submit(request("a", origin=Origin.LAND, max_tokens=1))
        run.engine.join("a", (5,), 6)
        run.sink.wait_finished("a")

        assert run.sink.tokens["a"] == ()
        assert run.engine.is_idle


def test_refusals_reach_the_caller_and_change_nothing():
    """
    What the scheduler refuses is raised by `submit` and `join`.
    """
    with running_engine(scheduler(num_blocks=2)) as run:
        with pytest.raises(KvPoolExhausted):
            run.engine.submit(request("a", prompt(100)))
        with pytest.raises(InvalidRequest):
            run.engine.submit(request("a", ()))
        with pytest.raises(NotFound):
            run.engine.join("a", (1,), 6)

        assert run.engine.is_idle


def test_a_stopped_engine_takes_nothing_and_leaves_no_thread():
    """
    It stops while idle, and while work waits.
    """
    gate = StepGate()
    with running_engine(gate=gate) as busy, running_engine() as idle:
        busy.engine.submit(request("a", max_tokens=9))
        gate.wait_entered()
        gate.let_one_pass()
        idle.engine.stop(timeout_s=10.0)
        with pytest.raises(Draining):
            idle.engine.submit(request("b"))
        busy.engine.release("a")
    assert _engine_threads() == []


def test_a_step_that_does_not_end_fails_the_stop():
    """
    Whoever stops it then knows that the process must go.
    """
    gate = StepGate()
    with running_engine(gate=gate) as run:
        run.engine.submit(request("a"))
        gate.wait_entered()

        with pytest.raises(TimeoutError, match="still in a step"):
            run.engine.stop(timeout_s=0.01)
        run.engine.release("a")


def test_a_failing_device_ends_the_engine():
    """
    The failure is handed on, the thread ends, and nothing new is taken.
    """
    sched = scheduler()
    gate = StepGate()
    with running_engine(sched, gate=gate) as run:
        run.model.fail_with = ZeroDivisionError("the device is gone")
        gate.open()
        run.engine.submit(request("a"))
        run.sink.wait_failed()

        assert isinstance(run.sink.failure, ZeroDivisionError)
        with pytest.raises(Draining):
            run.engine.submit(request("b"))
        run.engine.release("a")
        sched.commit([0])  # the step never ended; a worker would exit with it
    assert _engine_threads() == []


def test_timings_and_speed_come_from_the_clock():
    """
    Queueing, prefill, the median step and the prefill speed, on a clock moved by hand.
    """
    clock, gate = ManualClock(), StepGate()
    with running_engine(scheduler(budget_tokens=8), gate=gate, clock=clock) as run:
        run.engine.submit(request("first", prompt(8), max_tokens=1))
        gate.wait_entered()
        run.engine.submit(request("second", (*prompt(4), 5, 6, 7), max_tokens=3))
        clock.advance(2.0)
        gate.let_one_pass()
        gate.wait_entered()
        clock.advance(0.5)
        gate.open()
        run.sink.wait_finished("first", "second")

        load = run.engine.load()
        assert load.prefill_tokens_per_s == pytest.approx((8 + 3) / 2.5)
        assert load.step_s == pytest.approx(0.25)
    assert run.model.num_steps == 4
    first, second = run.sink.timings["first"], run.sink.timings["second"]
    assert (first.queue_s, first.prefill_s, first.num_cached_tokens) == (0.0, 2.0, 0)
    assert (second.queue_s, second.prefill_s, second.num_cached_tokens) == (2.0, 0.5, 4)


def test_load_counts_sequences_and_blocks():
    """
    Every sequence is in one state, every block too.
    """
    gate = StepGate()
    with running_engine(scheduler(num_blocks=16, max_sequences=2), gate=gate) as run:
        run.engine.submit(request("runs", prompt(6), max_tokens=4))
        gate.wait_entered()
        run.engine.submit(request("lands", prompt(6, variant=1), origin=Origin.LAND))
        run.engine.submit(request("waits", prompt(6, variant=2)))

        load = run.engine.load()

        assert (load.running, load.waiting) == (1, 1)
        assert load.blocks == BlockCounts(free=12, cached=0, held=4)
        assert load.queued_prompt_tokens == 12
        for seq_id in ("runs", "lands", "waits"):
            run.engine.release(seq_id)


def test_generations_grow_as_blocks_are_given_up():
    """
    Whoever remembers a block's generation can tell that its content is gone.
    """
    with running_engine() as run:
        run.engine.submit(request("a", prompt(6), goal=Goal.HOLD))
        run.sink.wait_tokens("a", 1)
        full, partial = run.sink.chunks["a"][-1].block_table
        before = run.engine.generations((full, partial))

        run.engine.release("a")

        after = run.engine.generations((full, partial))
        assert after == [before[0], before[1] + 1]  # the full one is cached


def test_a_sequence_moves_between_two_engines_and_no_token_is_computed_twice():
    """
    One engine is frozen in a step, another lands its blocks and goes on from its last token.
    """
    gate = StepGate()
    prompt_ids, outputs = prompt(6), expected_tokens(prompt(6), 20)
    with running_engine(gate=gate) as left, running_engine() as right:
        left.engine.submit(request("l", prompt_ids, max_tokens=20))
        for _ in range(3):
            gate.wait_entered()
            gate.let_one_pass()
        gate.wait_entered()  # the fourth
        offered = left.engine.offer("l")
        left.engine.freeze("l")
        assert "l" not in left.sink.frozen
        gate.let_one_pass()
        frozen = left.sink.wait_frozen("l")
        right.engine.submit(
            request(
                "r",
                prompt_ids,
                origin=Origin.LAND,
                output_ids=outputs[:2],
                max_tokens=20,
                landing_tokens=12,
            )
        )
        right.sink.wait_granted("r")
        table = right.sink.grants["r"].block_table
        for source, target in zip(frozen.done.block_table, table, strict=False):
            right.model.copy_block(left.model, source, target)
        left.engine.release("l")
        right.engine.join("r", frozen.output_ids, frozen.done.num_computed)
        right.sink.wait_finished("r")

        assert left.engine.is_idle
        assert left.engine.load().blocks.held == 0
    assert (offered.num_computed, frozen.done.num_computed) == (8, 9)
    assert left.sink.chunks["l"] == [frozen.done]
    assert frozen.output_ids == left.sink.tokens["l"] == outputs[:4]
    assert right.sink.tokens["r"] == outputs[4:]
    assert (left.model.num_rows, right.model.num_rows) == (9, 16)


def test_a_frozen_sequence_that_stays_wakes_an_idle_engine():
    """
    Nothing else is to be computed, so whoever resumes it has to say so.
    """
    gate = StepGate()
    with running_engine(gate=gate) as run:
        run.engine.submit(request("a", prompt(6), max_tokens=9))
        gate.let_one_pass()
        run.sink.wait_tokens("a", 1)
        run.engine.offer("a")
        run.engine.limit("a", 8)
        gate.open()
        frozen = run.sink.wait_frozen("a")
        num_rows = run.model.num_rows

        run.engine.resume("a")
        run.sink.wait_finished("a")

        assert (frozen.done.num_computed, num_rows) == (8, 8)
        assert run.model.num_rows == 6 + 8
    assert run.sink.tokens["a"] == expected_tokens(prompt(6), 9)


def test_a_withdrawn_offer_is_told():
    """
    The sink hears of it once, before the step that took its blocks.
    """
    gate = StepGate()
    tight = scheduler(num_blocks=5)
    with running_engine(tight, gate=gate) as run:
        run.engine.submit(request("a", prompt(4), max_tokens=12))
        gate.wait_entered()
        run.engine.submit(request("b", prompt(4, variant=1), max_tokens=12))
        for _ in range(3):
            gate.let_one_pass()
        run.sink.wait_tokens("b", 2)
        run.engine.offer("b")
        gate.open()
        run.sink.wait_finished("a", "b")

    assert run.sink.withdrawn == ["b"]
    assert run.sink.frozen == {}
    for i, seq_id in enumerate("ab"):
        assert run.sink.tokens[seq_id] == expected_tokens(prompt(4, variant=i), 12)


def test_callers_in_many_threads_lose_nothing():
    """
    Submitting and releasing from several threads at once ends with every block back.
    """
    tight = scheduler(num_blocks=24, budget_tokens=16, max_sequences=6, max_waiting=200)
    with running_engine(tight) as run:

        def call(worker: int) -> None:
            for i in range(12):
                seq_id = f"{worker}-{i}"
                run.engine.submit(request(seq_id, prompt(4 + i, variant=worker), max_tokens=8))
                if i % 3 == 0:
                    run.engine.release(seq_id)

        callers = [threading.Thread(target=call, args=(worker,)) for worker in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(20.0)
        kept = [f"{worker}-{i}" for worker in range(4) for i in range(12) if i % 3]
        run.sink.wait_finished(*kept)

        assert run.engine.is_idle
        assert run.engine.load().blocks.held == 0
    for seq_id in kept:
        worker, i = map(int, seq_id.split("-"))
        assert run.sink.tokens[seq_id] == expected_tokens(prompt(4 + i, variant=worker), 8)


def test_the_scripted_model_finds_stale_blocks():
    """
    The checker checks: reading a block of another prefix fails.
    """
    model = ScriptedModel(block_size=4)
    model.land((BlockId(0), BlockId(1)), prompt(8))
    model.land((BlockId(2), BlockId(3)), prompt(8, variant=1))

    def rows(*block_table: int) -> Rows:
        return Rows(
            path=Path.GENERATION,
            token_ids=(1,),
            start=8,
            block_table=tuple(map(BlockId, block_table)),
            sample=SamplingParams(),
        )

    model.step([rows(0, 1, 4)])
    with pytest.raises(AssertionError, match="another prefix"):
        model.step([rows(0, 3, 4)])
    with pytest.raises(AssertionError, match="never written"):
        model.step([rows(0, 5, 4)])
