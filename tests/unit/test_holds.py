"""Holds, driven event by event. No engine, no clock, no sockets."""

import pytest

from kvrelay.errors import HandoffLost, InvalidRequest, PermissionDenied, QueueFull
from kvrelay.types import BlockId
from prefill_svc.holds import AnnouncedBlock, Hold, HoldLimits, Holds, HoldState

BLOCK_SIZE = 4
LIMITS = HoldLimits(hold_s=30.0, unclaimed_hold_s=10.0, max_expected=2, max_remembered=3)


def make_holds() -> Holds:
    return Holds(block_size=BLOCK_SIZE, limits=LIMITS)


def begun(holds: Holds, handoff_id: str = "h", *, num_tokens: int = 10) -> Hold:
    return holds.begin(
        handoff_id, puller_id="d", seq_id=f"seq {handoff_id}", prompt_ids=tuple(range(num_tokens))
    )


def table(hold: Hold) -> tuple[BlockId, ...]:
    return tuple(BlockId(100 + i) for i in range(hold.num_blocks))


def announce_ready(holds: Holds, hold: Hold) -> None:
    ready = hold.ready_unannounced
    holds.announce(hold, [AnnouncedBlock(block, 7, 1000 + block) for block in ready])


def completed(holds: Holds, handoff_id: str = "h", *, num_tokens: int = 10, now_s: float = 0.0):
    hold = begun(holds, handoff_id, num_tokens=num_tokens)
    holds.advance(hold, table(hold), num_tokens)
    holds.complete(hold, 5, now_s)
    announce_ready(holds, hold)
    return hold


def release(holds: Holds, handoff_id: str = "h", *, puller_id="d", generations=(7, 7, 7), now=7):
    return holds.release(handoff_id, puller_id, generations=generations, current=lambda block: now)


def test_only_full_blocks_are_ready_until_the_prompt_is_complete():
    """A partly filled block still changes, so it is announced with the completion."""
    holds = make_holds()
    hold = begun(holds, num_tokens=10)

    holds.advance(hold, table(hold), 7)
    after_a_chunk = hold.num_ready
    holds.advance(hold, table(hold), 10)
    after_the_last = hold.num_ready
    holds.complete(hold, 5, 0.0)

    assert (after_a_chunk, after_the_last, hold.num_ready) == (1, 2, 3)


def test_release_is_granted_once_the_hold_is_complete():
    """It ends the hold, and names it to whoever gives the blocks back."""
    holds = make_holds()
    hold = completed(holds)

    assert release(holds) is hold
    assert hold.state is HoldState.RELEASED
    assert holds.is_empty


def test_a_repeated_release_is_granted_while_it_is_remembered():
    """The answer may have been lost; the blocks are given back only once."""
    holds = make_holds()
    completed(holds)
    release(holds)

    assert release(holds) is None
    with pytest.raises(PermissionDenied):
        release(holds, puller_id="someone")
    with pytest.raises(HandoffLost):
        release(holds, generations=(7, 7, 8))

    for i in range(LIMITS.max_remembered):
        completed(holds, f"later {i}")
        release(holds, f"later {i}")
    with pytest.raises(HandoffLost):
        release(holds)


@pytest.mark.parametrize("generations", [(7, 7), (7, 7, 8), (7, 7, 7, 7), ()])
def test_release_with_other_generations_is_refused(generations):
    """The puller read something else; the hold stays for whoever knows it right."""
    holds = make_holds()
    hold = completed(holds)

    with pytest.raises(HandoffLost):
        release(holds, generations=generations)

    assert hold.state is HoldState.COMPLETE


def test_release_is_refused_if_a_block_was_given_up_all_the_same():
    """The second net: what the engine says of the blocks now is compared as well."""
    holds = make_holds()
    completed(holds)

    with pytest.raises(HandoffLost):
        release(holds, now=8)


def test_release_of_a_hold_that_still_computes_is_refused():
    """Nobody can have read it whole."""
    holds = make_holds()
    begun(holds)

    with pytest.raises(HandoffLost):
        release(holds, generations=())


def test_a_lapsed_hold_is_never_released():
    """Not after a cancel, whoever asks, however often."""
    holds = make_holds()
    hold = completed(holds)
    holds.lapse(hold)

    for _ in range(2):
        with pytest.raises(HandoffLost):
            release(holds)
    with pytest.raises(HandoffLost):
        holds.connect("h", "d", 0.0)


def test_only_its_puller_may_connect_read_or_release():
    """Anybody else is refused by name, and changes nothing."""
    holds = make_holds()
    hold = completed(holds)

    with pytest.raises(PermissionDenied):
        holds.connect("h", "other", 0.0)
    with pytest.raises(PermissionDenied):
        holds.find("h", "other")
    with pytest.raises(PermissionDenied):
        release(holds, puller_id="other")

    assert hold.state is HoldState.COMPLETE
    assert hold.num_pulls == 0


def test_a_handoff_id_is_minted_once():
    """Neither a living nor a remembered hold gives its name to another."""
    holds = make_holds()
    begun(holds)
    with pytest.raises(InvalidRequest):
        begun(holds)
    completed(holds, "h2")
    release(holds, "h2")
    with pytest.raises(InvalidRequest):
        begun(holds, "h2")


def test_a_pull_before_its_prompt_becomes_the_hold():
    """Whoever waited has the same hold in hand once the prompt is submitted."""
    holds = make_holds()
    expected = holds.connect("h", "d", 0.0)

    assert expected.state is HoldState.EXPECTED
    assert begun(holds) is expected
    assert expected.num_pulls == 1


def test_pulls_before_their_prompts_are_bounded():
    """One more than may wait is refused, under a known name as under a new one."""
    holds = make_holds()
    holds.connect("a", "d", 0.0)
    last = holds.connect("b", "d", 0.0)

    with pytest.raises(QueueFull):
        holds.connect("c", "d", 0.0)
    with pytest.raises(QueueFull):
        holds.connect("b", "d", 0.0)
    holds.disconnect(last, 1.0)
    holds.connect("c", "d", 1.0)


def test_a_pull_whose_prompt_never_comes_is_given_up_at_its_instant():
    """Not before `unclaimed_hold_s`, and exactly then."""
    holds = make_holds()
    hold = holds.connect("h", "d", 5.0)

    assert holds.next_due_s() == 15.0
    assert holds.lapse_overdue(14.999) == []
    assert holds.lapse_overdue(15.0) == [hold]
    assert hold.state is HoldState.LAPSED
    assert begun(holds).is_alive


def test_a_complete_hold_without_a_puller_is_given_up_at_its_instant():
    """`hold_s` after it completed, or after its last puller left."""
    holds = make_holds()
    idle = completed(holds, "idle", now_s=100.0)
    pulled = completed(holds, "pulled", now_s=100.0)
    holds.connect("pulled", "d", 101.0)

    assert holds.lapse_overdue(130.0) == [idle]
    assert holds.next_due_s() is None
    holds.disconnect(pulled, 200.0)
    assert holds.next_due_s() == 230.0
    assert holds.lapse_overdue(230.0) == [pulled]


def test_a_computing_hold_has_no_timer():
    """The engine decides how long a prompt takes."""
    holds = make_holds()
    begun(holds)

    assert holds.next_due_s() is None


def test_a_finished_hold_lets_its_puller_wait():
    """Its blocks are gone, yet a puller is not told of a loss that is none."""
    holds = make_holds()
    hold = begun(holds)
    holds.advance(hold, table(hold), 10)
    holds.finish(hold)

    assert holds.connect("h", "d", 0.0) is hold
    assert not hold.is_alive
    with pytest.raises(HandoffLost):
        release(holds)
