"""The table of a request's life, checked whole."""

import pytest

from coordinator.lifecycle import FINAL, TRANSITIONS, Event, Phase, advance, verdict
from kvrelay.errors import (
    HandoffLost,
    Incompatible,
    KvCorrupt,
    KvPoolExhausted,
    NoWorker,
    PeerUnavailable,
)


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


def test_a_lost_worker_is_tried_again_until_the_attempts_are_spent():
    """
    The error of the last attempt is named, and the number of attempts.
    """
    losses = [PeerUnavailable("d0 ended"), HandoffLost("lapsed"), PeerUnavailable("d1 ended")]

    assert verdict(losses[:2], max_attempts=3) is None
    error = verdict(losses, max_attempts=3)
    assert isinstance(error, NoWorker)
    assert error.details["attempts"] == "3"
    assert error.details["last_reason"] == "PEER_UNAVAILABLE"


def test_corrupt_kv_is_prefilled_again_once():
    """
    A second corruption ends the request with the corruption itself.
    """
    once = [KvCorrupt("block 3")]
    twice = [KvCorrupt("block 3"), PeerUnavailable("gone"), KvCorrupt("block 1")]

    assert verdict(once, max_attempts=9) is None
    assert verdict(twice, max_attempts=9) is twice[-1]


def test_what_cannot_succeed_elsewhere_is_not_tried_again():
    """
    An error that is not retryable ends the request at once, as itself.
    """
    error = Incompatible("layout")

    assert verdict([error], max_attempts=9) is error
    assert verdict([KvPoolExhausted(wanted_blocks=9, free_blocks=2)], max_attempts=9) is None
