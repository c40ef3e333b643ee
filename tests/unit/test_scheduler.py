"""The scheduler, driven step by step on the scripted model. No thread, no clock."""

import pytest

from kvrelay.engine.batch import Path
from kvrelay.engine.request import Goal, Granted, Origin
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import State
from kvrelay.errors import InvalidRequest, KvPoolExhausted, NotFound, QueueFull
from kvrelay.types import FinishReason
from tests.support.builders import BLOCK_SIZE, prompt, request, scheduler, step
from tests.support.scripted_model import ScriptedModel, expected_tokens


def _model() -> ScriptedModel:
    return ScriptedModel(block_size=BLOCK_SIZE)


def _run(sched: Scheduler, model: ScriptedModel, *, max_steps: int = 500) -> dict[str, tuple]:
    """Step until nothing moves; every token emitted, by sequence."""
    tokens: dict[str, tuple] = {}
    for _ in range(max_steps):
        plan, outcome = step(sched, model)
        for emitted in outcome.emitted:
            tokens[emitted.seq_id] = tokens.get(emitted.seq_id, ()) + emitted.token_ids
        sched.check()
        if not plan.rows:
            return tokens
    raise AssertionError(f"still moving after {max_steps} steps")


def _computed(plan) -> list[str]:
    return [seq.seq_id for seq in plan.sequences]


def test_a_prompt_is_computed_and_continued():
    """
    The prompt in one chunk by the prompt path, then a generation row per token.
    """
    sched, model = scheduler(), _model()
    sched.add(request("a", prompt(6), max_tokens=3))

    plan, outcome = step(sched, model)
    assert [(r.path, r.start, len(r.token_ids)) for r in plan.rows] == [(Path.PROMPT, 0, 6)]
    assert [e.token_ids for e in outcome.emitted] == [expected_tokens(prompt(6), 1)]

    plan, _ = step(sched, model)
    assert [(r.path, r.start, len(r.token_ids)) for r in plan.rows] == [(Path.GENERATION, 6, 1)]

    _, outcome = step(sched, model)
    assert outcome.emitted[0].finish is FinishReason.LENGTH
    assert sched.is_empty
    assert sched.pool.counts.held == 0


def test_a_stop_token_ends_a_sequence():
    """
    The stop token itself is emitted, as the last.
    """
    sched, model = scheduler(), _model()
    outputs = expected_tokens(prompt(6), 8)
    sched.add(request("a", prompt(6), max_tokens=8, stop_token_ids=frozenset({outputs[2]})))

    assert _run(sched, model) == {"a": outputs[:3]}
    assert sched.is_empty


def test_long_prompts_are_cut_into_chunks_within_the_budget():
    """
    No step computes more rows than the budget, nor a chunk more than its own limit.
    """
    sched, model = scheduler(budget_tokens=10, max_chunk_tokens=7, max_sequences=4), _model()
    sched.add(request("a", prompt(20, variant=1)))
    sched.add(request("b", prompt(9, variant=2)))

    plan, _ = step(sched, model)

    assert [(len(r.token_ids), r.sample) for r in plan.rows] == [(7, None), (3, None)]
    tokens = _run(sched, model)
    assert model.most_rows <= 10
    assert tokens["a"] == expected_tokens(prompt(20, variant=1), 4)
    assert tokens["b"] == expected_tokens(prompt(9, variant=2), 4)


def test_decoding_sequences_come_before_prompts():
    """
    A long prompt cannot take the row of a sequence that decodes.
    """
    sched, model = scheduler(budget_tokens=8, max_sequences=4), _model()
    sched.add(request("a", prompt(4), max_tokens=9))
    step(sched, model)
    sched.add(request("b", prompt(40, variant=1)))

    plan, _ = step(sched, model)

    assert _computed(plan) == ["a", "b"]
    assert [len(rows.token_ids) for rows in plan.rows] == [1, 7]


def test_nobody_overtakes_the_head_of_the_line():
    """
    A small request waits behind a large one that has no room yet.
    """
    sched, model = scheduler(num_blocks=8), _model()
    sched.add(request("a", prompt(16), max_tokens=4))
    step(sched, model)
    sched.add(request("large", prompt(24, variant=1), max_tokens=1))
    sched.add(request("small", prompt(2, variant=2), max_tokens=1))

    plan, _ = step(sched, model)

    assert _computed(plan) == ["a"]
    assert sched.count(State.WAITING) == 2
    assert set(_run(sched, model)) == {"a", "large", "small"}


def test_a_brief_prompt_passes_long_ones_and_leaves_the_oldest_a_part():
    """
    It is computed in the next step, though one long prompt is under way and another waits.
    """
    sched, model = scheduler(num_blocks=64, budget_tokens=8, max_chunk_tokens=8), _model()
    sched.add(request("long", prompt(40), max_tokens=1))
    sched.add(request("next", prompt(40, variant=1), max_tokens=1))
    step(sched, model)
    sched.add(request("brief", prompt(6, variant=2), max_tokens=1))

    plan, _ = step(sched, model)

    assert _computed(plan) == ["brief", "long"]
    assert [len(rows.token_ids) for rows in plan.rows] == [6, 2]


def test_brief_prompts_without_end_stop_no_long_one():
    """
    One more arrives before every step, and the long ones end in their order all the same.
    """
    sched, model = scheduler(num_blocks=64, budget_tokens=8, max_chunk_tokens=8), _model()
    sched.add(request("long", prompt(24), max_tokens=1))
    sched.add(request("next", prompt(24, variant=1), max_tokens=1))
    ended: list[str] = []
    for i in range(60):
        sched.add(request(f"brief{i}", prompt(8, variant=2), max_tokens=1))
        _, outcome = step(sched, model)
        ended += [emitted.seq_id for emitted in outcome.emitted if emitted.finish]

    assert [seq_id for seq_id in ended if not seq_id.startswith("brief")] == ["long", "next"]
    assert ended[0].startswith("brief")


def test_a_brief_prompt_takes_no_block_that_a_longer_one_waits_for():
    """
    The long one came first and needs nearly all that is left.
    """
    sched, model = scheduler(num_blocks=16, budget_tokens=8, max_chunk_tokens=8), _model()
    sched.add(request("long", prompt(8 * BLOCK_SIZE), max_tokens=1))
    step(sched, model)
    sched.add(request("next", prompt(7 * BLOCK_SIZE, variant=1), max_tokens=1))
    sched.add(request("brief", prompt(2 * BLOCK_SIZE, variant=2), max_tokens=1))

    plan, _ = step(sched, model)

    assert _computed(plan) == ["long"]
    assert set(_run(sched, model)) == {"long", "next", "brief"}


def test_max_sequences_bounds_a_step_and_counts_landing_ones():
    """
    A landing sequence keeps a place, so it can always run once it has landed.
    """
    sched, model = scheduler(max_sequences=2), _model()
    sched.add(request("land", prompt(4, variant=1), origin=Origin.LAND))
    sched.add(request("b", prompt(4, variant=2), max_tokens=2))
    sched.add(request("c", prompt(4, variant=3), max_tokens=2))

    plan, _ = step(sched, model)

    assert [granted.seq_id for granted in plan.granted] == ["land"]
    assert _computed(plan) == ["b"]
    _run(sched, model)
    assert model.most_sequences == 1


def test_admission_leaves_a_block_for_each_that_grows():
    """
    Without it the next token of a running sequence would preempt the newly admitted one.
    """
    sched, model = scheduler(num_blocks=4), _model()
    sched.add(request("a", prompt(4, variant=1), max_tokens=4))
    step(sched, model)
    sched.add(request("b", prompt(8, variant=2), max_tokens=1))

    step(sched, model)

    assert sched.pool.num_available == 2
    assert sched.count(State.WAITING) == 1
    _run(sched, model)
    assert sched.num_preemptions == 0
    assert sched.is_empty


def test_an_idle_engine_admits_what_just_fits():
    """
    Nothing is kept in reserve when nobody could use it.
    """
    sched, model = scheduler(num_blocks=3), _model()
    sched.add(request("a", prompt(12), max_tokens=1))

    assert _run(sched, model) == {"a": expected_tokens(prompt(12), 1)}


def test_youngest_is_preempted_when_blocks_run_out():
    """
    With no free block, the newest sequence gives its KV up and the older ones go on.
    """
    sched, model = scheduler(num_blocks=5), _model()
    for i, seq_id in enumerate("ab"):
        sched.add(request(seq_id, prompt(4, variant=i), max_tokens=12))
    preempted_at = None
    for _ in range(9):
        plan, _ = step(sched, model)
        if sched.num_preemptions and preempted_at is None:
            preempted_at = _computed(plan)

    assert preempted_at == ["a"]
    tokens = _run(sched, model)
    assert sched.is_empty
    assert len(tokens["b"]) < 12  # the others came before


def test_preempted_sequences_give_the_same_tokens():
    """
    Recomputing the prompt and replaying the outputs changes no token.
    """
    sched, model = scheduler(num_blocks=9), _model()
    names = "abcd"
    for i, seq_id in enumerate(names):
        sched.add(request(seq_id, prompt(5 + i, variant=i), max_tokens=16))

    tokens = _run(sched, model)

    assert sched.num_preemptions > 0
    for i, seq_id in enumerate(names):
        assert tokens[seq_id] == expected_tokens(prompt(5 + i, variant=i), 16)


def test_a_preempted_sequence_waits_ahead_of_those_never_admitted():
    """
    It is older, and older sequences go first.
    """
    sched, model = scheduler(num_blocks=5), _model()
    for i, seq_id in enumerate("ab"):
        sched.add(request(seq_id, prompt(4, variant=i), max_tokens=12))
    sched.add(request("c", prompt(16, variant=5), max_tokens=1))

    finished: list[str] = []
    while not sched.is_empty:
        _, outcome = step(sched, model)
        finished += [e.seq_id for e in outcome.emitted if e.finish]

    assert sched.num_preemptions > 0
    assert finished == ["a", "b", "c"]


def test_holds_and_landings_are_never_preempted():
    """
    Who needs a block then sits out, and goes on when one is given back.
    """
    sched, model = scheduler(num_blocks=4), _model()
    sched.add(request("hold", prompt(8, variant=1), goal=Goal.HOLD))
    step(sched, model)
    sched.add(request("land", prompt(4, variant=2), origin=Origin.LAND))
    assert len(sched.grant()) == 1
    sched.add(request("a", prompt(3, variant=3), max_tokens=6))
    emitted = _run(sched, model)

    assert len(emitted["a"]) == 2  # its only block is full
    assert sched.num_preemptions == 0
    assert sched.count(State.RUNNING) == 1

    assert sched.release("hold")
    emitted["a"] += _run(sched, model)["a"]
    assert emitted["a"] == expected_tokens(prompt(3, variant=3), 6)


def test_a_hold_is_not_preempted_while_it_is_computed():
    """
    Its puller may be copying the finished blocks already.
    """
    sched, model = scheduler(num_blocks=6, budget_tokens=2, max_sequences=2), _model()
    sched.add(request("a", prompt(4), max_tokens=12))
    sched.add(request("hold", prompt(12, variant=1), goal=Goal.HOLD))

    tokens = _run(sched, model)

    assert sched.num_preemptions == 0
    assert tokens["hold"] == expected_tokens(prompt(12, variant=1), 1)
    assert len(tokens["a"]) == 9  # its slots are used up
    sched.release("hold")
    tokens["a"] += _run(sched, model)["a"]
    assert tokens["a"] == expected_tokens(prompt(4), 12)


def test_a_replay_goes_as_far_as_its_blocks_reach():
    """
    Rows that have a slot are computed although no block can be had for the others.
    """
    sched, model = scheduler(num_blocks=4), _model()
    outputs = expected_tokens(prompt(6), 8)
    sched.add(request("a", prompt(6), origin=Origin.LAND, output_ids=outputs[:7], max_tokens=8))
    sched.add(request("hold", prompt(8, variant=1), goal=Goal.HOLD))
    (granted,) = sched.grant()
    step(sched, model)
    model.land(granted.block_table, prompt(6))
    sched.join("a", outputs[:1], 6)

    plan, _ = step(sched, model)

    assert [len(rows.token_ids) for rows in plan.rows] == [2]
    assert not step(sched, model)[0].rows
    sched.release("hold")
    assert _run(sched, model) == {"a": outputs[7:]}


def test_a_block_is_shared_only_when_all_of_it_is_computed():
    """
    The block that a chunk ends in is not found by the next prompt.
    """
    sched, model = scheduler(max_chunk_tokens=6), _model()
    sched.add(request("a", prompt(12), max_tokens=1))
    step(sched, model)
    sched.add(request("b", prompt(12), max_tokens=1))

    plan, _ = step(sched, model)

    assert [rows.start for rows in plan.rows] == [6, 4]


def test_a_shared_prefix_is_computed_once():
    """
    The second prompt starts after the blocks it shares with the first.
    """
    sched, model = scheduler(), _model()
    common = prompt(12)
    first, second = (*common, 1, 2), (*common, 3, 4, 5)
    sched.add(request("a", first, max_tokens=2))
    step(sched, model)
    sched.add(request("b", second, max_tokens=2))

    plan, _ = step(sched, model)

    assert [(seq.seq_id, seq.num_cached_tokens) for seq in plan.sequences] == [("a", 0), ("b", 12)]
    assert plan.rows[1].start == 12
    assert plan.rows[0].block_table[:3] == plan.rows[1].block_table[:3]
    assert _run(sched, model)["b"][-1:] == expected_tokens(second, 2)[1:]


def test_a_chunked_prefix_serves_those_who_wait_behind_it():
    """
    A prompt that waits for budget is admitted late enough to find what was computed before.
    """
    sched, model = scheduler(budget_tokens=8, max_sequences=4), _model()
    common = prompt(16)
    sched.add(request("a", (*common, 1), max_tokens=1))
    sched.add(request("b", (*common, 2), max_tokens=1))

    _run(sched, model)

    assert model.num_rows == 17 + 1


def test_at_least_the_last_prompt_token_is_computed():
    """
    A prompt that is cached whole still needs the logits of its last row.
    """
    sched, model = scheduler(), _model()
    sched.add(request("a", prompt(8), max_tokens=1))
    _run(sched, model)
    sched.add(request("b", prompt(8), max_tokens=1))

    plan, outcome = step(sched, model)

    assert [(rows.start, len(rows.token_ids)) for rows in plan.rows] == [(4, 4)]
    assert outcome.emitted[0].token_ids == expected_tokens(prompt(8), 1)


def test_other_salts_share_nothing():
    """
    A tenant's prompt is not served from another's blocks.
    """
    sched, model = scheduler(), _model()
    for seq_id, salt in (("a", b"one"), ("b", b"two")):
        sched.add(request(seq_id, prompt(9), max_tokens=1, salt=salt))
        _run(sched, model)

    assert model.num_rows == 18


def test_generated_tokens_are_never_shared():
    """
    A prompt that continues another's output recomputes it by the prompt path.
    """
    sched, model = scheduler(), _model()
    outputs = expected_tokens(prompt(4), 9)
    sched.add(request("a", prompt(4), max_tokens=9))
    _run(sched, model)
    longer = (*prompt(4), *outputs)
    sched.add(request("b", longer, max_tokens=1))

    plan, outcome = step(sched, model)

    assert plan.rows[0].start == 4
    assert outcome.emitted[0].token_ids == expected_tokens(longer, 1)


def test_known_outputs_are_replayed_and_not_sampled_again():
    """
    Positions go on where the caller stopped; only the last replayed row samples.
    """
    sched, model = scheduler(), _model()
    outputs = expected_tokens(prompt(6), 8)
    sched.add(request("a", prompt(6), output_ids=outputs[:5], max_tokens=8))

    plan, outcome = step(sched, model)
    assert plan.rows[0].sample is None
    assert outcome.emitted == ()

    plan, outcome = step(sched, model)
    assert (plan.rows[0].path, len(plan.rows[0].token_ids)) == (Path.GENERATION, 5)
    assert (outcome.emitted[0].position, outcome.emitted[0].token_ids) == (5, (outputs[5],))
    assert _run(sched, model)["a"] == outputs[6:]


def test_a_replay_leaves_a_row_for_everybody_after_it():
    """
    Sequences that decode beside a long replay are not stopped by it.
    """
    sched, model = scheduler(budget_tokens=6, max_sequences=3), _model()
    outputs = expected_tokens(prompt(4), 20)
    sched.add(request("a", prompt(4), output_ids=outputs[:16], max_tokens=20))
    sched.add(request("b", prompt(2, variant=1), max_tokens=20))
    step(sched, model)

    plan, _ = step(sched, model)

    assert _computed(plan) == ["a", "b"]
    assert [len(rows.token_ids) for rows in plan.rows] == [5, 1]


def test_a_hold_keeps_its_blocks_until_released():
    """
    Each chunk is reported with the whole block table; the first token is sampled.
    """
    sched, model = scheduler(budget_tokens=8, max_sequences=2), _model()
    sched.add(request("a", prompt(14), goal=Goal.HOLD, output_ids=(1, 2), max_tokens=9))

    _, first = step(sched, model)
    _, last = step(sched, model)

    assert [c.num_computed for c in (*first.chunks, *last.chunks)] == [8, 14]
    assert len(first.chunks[0].block_table) == 4
    assert [(e.position, e.token_ids) for e in last.emitted] == [
        (0, expected_tokens(prompt(14), 1))
    ]
    assert not step(sched, model)[0].rows
    assert sched.count(State.HELD) == 1
    assert sched.pool.counts.held == 4

    assert sched.release("a")
    assert sched.pool.counts.held == 0


def test_a_hold_whose_first_token_is_the_last_still_holds():
    """
    Whether the KV is wanted is for the service to say.
    """
    sched, model = scheduler(), _model()
    sched.add(request("a", goal=Goal.HOLD, max_tokens=1))

    _, outcome = step(sched, model)

    assert outcome.emitted[0].finish is FinishReason.LENGTH
    assert sched.count(State.HELD) == 1


def test_a_landed_sequence_computes_no_prompt_token():
    """
    It is granted blocks, waits for its KV, and goes on from the seeded token.
    """
    sched, model = scheduler(), _model()
    outputs = expected_tokens(prompt(10), 5)
    sched.add(request("a", prompt(10), origin=Origin.LAND, max_tokens=5))
    (granted,) = sched.grant()
    assert len(granted.block_table) == 3
    assert not step(sched, model)[0].rows
    model.land(granted.block_table, prompt(10))

    assert sched.join("a", outputs[:1], 10) is None

    assert _run(sched, model) == {"a": outputs[1:]}
    assert model.num_rows == 4


def test_a_landed_prompt_is_in_the_prefix_index():
    """
    The next grant for the same prompt says which blocks are there already.
    """
    sched, model = scheduler(), _model()
    sched.add(request("a", prompt(10), origin=Origin.LAND, max_tokens=3))
    (first,) = sched.grant()
    model.land(first.block_table, prompt(10))
    sched.join("a", expected_tokens(prompt(10), 1), 10)
    sched.add(request("b", prompt(10), origin=Origin.LAND, max_tokens=3))

    (second,) = sched.grant()

    assert second.num_cached_blocks == 2
    assert second.block_table[:2] == first.block_table[:2]
    assert second.block_table[2] != first.block_table[2]


def test_a_landed_prompt_of_full_blocks_may_be_cached_whole():
    """
    Then nothing has to be pulled.
    """
    sched, model = scheduler(), _model()
    sched.add(request("a", prompt(8), max_tokens=1))
    _run(sched, model)
    sched.add(request("b", prompt(8), origin=Origin.LAND, max_tokens=3))

    (granted,) = sched.grant()
    sched.join("b", expected_tokens(prompt(8), 1), 8)

    assert (len(granted.block_table), granted.num_cached_blocks) == (2, 2)
    assert _run(sched, model) == {"b": expected_tokens(prompt(8), 3)[1:]}


def test_a_landed_sequence_replays_the_outputs_it_came_with():
    """
    What its request brought counts, not the seed; its table grows as it replays.
    """
    sched, model = scheduler(budget_tokens=8), _model()
    outputs = expected_tokens(prompt(6), 16)
    sched.add(request("a", prompt(6), origin=Origin.LAND, output_ids=outputs[:11], max_tokens=16))
    (granted,) = sched.grant()
    model.land(granted.block_table, prompt(6))

    sched.join("a", outputs[:1], 6)

    assert len(granted.block_table) == 2
    assert _run(sched, model) == {"a": outputs[11:]}


def test_a_landed_sequence_is_preempted_and_computed_here():
    """
    A decode worker prefills for itself when it gave landed KV up.
    """
    sched, model = scheduler(num_blocks=5), _model()
    for i, seq_id in enumerate("ab"):
        sched.add(request(seq_id, prompt(5, variant=i), origin=Origin.LAND, max_tokens=12))
        (granted,) = sched.grant()
        model.land(granted.block_table, prompt(5, variant=i))
        sched.join(seq_id, expected_tokens(prompt(5, variant=i), 1), 5)

    tokens = _run(sched, model)

    assert sched.num_preemptions > 0
    for i, seq_id in enumerate("ab"):
        assert tokens[seq_id] == expected_tokens(prompt(5, variant=i), 12)[1:]


def test_a_join_that_is_finished_already_frees_its_blocks():
    """
    Its finish is emitted without a token.
    """
    sched = scheduler()
    sched.add(request("a", origin=Origin.LAND, max_tokens=1))
    sched.grant()

    done = sched.join("a", (7,), 6)

    assert done is not None
    assert (done.position, done.token_ids, done.finish) == (1, (), FinishReason.LENGTH)
    assert sched.is_empty
    assert sched.pool.counts.held == 0


def test_joining_what_is_not_landing_is_refused():
    """
    A sequence released meanwhile is not found; it does not come back.
    """
    sched = scheduler()
    sched.add(request("a", origin=Origin.LAND))
    with pytest.raises(NotFound):
        sched.join("a", (7,), 6)
    assert isinstance(sched.grant()[0], Granted)
    with pytest.raises(InvalidRequest, match="output_ids"):
        sched.join("a", (), 6)
    sched.release("a")
    with pytest.raises(NotFound):
        sched.join("a", (7,), 6)


def test_grants_are_possible_while_a_step_is_computed():
    """
    A landing sequence does not wait for the device.
    """
    sched, model = scheduler(), _model()
    sched.add(request("a", prompt(6)))
    plan = sched.plan()
    sched.add(request("b", prompt(9, variant=1), origin=Origin.LAND))

    assert [granted.seq_id for granted in sched.grant()] == ["b"]

    sched.commit(model.step(plan.rows))
    sched.check()


def test_release_in_a_step_frees_when_the_step_ends():
    """
    The device may still write to the blocks; nothing is emitted afterwards.
    """
    sched, model = scheduler(), _model()
    sched.add(request("a", prompt(6)))
    plan = sched.plan()

    assert sched.release("a")
    assert not sched.release("a")
    assert sched.pool.counts.held == 2
    outcome = sched.commit(model.step(plan.rows))

    assert outcome.emitted == ()
    assert sched.is_empty
    assert sched.pool.counts.held == 0
    sched.check()


@pytest.mark.parametrize("state", list(State))
def test_release_works_in_every_state(state: State):
    """
    Blocks come back at once outside a step.
    """
    sched, model = scheduler(num_blocks=4, max_sequences=2), _model()
    goal = Goal.HOLD if state is State.HELD else Goal.FINISH
    origin = Origin.LAND if state is State.LANDING else Origin.COMPUTE
    sched.add(request("a", prompt(8), goal=goal, origin=origin, max_tokens=4))
    if state is not State.WAITING:
        step(sched, model)
    assert sched.count(state) == 1

    assert sched.release("a")

    assert sched.is_empty
    assert sched.pool.counts.held == 0
    sched.check()


def test_what_can_never_fit_is_refused_at_once():
    """
    The last token's KV is never computed, so it needs no slot.
    """
    sched = scheduler(num_blocks=3)
    sched.add(request("fits", prompt(8), max_tokens=5))
    sched.add(request("held", prompt(12), max_tokens=100, goal=Goal.HOLD))

    with pytest.raises(KvPoolExhausted, match="4 KV blocks wanted, 3 free"):
        sched.add(request("never", prompt(8), max_tokens=6))


def test_the_line_is_bounded():
    """
    One more than `max_waiting` is refused, with the numbers.
    """
    sched = scheduler(max_waiting=2)
    sched.add(request("a"))
    sched.add(request("b"))

    with pytest.raises(QueueFull, match="2 sequences queued, limit 2"):
        sched.add(request("c"))


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("prompt_ids", request("b", ())),
        ("max_tokens", request("b", max_tokens=0)),
        ("output_ids", request("b", output_ids=(1, 2), max_tokens=2)),
        ("goal", request("b", origin=Origin.LAND, goal=Goal.HOLD)),
        ("seq_id", request("a")),
    ],
)
def test_requests_that_make_no_sense_are_refused_by_field(field, bad):
    """
    Nothing is queued of them.
    """
    sched = scheduler()
    sched.add(request("a"))

    with pytest.raises(InvalidRequest) as refused:
        sched.add(bad)

    assert refused.value.field == field
    assert sched.count(State.WAITING) == 1


def test_queued_prompt_tokens_counts_what_is_left_to_compute():
    """
    Waiting prompts whole, running ones in part, landing ones not at all.
    """
    sched, model = scheduler(budget_tokens=8, max_sequences=2), _model()
    sched.add(request("a", prompt(20)))
    sched.add(request("b", prompt(6, variant=1)))
    sched.add(request("c", prompt(6, variant=2), origin=Origin.LAND))
    step(sched, model)

    assert sched.queued_prompt_tokens == 12 + 6
