"""Holds, driven event by event. No engine, no clock, no sockets."""

from dataclasses import replace

import pytest

from kvrelay.errors import HandoffLost, InvalidRequest, PermissionDenied, QueueFull
from kvrelay.handoff.holds import (
    AnnouncedBlock,
    Hold,
    HoldLimits,
    Holds,
    HoldState,
    PullTerms,
)
from kvrelay.types import BlockId

BLOCK_SIZE = 4
LIMITS = HoldLimits(hold_s=30.0, unclaimed_hold_s=10.0, max_expected=2, max_remembered=3)
TERMS = PullTerms(wire_dtype="auto", digest_kind="xxh3", limit_tokens=0)


def make_holds() -> Holds:
    return Holds(block_size=BLOCK_SIZE, limits=LIMITS)


def begun(
    holds: Holds, handoff_id: str = "h", *, num_tokens: int = 10, is_running: bool = False
) -> Hold:
    return holds.begin(
        handoff_id,
        puller_id="d",
        seq_id=f"seq {handoff_id}",
        prompt_ids=tuple(range(num_tokens)),
        is_running=is_running,
    )


def blocks(num_blocks: int) -> tuple[BlockId, ...]:
    return tuple(BlockId(100 + i) for i in range(num_blocks))


def table(hold: Hold) -> tuple[BlockId, ...]:
    return blocks(hold.num_blocks)


def connected(holds: Holds, handoff_id: str = "h", *, now_s: float = 0.0) -> Hold:
    return holds.connect(handoff_id, "d", TERMS, now_s)


def announce_ready(holds: Holds, hold: Hold) -> None:
    holds.announce(hold, [AnnouncedBlock(block, 7) for block in hold.ready_unannounced])


def digest_announced(holds: Holds, hold: Hold) -> None:
    holds.digested(hold, [1000 + block.block_id for block in hold.undigested])


def completed(holds: Holds, handoff_id: str = "h", *, num_tokens: int = 10, now_s: float = 0.0):
    hold = begun(holds, handoff_id, num_tokens=num_tokens)
    holds.advance(hold, table(hold), num_tokens)
    holds.complete(hold, (5,), now_s)
    announce_ready(holds, hold)
    digest_announced(holds, hold)
    return hold


def release(holds: Holds, handoff_id: str = "h", *, puller_id="d", generations=(7, 7, 7), now=7):
    return holds.release(
        handoff_id, puller_id, generations=generations, current=lambda named: [now] * len(named)
    )


def test_only_full_blocks_are_ready_until_the_prompt_is_complete():
    """A partly filled block still changes, so it is announced with the completion."""
    holds = make_holds()
    hold = begun(holds, num_tokens=10)

    holds.advance(hold, table(hold), 7)
    after_a_chunk = hold.num_ready
    holds.advance(hold, table(hold), 10)
    after_the_last = hold.num_ready
    holds.complete(hold, (5,), 0.0)

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
        connected(holds)


def test_only_its_puller_may_connect_read_or_release():
    """Anybody else is refused by name, and changes nothing."""
    holds = make_holds()
    hold = completed(holds)

    with pytest.raises(PermissionDenied):
        holds.connect("h", "other", TERMS, 0.0)
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
    expected = connected(holds)

    assert expected.state is HoldState.EXPECTED
    assert begun(holds) is expected
    assert expected.num_pulls == 1


def test_pulls_before_their_prompts_are_bounded():
    """One more than may wait is refused, under a known name as under a new one."""
    holds = make_holds()
    connected(holds, "a")
    last = connected(holds, "b")

    with pytest.raises(QueueFull):
        connected(holds, "c")
    with pytest.raises(QueueFull):
        connected(holds, "b")
    holds.disconnect(last, 1.0)
    connected(holds, "c", now_s=1.0)


def test_a_pull_whose_prompt_never_comes_is_given_up_at_its_instant():
    """Not before `unclaimed_hold_s`, and exactly then."""
    holds = make_holds()
    hold = connected(holds, now_s=5.0)

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
    connected(holds, "pulled", now_s=101.0)

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

    assert connected(holds) is hold
    assert not hold.is_alive
    with pytest.raises(HandoffLost):
        release(holds)


def test_digests_lag_behind_the_blocks():
    """Blocks are announced first; a release is refused until the last digest is told."""
    holds = make_holds()
    hold = begun(holds, num_tokens=10)
    holds.advance(hold, table(hold), 8)
    announce_ready(holds, hold)
    early = [block.block_id for block in hold.undigested]
    holds.digested(hold, [1, 2])
    holds.advance(hold, table(hold), 10)
    holds.complete(hold, (5,), 0.0)
    announce_ready(holds, hold)
    told_too_soon = hold.is_told
    with pytest.raises(HandoffLost):
        release(holds)
    holds.digested(hold, [3])

    assert early == [100, 101]
    assert (told_too_soon, hold.is_told) == (False, True)
    assert release(holds) is hold


def test_more_digests_than_blocks_are_a_bug():
    """And so are blocks that are not the next."""
    holds = make_holds()
    hold = begun(holds)
    holds.advance(hold, table(hold), 8)
    holds.announce(hold, [AnnouncedBlock(BlockId(100), 7)])
    with pytest.raises(AssertionError):
        holds.digested(hold, [1, 2])
    with pytest.raises(AssertionError, match="out of order"):
        holds.announce(hold, [AnnouncedBlock(BlockId(100), 7)])
    with pytest.raises(AssertionError):
        holds.announce(hold, [AnnouncedBlock(BlockId(i), 7) for i in (101, 102)])


@pytest.mark.parametrize("is_expected", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        replace(TERMS, wire_dtype="int8"),
        replace(TERMS, digest_kind="lanes64"),
        replace(TERMS, limit_tokens=9),
    ],
)
def test_the_terms_of_a_pull_are_fixed(is_expected, other):
    """Blocks were packed and digested for the first; whoever comes again wants the same."""
    holds = make_holds()
    hold = connected(holds) if is_expected else completed(holds)
    if not is_expected:
        connected(holds)

    with pytest.raises(InvalidRequest):
        holds.connect("h", "d", other, 0.0)
    assert hold.num_pulls == 1
    assert connected(holds) is hold
    assert hold.terms == TERMS


def test_a_puller_that_was_refused_fixes_no_terms():
    """Nor is it counted."""
    holds = make_holds()
    hold = begun(holds)
    with pytest.raises(PermissionDenied):
        holds.connect("h", "other", replace(TERMS, limit_tokens=1), 0.0)

    assert (hold.terms, hold.num_pulls) == (None, 0)


def test_a_pull_that_left_before_its_hold_began_leaves_nothing():
    """Not even its terms."""
    holds = make_holds()
    left = holds.connect("h", "d", replace(TERMS, limit_tokens=1), 0.0)
    holds.disconnect(left, 1.0)
    assert holds.is_empty

    assert connected(holds).terms == TERMS


def running(holds: Holds, handoff_id: str = "h", *, num_computed: int = 12) -> Hold:
    """A sequence with a prompt of 10 tokens, on its way out."""
    hold = begun(holds, handoff_id, num_tokens=10, is_running=True)
    holds.advance(hold, blocks(4), num_computed)
    return hold


def test_a_running_hold_grows():
    """With each step it has KV of a token more, and a block more when one is full."""
    holds = make_holds()
    hold = running(holds, num_computed=11)
    seen = []
    for num_computed in range(11, 18):
        holds.advance(hold, blocks(5), num_computed)
        seen.append((hold.num_tokens, hold.num_blocks, hold.num_ready))

    assert seen == [
        *((11, 3, 2), (12, 3, 3), (13, 4, 3), (14, 4, 3), (15, 4, 3), (16, 4, 4), (17, 5, 4))
    ]
    assert hold.block_table == blocks(5)
    assert len(hold.ready_unannounced) == 4
    holds.check()


def test_a_running_hold_has_only_the_blocks_that_have_kv():
    """What its sequence took for later is nobody's business."""
    holds = make_holds()
    hold = begun(holds, num_tokens=10, is_running=True)
    holds.advance(hold, blocks(9), 11)

    assert hold.block_table == blocks(3)


def test_a_running_hold_is_complete_when_it_is_frozen():
    """Its last block then, and all tokens that were generated; as with a prompt from there on."""
    holds = make_holds()
    hold = running(holds, num_computed=13)
    connected(holds)
    announce_ready(holds, hold)
    digest_announced(holds, hold)
    with pytest.raises(HandoffLost):
        release(holds, generations=(7, 7, 7))
    holds.complete(hold, (5, 6, 7, 8), 0.0)
    announce_ready(holds, hold)
    digest_announced(holds, hold)

    assert len(hold.announced) == 4
    assert holds.next_due_s() is None
    assert release(holds, generations=(7, 7, 7, 7)) is hold
    assert hold.output_ids == (5, 6, 7, 8)


def test_a_ready_block_of_a_running_hold_stays_where_it_is():
    """Its sequence grows at the end only."""
    holds = make_holds()
    hold = running(holds, num_computed=12)

    with pytest.raises(AssertionError, match="moved"):
        holds.advance(hold, tuple(reversed(blocks(4))), 13)


@pytest.mark.parametrize("is_complete", [False, True])
@pytest.mark.parametrize("end", ["lapse", "finish"])
def test_a_running_hold_that_ends_is_never_released(end, is_complete):
    """Its sequence runs on, or has ended; a second hold of it goes by another name."""
    holds = make_holds()
    hold = running(holds)
    announce_ready(holds, hold)
    digest_announced(holds, hold)
    if is_complete:
        holds.complete(hold, (5, 6, 7), 0.0)
    getattr(holds, end)(hold)

    with pytest.raises(HandoffLost):
        release(holds)
    with pytest.raises(InvalidRequest):
        running(holds)
    assert running(holds, "second").is_alive
    holds.check()


def test_a_frozen_sequence_whose_puller_left_is_given_up():
    """It stands still meanwhile, so it must run on some time."""
    holds = make_holds()
    hold = running(holds)
    connected(holds)
    assert holds.next_due_s() is None
    holds.complete(hold, (5, 6, 7), 10.0)
    assert holds.next_due_s() is None
    holds.disconnect(hold, 12.0)

    assert holds.lapse_overdue(42.0) == [hold]


def test_an_ended_hold_forgets_what_it_held():
    """Thousands are remembered; none keeps its prompt."""
    holds = make_holds()
    hold = completed(holds)
    holds.lapse(hold)

    assert (hold.prompt_ids, hold.announced, hold.digests) == ((), [], [])
