"""How cores are shared out: everybody gets some, and together they get them all."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.engine.cores import ThreadChoice, fixed_threads, threads_for, usable_cores


def threads(num_cores, before, after, *, limit=0):
    return threads_for(num_cores=num_cores, limit=limit, busy_before=before, busy_after=after)


@pytest.mark.parametrize(
    ("num_cores", "before", "after", "wanted"),
    [(2, 0, 0, 2), (2, 0, 1, 1), (2, 1, 0, 1), (3, 0, 1, 2), (3, 1, 0, 1), (1, 0, 0, 1)],
)
def test_two_workers_share_and_one_alone_has_all(num_cores, before, after, wanted):
    """Spare cores go to the worker that stands first."""
    assert threads(num_cores, before, after) == wanted


@given(num_cores=st.integers(1, 64), num_busy=st.integers(1, 128))
def test_busy_workers_use_each_core_once(num_cores, num_busy):
    """Their shares add up to the cores, or to one each where there are too few."""
    shares = [threads(num_cores, i, num_busy - 1 - i) for i in range(num_busy)]

    assert sum(shares) == max(num_cores, num_busy)
    assert max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@given(num_cores=st.integers(1, 64), before=st.integers(0, 8), limit=st.integers(1, 8))
def test_a_limit_is_never_exceeded(num_cores, before, limit):
    """Nor is a worker ever left without a thread."""
    assert 1 <= threads(num_cores, before, 0, limit=limit) <= limit


@pytest.mark.parametrize(
    ("num_allowed", "quotas", "wanted"),
    [(8, [], 8), (8, [2.0], 2), (8, [3.7, 12.0], 3), (8, [0.5], 1), (1, [4.0], 1)],
)
def test_a_quota_counts_in_whole_cores(num_allowed, quotas, wanted):
    """The least of all limits, rounded down, but never none."""
    assert usable_cores(num_allowed, quotas) == wanted


def test_who_cannot_change_leaves_room_for_one_more():
    """Half of the cores, unless the number was chosen."""
    assert fixed_threads(num_cores=8, limit=0) == 4
    assert fixed_threads(num_cores=1, limit=0) == 1
    assert fixed_threads(num_cores=8, limit=6) == 6


def run(choice, num_steps, cost_s, *, num_rows=1, most=4):
    """The numbers chosen for steps that take `cost_s(num_threads)`."""
    chosen = []
    for _ in range(num_steps):
        chosen.append(choice.choose(num_rows, most=most))
        choice.learn(num_rows, num_threads=chosen[-1], elapsed_s=cost_s(chosen[-1]))
    return chosen


@pytest.mark.parametrize("best", [1, 2, 3])
def test_steps_settle_on_the_threads_that_pay(best):
    """Each number is tried once, and again now and then; all other steps take the fastest."""
    chosen = run(ThreadChoice(), 640, lambda n: 0.003 + 0.001 * abs(n - best), most=3)

    assert chosen[:3] == [3, 2, 1]
    assert chosen.count(best) > 620
    assert {1, 2, 3} <= set(chosen[64:])


def test_what_pays_may_change():
    """A neighbour takes a core for a while, then leaves it."""
    choice = ThreadChoice()
    assert run(choice, 64, lambda n: 0.004 / n, most=2)[-2] == 2
    assert run(choice, 64, lambda n: 0.004 * n, most=2)[-2] == 1
    assert run(choice, 256, lambda n: 0.004 / n, most=2)[-2] == 2


def test_a_trial_that_was_late_by_chance_is_soon_forgotten():
    """However late, and though it was the first of its number."""
    choice = ThreadChoice()
    choice.learn(1, num_threads=choice.choose(1, most=2), elapsed_s=1.0)

    assert run(choice, 100, lambda n: 0.004 / n, most=2)[-1] == 2


def test_a_late_step_does_not_change_the_choice():
    """Somebody else had the core for a moment; the next step is as fast as ever."""
    choice = ThreadChoice()
    run(choice, 32, lambda n: 0.004 / n, most=2)
    choice.learn(1, num_threads=choice.choose(1, most=2), elapsed_s=1.0)

    assert choice.choose(1, most=2) == 2


def test_sizes_of_steps_are_learned_apart():
    """One row may want one thread where many want all."""
    choice = ThreadChoice()
    run(choice, 32, lambda n: 0.003 * n, num_rows=1)
    run(choice, 32, lambda n: 0.016 / n, num_rows=16)

    assert (choice.choose(1, most=4), choice.choose(16, most=4)) == (1, 4)


@given(num_rows=st.integers(0, 64), most=st.integers(1, 9), cost_s=st.floats(0, 1))
def test_no_choice_is_beyond_the_share(num_rows, most, cost_s):
    """Whatever was learned when the share was larger."""
    choice = ThreadChoice()
    run(choice, 8, lambda n: cost_s / n, num_rows=num_rows, most=9)

    assert all(1 <= n <= most for n in run(choice, 8, lambda n: cost_s / n, most=most))
