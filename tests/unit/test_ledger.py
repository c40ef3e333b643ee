"""The stages of a ledger add up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.obs.ledger import LedgerBuilder

GAP1 = ("grant_wait", "transfer", "verify", "release", "join", "first_step")

durations = st.floats(0, 100, allow_subnormal=False)


def builder(arrived_at_s=0.0, **given):
    return LedgerBuilder(request_id="r", arrived_at_s=arrived_at_s, **given)


@st.composite
def ended_requests(draw):
    """A builder after any history, in the order in which a coordinator reports it."""
    now_s = draw(durations)
    b = builder(arrived_at_s=now_s)
    b.tokenized_at_s = now_s = now_s + draw(durations)
    for attempt in range(draw(st.integers(1, 4))):
        if attempt:
            b.lost("PEER_UNAVAILABLE")
        now_s += draw(durations)
        b.dispatched(now_s)
        for num_tokens in draw(st.lists(st.integers(1, 5), max_size=3)):
            now_s += draw(durations)
            b.tokens(now_s, num_tokens)
    b.queue_s, b.prefill_s = draw(durations), draw(durations)
    if draw(st.booleans()):
        b.gap1_stages = {name: draw(durations) for name in GAP1}
    return b, now_s + draw(durations)


@given(ended_requests())
def test_stages_sum_to_the_totals_and_none_is_negative(ended):
    """Nothing hides between the stages, whatever the workers' clocks say."""
    b, now_s = ended
    ledger = b.build("stop", now_s)

    assert all(v >= 0 for v in (*ledger.ttft_stages.values(), *ledger.gap1_stages.values()))
    if ledger.ttft_stages:
        assert sum(ledger.ttft_stages.values()) == pytest.approx(ledger.ttft_s)
    if ledger.gap1_stages:
        assert sum(ledger.gap1_stages.values()) == pytest.approx(ledger.gap1_s)
    assert bool(ledger.ttft_stages) == (ledger.completion_tokens > 0)
    assert ledger.attempts == len(ledger.lost_attempts) + 1


@given(ended_requests())
def test_every_total_is_within_the_whole(ended):
    """The first token, the gap after it and the rest do not exceed arrival to end."""
    b, now_s = ended
    ledger = b.build("stop", now_s)

    assert ledger.ttft_s + ledger.gap1_s <= ledger.e2e_s + 1e-9
    assert ledger.tpot_s * max(0, ledger.completion_tokens - 1) <= ledger.e2e_s + 1e-9


def test_a_handed_over_request_is_explained_stage_by_stage():
    """What the workers did not measure is the way of the first token and the wait to pull."""
    b = builder(arrived_at_s=10.0, tokenized_at_s=10.1)
    b.dispatched(10.3)
    b.queue_s, b.prefill_s = 0.2, 0.3
    b.tokens(10.9, 1)
    b.gap1_stages = {
        "grant_wait": 0.01,
        "transfer": 0.1,
        "verify": 0.05,
        "join": 0.02,
        "first_step": 0.1,
    }
    b.tokens(11.2, 1)
    b.tokens(11.3, 1)
    ledger = b.build("length", 11.4)

    assert ledger.ttft_stages == pytest.approx(
        {"tokenize": 0.1, "admit": 0.2, "queue": 0.2, "prefill": 0.3, "first_token_return": 0.1}
    )
    assert ledger.gap1_stages == pytest.approx(
        {"pull_wait": 0.02, "grant_wait": 0.01, "transfer": 0.1, "verify": 0.05}
        | {"release": 0.0, "join": 0.02, "first_step": 0.1}
    )
    assert (ledger.ttft_s, ledger.gap1_s, ledger.e2e_s) == pytest.approx((0.9, 0.3, 1.4))
    assert ledger.tpot_s == pytest.approx(0.2)
    assert ledger.handoff_tax_s == pytest.approx(0.1)


def test_an_attempt_lost_before_the_first_token_is_a_stage_of_ttft():
    """From the first dispatch to that of the attempt that gave the token."""
    b = builder()
    b.dispatched(0.0)
    b.lost("PEER_UNAVAILABLE")
    b.dispatched(2.0)
    b.tokens(3.0, 1)
    ledger = b.build("stop", 3.0)

    assert ledger.ttft_stages["lost_attempts"] == 2.0
    assert ledger.ttft_stages["first_token_return"] == 1.0


def test_an_attempt_lost_after_the_first_token_is_no_stage_of_ttft():
    """It cost the caller a later token; the first was already there."""
    b = builder()
    b.dispatched(1.0)
    b.tokens(2.0, 1)
    b.lost("HANDOFF_LOST")
    b.dispatched(7.0)
    b.tokens(8.0, 1)
    ledger = b.build("stop", 8.0)

    assert "lost_attempts" not in ledger.ttft_stages
    assert ledger.ttft_stages["admit"] == 1.0
    assert ledger.ttft_stages["first_token_return"] == 1.0
    assert (ledger.attempts, ledger.lost_attempts) == (2, ("HANDOFF_LOST",))


def test_a_move_is_no_lost_attempt_and_its_gap_is_kept():
    """Up to the first token of the worker that took over, whatever came before it was told."""
    b = builder()
    b.dispatched(0.0)
    b.tokens(1.0, 4)
    b.moved()
    b.tokens(1.25, 2)
    b.tokens(2.0, 1)
    b.moved()
    b.tokens(2.5, 1)
    ledger = b.build("stop", 3.0)

    assert ledger.move_gaps_s == (0.25, 0.5)
    assert (ledger.attempts, ledger.lost_attempts) == (1, ())


def test_a_move_to_a_worker_that_is_lost_at_once_is_a_lost_attempt():
    """Its first token comes by another placement, and that wait is no gap of a move."""
    b = builder()
    b.dispatched(0.0)
    b.tokens(1.0, 1)
    b.moved()
    b.lost("PEER_UNAVAILABLE")
    b.dispatched(2.0)
    b.tokens(3.0, 1)
    ledger = b.build("stop", 3.0)

    assert (ledger.attempts, ledger.move_gaps_s) == (2, ())


def test_a_request_without_a_token_has_totals_but_no_stages():
    """It failed before there was anything to explain."""
    b = builder()
    b.dispatched(1.0)
    ledger = b.build("NO_WORKER", 5.0)

    assert (ledger.ttft_s, ledger.ttft_stages, ledger.gap1_stages) == (0.0, {}, {})
    assert (ledger.e2e_s, ledger.handoff_tax_s, ledger.outcome) == (5.0, None, "NO_WORKER")


def test_a_request_that_was_not_handed_over_has_a_gap_but_no_tax():
    """The same worker went on; there was nothing to pay."""
    b = builder()
    b.dispatched(0.0)
    for now_s in (1.0, 2.0, 3.0):
        b.tokens(now_s, 1)
    ledger = b.build("stop", 3.0)

    assert (ledger.gap1_s, ledger.gap1_stages, ledger.handoff_tax_s) == (1.0, {}, None)
