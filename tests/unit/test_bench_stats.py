"""What many requests amount to."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.bench.base import Handoff, Record
from kvrelay.bench.stats import Targets, percentile, summarize, total

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)

times = st.floats(0, 1e6, allow_subnormal=False)


def record(*token_at_s, scheduled_s=0.0, ended_s=None, **given):
    """A request whose tokens came at these times."""
    fields = {
        "index": 0,
        "scheduled_s": scheduled_s,
        "sent_s": scheduled_s,
        "ended_s": ended_s if ended_s is not None else (token_at_s or (scheduled_s,))[-1],
        "prompt_tokens": 10,
        "max_tokens": len(token_at_s),
        "token_at_s": token_at_s,
        "output_tokens": len(token_at_s),
    }
    return Record(**(fields | given))


def test_a_request_is_measured_as_its_caller_saw_it():
    """From when it was due; a stall is a gap after the second token."""
    r = record(2.0, 5.0, 5.1, 5.1, 5.6, scheduled_s=1.5, ended_s=5.7, sent_s=1.6)

    assert r.ttft_s == 0.5
    assert r.lag_s == pytest.approx(0.1)
    assert r.gap1_s == 3.0
    assert r.gaps_s == pytest.approx([3.0, 0.1, 0.0, 0.5])
    assert r.max_stall_s == pytest.approx(0.5)
    assert r.tpot_s == pytest.approx(3.6 / 4)
    assert r.e2e_s == pytest.approx(4.2)


def test_short_outputs_leave_open_what_they_cannot_show():
    """One token has no gap, two have no stall, none has no first."""
    none, one, two = record(), record(1.0), record(1.0, 2.0)

    assert (none.ttft_s, none.tpot_s, none.gaps_s) == (None, None, [])
    assert (one.ttft_s, one.gap1_s, one.tpot_s) == (1.0, None, None)
    assert (two.gap1_s, two.tpot_s, two.max_stall_s) == (1.0, 1.0, None)


def test_a_handoff_is_told_as_time_as_a_share_of_ttft_and_in_steps():
    """A decode step is as long as the request's tokens took on average."""
    handed = Handoff(tax_s=0.05, stages={}, transport="shm", num_bytes=8, overlapped_num_bytes=6)
    r = record(1.0, 1.2, 1.3, handoff=handed)

    assert (r.handoff_tax_s, r.handoff_tax_of_ttft) == (0.05, 0.05)
    assert r.handoff_tax_steps == pytest.approx(0.05 / 0.15)
    local = record(1.0, 1.2)
    assert (local.handoff_tax_s, local.handoff_tax_of_ttft, local.handoff_tax_steps) == (None,) * 3


def test_handoffs_are_summed_up_by_what_moved_them():
    """With the share of the bytes that cost the caller nothing, and where the rest of it went."""
    handed = [
        Handoff(
            tax_s=0.1,
            stages={"pull_wait": 0.01 * i, "transfer": 0.02},
            transport="shm" if i else "stream",
            num_bytes=100,
            overlapped_num_bytes=30 * i,
        )
        for i in range(3)
    ]
    records = [record(1.0, 2.0, 3.0, handoff=h) for h in handed]
    found = total([*records, record(1.0)], TARGETS, is_open_loop=False).handoffs

    assert found.by_transport == {"shm": 2, "stream": 1}
    assert (found.num_bytes, found.overlapped_share) == (300, 0.3)
    assert {name: s.p50 for name, s in found.stages.items()} == {
        "pull_wait": 0.01,
        "transfer": 0.02,
    }
    assert total([record(1.0)], TARGETS, is_open_loop=False).handoffs is None


def test_tpot_counts_the_tokens_that_the_server_counted():
    """A piece of text over HTTP may be of several tokens."""
    assert record(1.0, 2.0, 3.0, output_tokens=5).tpot_s == 0.5


def test_percentiles_are_of_the_nearest_rank():
    """Values that were measured."""
    hundred = [float(n) for n in range(1, 101)]

    assert [percentile(hundred, p) for p in (0.07, 0.5, 0.9, 0.99, 1.0)] == [7, 50, 90, 99, 100]
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0
    assert percentile([1.0, 2.0], 0.99) == 2.0


@given(st.lists(times, min_size=1), st.floats(0.001, 1))
def test_a_percentile_leaves_no_more_above_it_than_it_says(values, share):
    """And it is the smallest value of which that is true."""
    values.sort()
    found = percentile(values, share)

    assert found in values
    assert sum(v <= found for v in values) >= math.floor(share * len(values))
    assert sum(v < found for v in values) < share * len(values)


@given(st.lists(times | st.none()))
def test_a_summary_grows_from_p50_to_max(values):
    """Values that are missing do not count; of none there is no summary."""
    known = [v for v in values if v is not None]
    found = summarize(values)
    if found is None:
        assert not known
        return

    assert found.count == len(known)
    assert found.p50 <= found.p90 <= found.p99 <= found.max == max(known)


@pytest.mark.parametrize(
    ("request_", "is_good"),
    [
        (record(1.0, 1.1, 1.2), True),
        (record(1.01, 1.1), False),
        (record(0.5, 0.61), False),
        (record(0.5), True),
        (record(), False),
        (record(0.5, 0.6, error="DATA_LOSS"), False),
        (record(10.5, scheduled_s=10.0), True),
    ],
)
def test_good_is_what_finished_within_both_targets(request_, is_good):
    """A single token has no TPOT to miss."""
    assert TARGETS.are_met_by(request_) is is_good


def test_a_run_is_summed_over_its_wall_time():
    """From the first request due to the last one ended."""
    records = [
        record(1.5, 1.55, scheduled_s=1.0, ended_s=2.0, cached_prompt_tokens=5),
        record(4.5, 4.6, scheduled_s=2.0, ended_s=5.0, cached_prompt_tokens=0),
        record(scheduled_s=3.0, error="QUEUE_FULL"),
        record(3.5, scheduled_s=3.0, error="QUEUE_FULL"),
        record(scheduled_s=4.0, error="DATA_LOSS"),
    ]
    found = total(records, TARGETS, is_open_loop=True)

    assert found.wall_s == 4.0
    assert (found.num_requests, found.num_finished, found.num_good) == (5, 2, 1)
    assert found.errors == {"QUEUE_FULL": 2, "DATA_LOSS": 1}
    assert found.output_tokens_per_s == 1.0
    assert found.prompt_tokens_per_s == 5.0
    assert found.cached_share == 0.25
    assert found.goodput_per_s == 0.25
    assert found.attainment == 0.2
    assert found.offered_per_s == pytest.approx(4 / 3)
    assert found.measures["ttft_s"].count == 2
    assert found.measures["itl_s"].count == 2
    assert found.measures["lag_s"].count == 5


def test_a_run_of_failures_has_no_latencies():
    """Only its errors, and an attainment of nothing."""
    found = total([record(error="X")], TARGETS, is_open_loop=False)

    assert (found.num_finished, found.attainment, found.goodput_per_s) == (0, 0.0, 0.0)
    assert set(found.measures.values()) == {None}
    assert (found.cached_share, found.offered_per_s) == (None, None)


def test_an_answer_shorter_than_asked_for_is_noticed():
    """The work was less than it seems."""
    records = [record(1.0, max_tokens=2), record(1.0, 2.0)]

    assert total(records, TARGETS, is_open_loop=False).num_short == 1
