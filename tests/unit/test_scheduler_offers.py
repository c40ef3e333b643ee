"""Sequences that move to another engine while they run: offered, held, resumed or let go."""

import pytest

from kvrelay.engine.request import Frozen, Goal, Origin
from kvrelay.engine.scheduler import Scheduler
from kvrelay.engine.sequence import State
from kvrelay.errors import NotFound
from kvrelay.types import FinishReason
from tests.support.builders import BLOCK_SIZE, prompt, request, scheduler, step
from tests.support.scripted_model import ScriptedModel, expected_tokens


def _model() -> ScriptedModel:
    return ScriptedModel(block_size=BLOCK_SIZE)


def _generating(
    sched: Scheduler, model: ScriptedModel, *, max_tokens: int = 20, num_outputs: int = 2
) -> tuple[int, ...]:
    """Sequence `a` with its first tokens generated; returns all that it will generate."""
    sched.add(request("a", prompt(6), max_tokens=max_tokens))
    for _ in range(num_outputs):
        step(sched, model)
    return expected_tokens(prompt(6), max_tokens)


def _rest(sched: Scheduler, model: ScriptedModel, seq_id: str = "a") -> tuple[int, ...]:
    """What it emits until nothing moves."""
    tokens: tuple[int, ...] = ()
    while True:
        plan, outcome = step(sched, model)
        sched.check()
        tokens += tuple(
            token_id
            for emitted in outcome.emitted
            if emitted.seq_id == seq_id
            for token_id in emitted.token_ids
        )
        if not plan.rows:
            return tokens


def test_an_offered_sequence_reports_what_it_computes():
    """
    The KV it has, at the offer and after each step, with all its blocks.
    """
    sched, model = scheduler(), _model()
    _generating(sched, model)

    offered = sched.offer("a")
    chunks = [chunk for _ in range(3) for chunk in step(sched, model)[1].chunks]

    assert offered.num_computed == 7  # of two outputs, the last has no KV
    assert [chunk.num_computed for chunk in chunks] == [8, 9, 10]
    assert [len(chunk.block_table) for chunk in chunks] == [2, 3, 3]
    assert chunks[-1].block_table[:2] == offered.block_table


def test_what_is_not_offered_reports_nothing():
    """
    Others in the same step, and the same one before and after.
    """
    sched, model = scheduler(), _model()
    _generating(sched, model)
    sched.add(request("b", prompt(5, variant=1), max_tokens=20))
    assert step(sched, model)[1].chunks == ()
    sched.offer("a")
    assert {chunk.seq_id for chunk in step(sched, model)[1].chunks} == {"a"}
    sched.resume("a")

    assert step(sched, model)[1].chunks == ()


def test_only_what_generates_can_be_offered():
    """
    Not what waits, lands, prefills, replays, is held, has left or never was.
    """
    sched, model = scheduler(budget_tokens=8, max_chunk_tokens=8), _model()
    known = expected_tokens(prompt(4, variant=3), 20)
    sched.add(request("hold", prompt(4), goal=Goal.HOLD))
    step(sched, model)
    sched.add(request("lands", prompt(5, variant=1), origin=Origin.LAND))
    sched.add(request("prefills", prompt(12, variant=2), max_tokens=9))
    sched.add(request("replays", prompt(4, variant=3), output_ids=known[:18], max_tokens=20))
    sched.add(request("waits", prompt(90, variant=4), max_tokens=2))
    step(sched, model)

    for seq_id in ("hold", "lands", "prefills", "replays", "waits", "unknown"):
        with pytest.raises(NotFound):
            sched.offer(seq_id)
    step(sched, model)
    step(sched, model)
    with pytest.raises(NotFound):  # its prompt is done, of its outputs some are not
        sched.offer("replays")
    assert sched.offer("prefills").num_computed >= 12


def test_a_freeze_between_steps_holds_at_once():
    """
    With every token it has generated; the last has no KV. Its blocks stay.
    """
    sched, model = scheduler(), _model()
    outputs = _generating(sched, model, num_outputs=3)
    sched.offer("a")

    frozen = sched.freeze("a")

    assert isinstance(frozen, Frozen)
    assert (frozen.done.num_computed, frozen.output_ids) == (8, outputs[:3])
    assert sched.count(State.HELD) == 1
    assert not step(sched, model)[0].rows
    assert sched.pool.counts.held == len(frozen.done.block_table)
    assert sched.freeze("a") is None
    sched.check()


def test_a_freeze_in_a_step_holds_when_the_step_ends():
    """
    The token of that step is its last here: emitted, and among those that are told.
    """
    sched, model = scheduler(), _model()
    outputs = _generating(sched, model)
    sched.offer("a")
    plan = sched.plan()

    assert sched.freeze("a") is None
    assert sched.count(State.HELD) == 0
    outcome = sched.commit(model.step(plan.rows))

    (frozen,) = outcome.frozen
    assert [e.token_ids for e in outcome.emitted] == [outputs[2:3]]
    assert (frozen.done.num_computed, frozen.output_ids) == (8, outputs[:3])
    assert frozen.done == outcome.chunks[0]
    assert not step(sched, model)[0].rows


@pytest.mark.parametrize("in_step", [False, True])
def test_a_sequence_that_ends_while_it_is_to_freeze_has_ended(in_step):
    """
    Its last token comes with the step that it was to be frozen after: nothing is held.
    """
    sched, model = scheduler(), _model()
    _generating(sched, model, max_tokens=3)
    sched.offer("a")
    plan = sched.plan()
    if in_step:
        sched.freeze("a")
    else:
        sched.limit("a", 8)
    outcome = sched.commit(model.step(plan.rows))

    assert outcome.emitted[0].finish is FinishReason.LENGTH
    assert outcome.frozen == ()
    assert sched.is_empty
    assert sched.freeze("a") is None
    sched.check()


def test_a_limit_holds_before_there_is_kv_for_more():
    """
    A puller has room for so many tokens, and the sequence runs on until then.
    """
    sched, model = scheduler(), _model()
    outputs = _generating(sched, model)
    sched.offer("a")
    assert sched.limit("a", 10) is None

    frozen = [stopped for _ in range(9) for stopped in step(sched, model)[1].frozen]

    assert [each.done.num_computed for each in frozen] == [10]
    assert frozen[0].output_ids == outputs[:5]
    assert sched.count(State.HELD) == 1


@pytest.mark.parametrize("limit_tokens", [7, 6, 1])
def test_a_limit_that_is_reached_already_holds_at_once(limit_tokens):
    """
    Whether it fits is for the puller to say.
    """
    sched, model = scheduler(), _model()
    _generating(sched, model)
    sched.offer("a")

    frozen = sched.limit("a", limit_tokens)

    assert frozen is not None
    assert frozen.done.num_computed == 7


def test_no_limit_is_no_limit():
    """
    0 says so, also after another.
    """
    sched, model = scheduler(), _model()
    outputs = _generating(sched, model)
    sched.offer("a")
    sched.limit("a", 9)
    assert sched.limit("a", 0) is None

    assert _rest(sched, model) == outputs[2:]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_sequence_that_does_not_move_after_all_runs_on(is_frozen):
    """
    Whether it was held or not, no token is lost, computed twice or sampled again.
    """
    sched, model = scheduler(), _model()
    outputs = _generating(sched, model)
    sched.offer("a")
    sched.limit("a", 11)
    if is_frozen:
        sched.freeze("a")
        assert not step(sched, model)[0].rows
    num_rows = model.num_rows

    sched.resume("a")

    assert _rest(sched, model) == outputs[2:]
    assert model.num_rows == num_rows + 18
    assert sched.is_empty


def test_a_freeze_in_a_step_may_be_called_off_before_it_ends():
    """
    It never stops then.
    """
    sched, model = scheduler(), _model()
    outputs = _generating(sched, model)
    sched.offer("a")
    plan = sched.plan()
    sched.freeze("a")
    sched.resume("a")
    outcome = sched.commit(model.step(plan.rows))

    assert outcome.frozen == ()
    assert _rest(sched, model) == outputs[3:]


@pytest.mark.parametrize("what", ["limit", "freeze", "resume"])
def test_what_is_not_on_offer_is_left_alone(what):
    """
    Before an offer, and of a sequence nobody knows: these may cross its end on their way.
    """
    sched, model = scheduler(), _model()
    outputs = _generating(sched, model)
    for seq_id in ("a", "unknown"):
        args = (seq_id, 1) if what == "limit" else (seq_id,)
        assert getattr(sched, what)(*args) is None

    assert _rest(sched, model) == outputs[2:]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_released_offer_gives_its_blocks_back(is_frozen):
    """
    It has moved, or was called off.
    """
    sched, model = scheduler(), _model()
    _generating(sched, model)
    sched.offer("a")
    if is_frozen:
        sched.freeze("a")

    assert sched.release("a")

    assert sched.is_empty
    assert sched.pool.counts.held == 0
    assert sched.freeze("a") is None
    sched.check()


def test_an_offer_that_is_released_in_a_step_is_not_frozen_by_its_end():
    """
    Released is released, whatever was asked before.
    """
    sched, model = scheduler(), _model()
    _generating(sched, model)
    sched.offer("a")
    plan = sched.plan()
    sched.freeze("a")
    sched.release("a")
    with pytest.raises(NotFound):
        sched.offer("a")
    outcome = sched.commit(model.step(plan.rows))

    assert (outcome.frozen, outcome.chunks, outcome.emitted) == ((), (), ())
    assert sched.is_empty


def test_preemption_withdraws_an_offer():
    """
    Its KV is given up, so whoever pulls it must hear of it; it is computed again here.
    """
    sched, model = scheduler(num_blocks=5), _model()
    for i, seq_id in enumerate("ab"):
        sched.add(request(seq_id, prompt(4, variant=i), max_tokens=12))
    step(sched, model)
    step(sched, model)
    sched.offer("b")
    sched.limit("b", 9)
    withdrawn: list[str] = []
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    chunks = 0
    while not sched.is_empty:
        plan, outcome = step(sched, model)
        withdrawn += plan.withdrawn
        chunks += len(outcome.chunks) if withdrawn else 0
        for emitted in outcome.emitted:
            tokens[emitted.seq_id] += emitted.token_ids
        sched.check()

    assert withdrawn == ["b"]
    assert chunks == 0
    assert tuple(tokens["b"]) == expected_tokens(prompt(4, variant=1), 12)[2:]


def test_an_offer_after_a_withdrawn_one_has_no_limit_of_its_own():
    """
    What another puller had room for says nothing of the next.
    """
    sched, model = scheduler(num_blocks=5), _model()
    for i, seq_id in enumerate("ab"):
        sched.add(request(seq_id, prompt(4, variant=i), max_tokens=12))
    step(sched, model)
    step(sched, model)
    sched.offer("b")
    sched.limit("b", 12)
    while sched.count(State.RUNNING) == 2:
        step(sched, model)
    sched.release("a")
    while True:
        step(sched, model)
        try:
            sched.offer("b")
        except NotFound:
            continue
        break

    tokens = _rest(sched, model, "b")

    assert tokens == expected_tokens(prompt(4, variant=1), 12)[-len(tokens) :]
    assert sched.is_empty


def test_a_frozen_sequence_is_never_preempted():
    """
    Its puller may be copying it; who needs a block sits out until it has moved.
    """
    sched, model = scheduler(num_blocks=6), _model()
    for i, seq_id in enumerate("ab"):
        sched.add(request(seq_id, prompt(4, variant=i), max_tokens=17))
    for _ in range(3):
        step(sched, model)
    sched.offer("b")
    frozen = sched.freeze("b")
    assert frozen is not None
    _rest(sched, model)

    assert sched.num_preemptions == 0
    assert sched.count(State.HELD) == sched.count(State.RUNNING) == 1
    sched.release("b")
    _rest(sched, model)
    assert sched.is_empty


def test_a_frozen_sequence_keeps_its_place_in_the_step():
    """
    It may have to run on, so nobody is admitted in its stead.
    """
    sched, model = scheduler(max_sequences=2, budget_tokens=2), _model()
    for i, seq_id in enumerate("ab"):
        sched.add(request(seq_id, prompt(4, variant=i), max_tokens=9))
    while sched.count(State.WAITING) or sched.queued_prompt_tokens:
        step(sched, model)
    sched.offer("a")
    assert sched.freeze("a") is not None
    sched.add(request("c", prompt(4, variant=2), max_tokens=2))

    plan, _ = step(sched, model)
    waited = sched.count(State.WAITING)
    sched.resume("a")
    both, _ = step(sched, model)

    assert [seq.seq_id for seq in plan.sequences] == ["b"]
    assert waited == 1
    assert {seq.seq_id for seq in both.sequences} == {"a", "b"}
    _rest(sched, model)
    assert sched.is_empty


def test_a_moved_sequence_goes_on_with_what_it_generated():
    """
    The other engine computes no prompt token and no token that its holder had computed.
    """
    left, left_model = scheduler(), _model()
    outputs = _generating(left, left_model, num_outputs=5)
    left.offer("a")
    frozen = left.freeze("a")
    assert frozen is not None
    right, right_model = scheduler(), _model()
    right.add(
        request(
            "b",
            prompt(6),
            origin=Origin.LAND,
            output_ids=outputs[:2],
            max_tokens=20,
            landing_tokens=15,
        )
    )
    (granted,) = right.grant()
    num_landed = frozen.done.num_computed
    for source, target in zip(frozen.done.block_table, granted.block_table, strict=False):
        right_model.copy_block(left_model, source, target)

    right.join("b", frozen.output_ids, num_landed)

    assert len(granted.block_table) == 4
    assert _rest(right, right_model, "b") == outputs[5:]
    assert right_model.num_rows == 15
    assert right.is_empty


def test_a_landing_takes_the_slots_it_may_fill():
    """
    Those of the prompt, or more where the holder generates meanwhile; never what a cache has.
    """
    sched, _ = scheduler(), _model()
    sched.add(request("a", prompt(6), origin=Origin.LAND, max_tokens=40))
    sched.add(request("b", prompt(6), origin=Origin.LAND, max_tokens=40, landing_tokens=17))
    sched.add(request("c", prompt(6), origin=Origin.LAND, max_tokens=40, landing_tokens=3))

    assert [len(granted.block_table) for granted in sched.grant()] == [2, 5, 2]
