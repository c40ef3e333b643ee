"""Admission at, below and above its bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.admission import Admission, AdmissionLimits
from kvrelay.errors import Draining, QueueFull


def admission(max_requests=2, max_tokens=100):
    return Admission(AdmissionLimits(max_requests=max_requests, max_tokens=max_tokens))


def take(room, name, num_tokens):
    """Admit and weigh, as one request does."""
    room.admit(name)
    try:
        room.weigh(name, num_tokens)
    except QueueFull:
        room.release(name)
        raise


def test_exactly_full_is_admitted_and_one_more_is_not():
    """
    The bound itself is allowed; the error says how many there are and the limit.
    """
    room = admission(max_requests=2)
    take(room, "a", 1)
    take(room, "b", 1)

    with pytest.raises(QueueFull) as refused:
        take(room, "c", 1)
    assert refused.value.details == {"what": "requests", "queued": "2", "limit": "2"}


def test_tokens_are_bounded_apart_from_requests():
    """
    Ten long prompts weigh more than a hundred short ones.
    """
    room = admission(max_requests=9, max_tokens=100)
    take(room, "a", 60)
    take(room, "b", 40)

    with pytest.raises(QueueFull) as refused:
        take(room, "c", 1)
    assert refused.value.details["what"] == "tokens"


def test_a_request_larger_than_the_token_bound_is_admitted_alone():
    """
    Bounds on single requests are elsewhere; an empty deployment serves what fits its context.
    """
    room = admission(max_tokens=100)
    take(room, "huge", 500)

    with pytest.raises(QueueFull):
        take(room, "small", 1)


def test_what_is_released_may_be_taken_again():
    """
    Room comes back whole.
    """
    room = admission(max_requests=1)
    take(room, "a", 70)
    room.release("a")
    take(room, "b", 100)

    assert (room.num_requests, room.num_tokens) == (1, 100)


def test_a_draining_coordinator_refuses_everything():
    """
    Nothing new is taken, however empty it is.
    """
    room = admission()
    room.drain()

    with pytest.raises(Draining):
        room.admit("a")


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 50)), max_size=60))
def test_the_bounds_hold_after_any_history(history):
    """
    Never more requests than the limit; never more tokens, unless one request alone is larger.
    """
    room, live = admission(max_requests=3, max_tokens=60), {}
    for is_admission, name, num_tokens in history:
        if is_admission and name not in live:
            try:
                take(room, str(name), num_tokens)
                live[name] = num_tokens
            except QueueFull:
                assert len(live) == 3 or sum(live.values()) + num_tokens > 60
        elif not is_admission and name in live:
            room.release(str(name))
            del live[name]

        assert room.num_requests == len(live) <= 3
        assert room.num_tokens == sum(live.values())
        assert room.num_tokens <= 60 or len(live) == 1
