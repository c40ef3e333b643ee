"""How fast a worker believes its links to be. No clock: instants are given."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.transfer.speeds import (
    MAX_LINKS,
    MEMORY_NUM_BYTES,
    MIN_NUM_BYTES,
    MIN_PULLS,
    LinkSpeeds,
)

MIB = 1 << 20


def seen(*pulls, forget_after_s=60.0, now_s=0.0):
    """After pulls of (holder, transport, bytes, seconds), one after the other."""
    speeds = LinkSpeeds(forget_after_s=forget_after_s)
    for holder_id, transport, num_bytes, elapsed_s in pulls:
        speeds.observe(holder_id, transport, num_bytes=num_bytes, elapsed_s=elapsed_s, now_s=now_s)
    return speeds


def figures(speeds, now_s=0.0):
    return {(s.holder_id, s.transport): s.bytes_per_s for s in speeds.speeds(now_s)}


def test_equal_pulls_are_their_bytes_over_their_seconds():
    """For their holder and their transport alone."""
    each = ("p0", "shm", 8 * MIB, 0.5), ("p0", "stream", MIB, 0.5), ("p1", "shm", MIB, 1.0)
    speeds = seen(*each * MIN_PULLS)

    assert figures(speeds) == pytest.approx(
        {("p0", "shm"): 16 * MIB, ("p0", "stream"): 2 * MIB, ("p1", "shm"): MIB}
    )


def test_nothing_is_said_of_a_link_before_enough_pulls():
    """The first ones open things; those by another transport or of another holder do not help."""
    pull = "p0", "shm", MIB, 1.0
    speeds = seen(*[pull] * (MIN_PULLS - 1), ("p0", "stream", MIB, 1.0), ("p1", "shm", MIB, 1.0))

    assert figures(speeds) == {}
    speeds.observe("p0", "shm", num_bytes=MIB, elapsed_s=1.0, now_s=0.0)
    assert figures(speeds) == pytest.approx({("p0", "shm"): MIB})


def test_pulls_that_say_nothing_do_not_make_enough():
    """Round trips, however many, are no evidence of bandwidth."""
    small, instant = ("p0", "shm", MIN_NUM_BYTES - 1, 1.0), ("p0", "shm", MIB, 0.0)
    pull = "p0", "shm", MIB, 1.0
    speeds = seen(*[pull] * (MIN_PULLS - 1), *[small, instant] * MIN_PULLS)

    assert figures(speeds) == {}


def test_larger_pulls_count_for_more():
    """A mean of speeds would let small slow pulls hide what a large fast one showed."""
    large, small = ("p0", "shm", 32 * MIB, 0.01), ("p0", "shm", MIN_NUM_BYTES, 0.001)
    speeds = seen(large, *[small] * (MIN_PULLS - 1))

    assert figures(speeds)["p0", "shm"] > 2000 * MIB


def test_small_pulls_say_nothing():
    """They are round trips; nor does one that took no time. What others showed stays as it was."""
    pull = "p0", "shm", MIB, 1.0
    small, instant = ("p0", "shm", MIN_NUM_BYTES - 1, 100.0), ("p0", "shm", MIB, 0.0)

    assert figures(seen(*[small, instant] * MIN_PULLS)) == {}
    enough = [pull] * MIN_PULLS
    assert figures(seen(*enough, small, instant)) == figures(seen(*enough))


def test_what_was_seen_before_weighs_half_after_so_many_bytes():
    """Eight seconds for these bytes, then four, two and one: each weighs one second by the end."""
    pulls = [("p0", "shm", MEMORY_NUM_BYTES, elapsed_s) for elapsed_s in (8.0, 4.0, 2.0, 1.0)]

    figure = figures(seen(*pulls))["p0", "shm"]

    assert figure == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 8) * MEMORY_NUM_BYTES / 4.0)


def test_a_link_that_got_slow_is_known_to_be_after_a_few_pulls():
    """Whatever it was before."""
    fast, slow = ("p0", "shm", MEMORY_NUM_BYTES, 0.01), ("p0", "shm", MEMORY_NUM_BYTES, 1.0)
    speeds = seen(*[fast] * 50, *[slow] * 5)

    assert figures(speeds)["p0", "shm"] == pytest.approx(MEMORY_NUM_BYTES, rel=0.05)


def test_a_figure_that_nobody_renews_is_forgotten():
    """So a transport given up for it gets another chance, and the old sums do not come back."""
    each = ("p0", "shm", MIB, 1.0), ("p1", "shm", MIB, 1.0)
    speeds = seen(*each * MIN_PULLS, forget_after_s=60.0)
    speeds.observe("p1", "shm", num_bytes=MIB, elapsed_s=1.0, now_s=30.0)

    assert figures(speeds, 59.9).keys() == {("p0", "shm"), ("p1", "shm")}
    assert figures(speeds, 60.0).keys() == {("p1", "shm")}
    for _ in range(MIN_PULLS):
        assert figures(speeds, 100.0) == {}
        speeds.observe("p1", "shm", num_bytes=8 * MIB, elapsed_s=1.0, now_s=100.0)
    assert figures(speeds, 100.0) == pytest.approx({("p1", "shm"): 8 * MIB})


def test_a_forgotten_link_needs_enough_pulls_again():
    """Also where nobody asked in between: the old ones do not count towards the new."""
    speeds = seen(*[("p0", "shm", MIB, 1.0)] * MIN_PULLS, forget_after_s=60.0)

    speeds.observe("p0", "shm", num_bytes=MIB, elapsed_s=1.0, now_s=60.0)

    assert figures(speeds, 60.0) == {}


def test_the_least_recently_used_links_are_forgotten_first():
    """The memory is bounded, however many workers come and go."""
    links = [(f"p{i}", "shm", MIB, 1.0) for i in range(MAX_LINKS)]
    speeds = seen(*links * MIN_PULLS)
    speeds.observe("p0", "shm", num_bytes=MIB, elapsed_s=1.0, now_s=0.0)
    for _ in range(MIN_PULLS):
        speeds.observe("new", "shm", num_bytes=MIB, elapsed_s=1.0, now_s=0.0)

    known = figures(speeds).keys()

    assert len(known) == MAX_LINKS
    assert ("p1", "shm") not in known
    assert {("p0", "shm"), ("new", "shm")} <= known


@given(
    st.lists(
        st.tuples(st.integers(MIN_NUM_BYTES, 1 << 32), st.floats(1e-6, 1e3)), min_size=MIN_PULLS
    )
)
def test_a_figure_is_never_outside_what_was_seen(pulls):
    """Finite and above 0, between the slowest and the fastest pull."""
    speeds = seen(*(("p0", "shm", num_bytes, elapsed_s) for num_bytes, elapsed_s in pulls))
    each = [num_bytes / elapsed_s for num_bytes, elapsed_s in pulls]

    figure = figures(speeds)["p0", "shm"]

    assert min(each) * (1 - 1e-9) <= figure <= max(each) * (1 + 1e-9)


def test_a_way_that_does_not_work_is_worth_nothing_until_that_is_forgotten():
    """At once, whatever was measured before; then it gets another chance."""
    links = LinkSpeeds(forget_after_s=60.0)
    for _ in range(MIN_PULLS):
        links.observe("p", "nixl", num_bytes=MIN_NUM_BYTES, elapsed_s=0.001, now_s=0.0)

    links.failed("p", "nixl", 1.0)

    (link,) = links.speeds(2.0)
    assert (link.holder_id, link.transport, link.bytes_per_s) == ("p", "nixl", 1.0)
    assert links.speeds(61.0) == ()
