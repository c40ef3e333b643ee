"""The table of a request's life, checked whole."""

import pytest

from coordinator.lifecycle import (
    TRANSITIONS,
    Event,
    Losses,
    Patience,
    Phase,
    advance,
    verdict,
)
from kvrelay.errors import (
    HandoffLost,
    KvCorrupt,
    KvPoolExhausted,
    NoWorker,
    PeerUnavailable,
)

FINAL = {phase for phase, after in TRANSITIONS.items() if not after}


def test_every_phase_is_reachable_from_the_first():
    """
    No row of the table is dead.
    """
    reached, frontier = {Phase.QUEUED}, [Phase.QUEUED]
    while frontier:
        for after in TRANSITIONS[frontier.pop()].values():
            if after not in reached:
                reached.add(after)
                frontier.append(after)

    assert reached == set(Phase)


def test_a_caller_may_leave_from_any_live_phase():
    """
    Whatever a request waits for, its caller need not.
    """
    live = set(Phase) - FINAL

    assert all(advance(phase, Event.CALLER_GONE) is Phase.CANCELLED for phase in live)


def test_nothing_follows_the_end():
    """
    Finished, cancelled and failed requests stay so.
    """
    assert {Phase.FINISHED, Phase.CANCELLED, Phase.FAILED} == FINAL


def test_a_lost_attempt_goes_back_to_the_queue_from_either_side_of_the_handoff():
    """
    KV is never the only copy of anything, so losing it always means the same.
    """
    assert advance(Phase.PREFILLING, Event.ATTEMPT_LOST) is Phase.QUEUED
    assert advance(Phase.DECODING, Event.ATTEMPT_LOST) is Phase.QUEUED


@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("event", list(Event))
def test_an_event_that_a_phase_does_not_list_is_a_bug(phase, event):
    """
    Every cell of the table either moves on or asserts.
    """
    if event in TRANSITIONS[phase]:
        assert advance(phase, event) in Phase
    else:
        with pytest.raises(AssertionError):
            advance(phase, event)


PATIENCE = Patience(max_attempts=3, queue_limit_s=10.0)


def judge(*losses, refused_s=0.0):
    return verdict(losses, PATIENCE, refused_s=refused_s)


def test_a_lost_worker_is_tried_again_until_the_attempts_are_spent():
    """
    The error of the last attempt is named, and the number of attempts.
    """
    losses = [PeerUnavailable("d0 ended"), HandoffLost("lapsed"), PeerUnavailable("d1 ended")]

    assert judge(*losses[:2]) is None
    error = judge(*losses)
    assert isinstance(error, NoWorker)
    assert error.details["attempts"] == "3"
    assert error.details["last_reason"] == "PEER_UNAVAILABLE"


def test_corrupt_kv_is_prefilled_again_once():
    """
    A second corruption ends the request with the corruption itself.
    """
    again = KvCorrupt("block 1")

    assert judge(KvCorrupt("block 3")) is None
    assert judge(KvCorrupt("block 3"), PeerUnavailable("gone"), again) is again


def test_workers_without_room_cost_time_and_no_attempt():
    """
    In the end the caller hears RESOURCE_EXHAUSTED, not UNAVAILABLE: it should back off.
    """
    full = KvPoolExhausted(wanted_blocks=9, free_blocks=2)

    assert judge(*[full] * 30, refused_s=9.9) is None
    assert judge(*[full] * 30, PeerUnavailable("gone")) is None
    assert judge(full, refused_s=10.0) is full


def test_refusals_cost_time_from_the_first_of_them():
    """
    Whatever was lost in between; and everybody who took part is suspected from then on.
    """
    full = KvPoolExhausted(wanted_blocks=9, free_blocks=2)
    losses = Losses(PATIENCE)

    assert losses.add(full, {"d0"}, kv_dtype="fp8", now_s=100.0) is None
    gone = PeerUnavailable("gone")
    assert losses.add(gone, {"d1", "p0"}, kv_dtype="fp8", now_s=105.0) is None
    assert losses.suspects == {"d0", "d1", "p0"}
    assert losses.add(full, {"d0"}, kv_dtype="int8", now_s=110.0) is full
    assert losses.kv_dtype == "int8"
