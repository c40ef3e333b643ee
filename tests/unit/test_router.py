"""Where requests go, and why."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.prefix_map import PrefixMap
from coordinator.router import Disaggregate, Router, RouteRequest, RouteRules
from kvrelay.errors import InvalidRequest
from kvrelay.types import Role, TransportOffer, WorkerLoad
from tests.support.members import FINGERPRINT, LAYOUT, member

P, D = Role.PREFILL, Role.DECODE


def router(disaggregate=Disaggregate.ALWAYS, local=8, prefixes=None):
    rules = RouteRules(disaggregate=disaggregate, local_prefill_max_tokens=local)
    return Router(rules, prefixes or PrefixMap(max_blocks_per_worker=100))


def request(num_prompt=100, hashes=(), avoid=()):
    return RouteRequest(
        num_prompt=num_prompt,
        num_slots=num_prompt + 3,
        block_hashes=tuple(hashes),
        block_size=4,
        avoid=frozenset(avoid),
    )


def with_layout(**parts):
    layout = dataclasses.replace(LAYOUT, **parts)
    return dataclasses.replace(FINGERPRINT, layout=layout)


def measuring(decode, **bytes_per_s):
    """The same, having measured its stream from these holders."""
    decode.measured = {holder: {"stream": speed} for holder, speed in bytes_per_s.items()}
    return decode


KV_NUM_BYTES = 16
"""Of one token in the pool's layout."""


def names(placement):
    prefill = placement.prefill.worker_id if placement.prefill else None
    return prefill, placement.decode.worker_id


def test_the_least_work_ahead_and_the_fewest_sequences_win():
    """
    Prompts wait behind prompt tokens, sequences share steps with sequences.
    """
    pool = [
        member("p0", P, load=WorkerLoad(queued_prompt_tokens=500)),
        member("p1", P, load=WorkerLoad(queued_prompt_tokens=100)),
        member("d0", D, load=WorkerLoad(running_sequences=3)),
        member("d1", D, load=WorkerLoad(running_sequences=1)),
    ]

    assert names(router().place(request(), pool)) == ("p1", "d1")


def test_what_was_placed_since_the_last_heartbeat_counts():
    """
    A burst between two heartbeats spreads out.
    """
    pool = [member("p0", P, placed=(400,)), member("p1", P), member("d0", D)]

    assert names(router().place(request(), pool)) == ("p1", "d0")


def test_a_cached_prefix_outweighs_a_short_queue():
    """
    96 of 100 tokens cached leave less to do than an idle worker would have.
    """
    hashes = [bytes([i]) for i in range(24)]
    prefixes = PrefixMap(max_blocks_per_worker=100)
    prefixes.add("p0", hashes)
    pool = [
        member("p0", P, load=WorkerLoad(queued_prompt_tokens=50)),
        member("p1", P),
        member("d0", D),
    ]

    placement = router(prefixes=prefixes).place(request(100, hashes), pool)

    assert names(placement) == ("p0", "d0")
    assert placement.num_prefill_tokens == 4


def test_a_short_prompt_skips_the_handoff_in_auto():
    """
    The choice and its reason are recorded.
    """
    pool = [member("p0", P), member("d0", D)]
    auto = router(Disaggregate.AUTO, local=8)

    assert names(auto.place(request(8), pool)) == (None, "d0")
    assert auto.place(request(8), pool).reason == "local: 8 uncached tokens <= 8"
    assert names(auto.place(request(9), pool)) == ("p0", "d0")


def test_a_prompt_mostly_cached_where_it_decodes_skips_the_handoff_in_auto():
    """
    What counts is what would have to be computed.
    """
    hashes = [bytes([i]) for i in range(24)]
    prefixes = PrefixMap(max_blocks_per_worker=100)
    prefixes.add("d0", hashes)
    pool = [member("p0", P), member("d0", D)]

    placement = router(Disaggregate.AUTO, prefixes=prefixes).place(request(100, hashes), pool)

    assert names(placement) == (None, "d0")


def test_always_waits_for_a_prefill_worker_and_never_needs_none():
    """
    The operator's word holds also when a pool is empty.
    """
    only_decode = [member("d0", D)]

    assert router(Disaggregate.ALWAYS).place(request(), only_decode) is None
    assert names(router(Disaggregate.NEVER).place(request(), only_decode)) == (None, "d0")
    assert names(router(Disaggregate.AUTO).place(request(), only_decode)) == (None, "d0")


@pytest.mark.parametrize("drains", [False, True])
def test_a_request_that_no_worker_could_ever_hold_is_refused_with_the_sizes(drains):
    """
    64 blocks of 4 slots hold 256 tokens; who drains now would be as large when it is back.
    """
    pool = [member("p0", P), member("d0", D, load=WorkerLoad(is_draining=drains))]

    assert (router().place(request(253), pool) is None) == drains
    with pytest.raises(InvalidRequest, match=r"257 tokens.*decode worker holds 256"):
        router().place(request(254), pool)


def test_the_size_of_a_worker_is_told_by_its_own_blocks():
    """
    A request may have been cut into blocks before any worker had joined.
    """
    wide = dataclasses.replace(LAYOUT, block_size=64)
    fingerprint = dataclasses.replace(FINGERPRINT, layout=wide)
    pool = [member("p0", P, fingerprint=fingerprint), member("d0", D, fingerprint=fingerprint)]

    assert names(router().place(request(4000), pool)) == ("p0", "d0")


def test_a_cached_prefix_counts_in_whole_blocks_of_each_worker():
    """
    The pool's prefixes are told apart in blocks of 4; 23 of them are 5 whole blocks of 16.
    """
    hashes = [bytes([i]) for i in range(25)]
    prefixes = PrefixMap(max_blocks_per_worker=100)
    for name in ("p0", "p1"):
        prefixes.add(name, hashes[:23])
    pool = [member("d0", D), member("p0", P, fingerprint=with_layout(block_size=16))]
    route = router(prefixes=prefixes)

    assert route.place(request(100, hashes), pool).num_prefill_tokens == 20
    pool.append(member("p1", P))
    assert names(route.place(request(100, hashes), pool)) == ("p1", "d0")
    assert route.place(request(100, hashes), pool).num_prefill_tokens == 8


def test_a_request_goes_on_where_kv_is_kept_as_it_was_before():
    """
    Its tokens stay what they would have been; another kind serves only where there is none.
    """
    pool = [
        member("p0", P),
        member("d0", D, fingerprint=with_layout(dtype="int8")),
        member("d1", D, fingerprint=with_layout(dtype="bfloat16"),
               load=WorkerLoad(running_sequences=7)),
    ]  # fmt: skip
    route = router(Disaggregate.NEVER)

    def again(dtype, **kwargs):
        return names(route.place(dataclasses.replace(request(**kwargs), kv_dtype=dtype), pool))[1]

    assert again(None) == "d0"
    assert again("bfloat16") == "d1"
    assert again("fp8") == "d0"
    assert again("bfloat16", avoid=["d1"]) == "d0"


def test_a_prefill_worker_behind_a_slow_link_is_passed_over_for_an_idle_one():
    """
    100 tokens at 1000 per second take 0.1 s to compute, and 0.2 s to come from p0.
    """
    fast = WorkerLoad(prefill_tokens_per_s=1000.0)
    slow_link = 100 * KV_NUM_BYTES / 0.2
    pool = [
        member("p0", P, load=fast),
        member("p1", P, load=fast),
        measuring(member("d0", D), p0=slow_link, p1=1e9),
    ]

    placement = router().place(request(), pool)

    assert names(placement) == ("p1", "d0")
    assert placement.reason == "disaggregated: 100 uncached tokens, stream at 1.0 GB/s"


@pytest.mark.parametrize(("queued", "chosen"), [(90, "p1"), (110, "p0")])
def test_a_prefill_worker_behind_a_slow_link_is_chosen_when_that_saves_time(queued, chosen):
    """
    Through the slow link the KV is there after 0.2 s; behind a queue after 0.1 s and the queue.
    """
    slow_link = 100 * KV_NUM_BYTES / 0.2
    pool = [
        member("p0", P, load=WorkerLoad(prefill_tokens_per_s=1000.0)),
        member("p1", P, load=WorkerLoad(prefill_tokens_per_s=1000.0, queued_prompt_tokens=queued)),
        measuring(member("d0", D), p0=slow_link, p1=1e9),
    ]

    assert names(router().place(request(), pool)) == (chosen, "d0")


def test_what_is_cached_where_it_decodes_need_not_be_moved():
    """
    A slow link matters less then: 4 of 100 tokens come through it.
    """
    hashes = [bytes([i]) for i in range(24)]
    prefixes = PrefixMap(max_blocks_per_worker=100)
    prefixes.add("d0", hashes)
    pool = [
        member("p0", P, load=WorkerLoad(prefill_tokens_per_s=1000.0)),
        member("p1", P, load=WorkerLoad(prefill_tokens_per_s=1000.0, queued_prompt_tokens=1)),
        measuring(member("d0", D), p0=100 * KV_NUM_BYTES / 0.2, p1=1e9),
    ]

    assert names(router(prefixes=prefixes).place(request(100, hashes), pool)) == ("p0", "d0")


def test_among_equals_the_faster_link_wins():
    """
    Also where either is fast enough to be done when the prompt is.
    """
    pool = [member("p0", P), member("p1", P), measuring(member("d0", D), p0=2e9, p1=3e9)]

    assert names(router().place(request(), pool)) == ("p1", "d0")


def test_the_transport_is_the_fastest_by_what_was_measured_between_the_two():
    """
    And the reason says how fast, and whether that is only what it should be.
    """
    both = tuple(TransportOffer(name=n, address=n, host="h") for n in ("shm", "stream"))
    decode = member("d0", D, offers=both)
    pool = [member("p0", P, offers=both), decode]

    assert router().place(request(), pool).reason.endswith(", shm at 6.0 GB/s nominal")
    decode.measured = {"p0": {"shm": 0.9e9}}  # a busy moment
    assert router().place(request(), pool).reason.endswith(", shm at 900.0 MB/s")
    decode.measured = {"p0": {"shm": 0.4e9}}
    placement = router().place(request(), pool)
    assert placement.offer.name == "stream"
    assert placement.reason.endswith(", stream at 1.0 GB/s nominal")


def test_kv_that_takes_longer_to_move_than_to_compute_is_computed_in_auto():
    """
    Only where both were measured; `always` is always.
    """
    slow_link = 100 * KV_NUM_BYTES / 0.2
    decode = member("d0", D, load=WorkerLoad(prefill_tokens_per_s=1000.0))
    pool = [member("p0", P), measuring(decode, p0=slow_link)]
    auto = router(Disaggregate.AUTO)

    placement = auto.place(request(), pool)
    assert names(placement) == (None, "d0")
    assert placement.reason == (
        "local: 100 uncached tokens take 0.100 s to compute, 0.200 s to move by stream at 0.0 MB/s"
    )
    assert names(router(Disaggregate.ALWAYS).place(request(), pool)) == ("p0", "d0")
    decode.load = WorkerLoad()
    assert names(auto.place(request(), pool)) == ("p0", "d0")
    decode.load = WorkerLoad(prefill_tokens_per_s=1000.0)
    decode.measured = {}
    assert names(auto.place(request(), pool)) == ("p0", "d0")


def test_a_handoff_that_failed_is_not_tried_again_where_a_local_prefill_serves():
    """
    When the way between the two is broken, `auto` still serves; `always` can only try again.
    """
    pool = [member("p0", P), member("d0", D)]
    broken = request(100, avoid=["p0", "d0"])

    assert names(router(Disaggregate.AUTO).place(broken, pool)) == (None, "d0")
    assert names(router(Disaggregate.ALWAYS).place(broken, pool)) == ("p0", "d0")


def test_a_worker_that_cannot_be_told_gets_nothing():
    """
    It joined, and our session with it does not stand yet.
    """
    unlinked = member("d0", D)
    unlinked.is_linked = False

    assert router(Disaggregate.NEVER).place(request(), [unlinked]) is None


def test_a_decode_worker_that_can_pull_from_nobody_is_passed_over():
    """
    The two are chosen together: the emptiest decode worker is no use without a source.
    """
    near = (TransportOffer(name="shm", address="a", host="h1"),)
    far = (TransportOffer(name="shm", address="b", host="h2"),)
    pool = [
        member("p0", P, offers=near),
        member("d0", D, offers=far),
        member("d1", D, offers=near, load=WorkerLoad(running_sequences=5)),
    ]

    assert names(router().place(request(), pool)) == ("p0", "d1")


def test_a_worker_full_of_blocks_is_as_full_as_one_full_of_sequences():
    """
    One long sequence may weigh more than several short ones.
    """
    pool = [
        member("p0", P),
        member("d0", D, load=WorkerLoad(running_sequences=1, held_blocks=60)),
        member("d1", D, load=WorkerLoad(running_sequences=3, held_blocks=6)),
    ]

    assert names(router().place(request(), pool)) == ("p0", "d1")


def test_no_decode_worker_means_no_placement():
    """
    Every request is decoded somewhere.
    """
    assert router(Disaggregate.AUTO).place(request(), [member("p0", P)]) is None


def test_a_draining_worker_gets_nothing_new():
    """
    It finishes what it has.
    """
    pool = [
        member("p0", P),
        member("d0", D, load=WorkerLoad(is_draining=True)),
        member("d1", D, load=WorkerLoad(running_sequences=7)),
    ]

    assert names(router().place(request(), pool)) == ("p0", "d1")


def test_workers_that_lost_this_request_are_taken_only_if_there_is_no_other():
    """
    A second try goes elsewhere first.
    """
    pool = [member("p0", P), member("d0", D), member("d1", D, load=WorkerLoad(running_sequences=9))]

    assert names(router().place(request(avoid=["d0", "p0"]), pool)) == ("p0", "d1")


def test_a_pair_without_a_common_transport_is_not_made():
    """
    Shared memory does not reach another host.
    """
    near = (TransportOffer(name="shm", address="a", host="h1"),)
    far = (TransportOffer(name="shm", address="b", host="h2"),)
    pool = [member("p0", P, offers=near), member("d0", D, offers=far)]

    assert router(Disaggregate.ALWAYS).place(request(), pool) is None
    assert names(router(Disaggregate.AUTO).place(request(), pool)) == (None, "d0")


def test_the_prefix_map_forgets_the_least_recently_used():
    """
    Its memory is bounded per worker.
    """
    prefixes = PrefixMap(max_blocks_per_worker=2)
    prefixes.add("d0", [b"a", b"b"])
    prefixes.add("d0", [b"a", b"c"])

    assert prefixes.match("d0", [b"a", b"b"]) == 1
    assert prefixes.match("d0", [b"a", b"c"]) == 2


WORKERS = st.lists(
    st.tuples(st.sampled_from([P, D]), st.integers(0, 9), st.integers(0, 900), st.booleans()),
    max_size=8,
)


@given(WORKERS, st.sampled_from(Disaggregate), st.integers(1, 50))
def test_a_placement_is_always_one_that_can_serve(workers, disaggregate, num_prompt):
    """
    Right roles, nobody draining, handoff exactly when a prefill worker is named.
    """
    pool = [
        member(
            f"w{i}",
            role,
            load=WorkerLoad(
                running_sequences=running, queued_prompt_tokens=tokens, is_draining=drains
            ),
        )
        for i, (role, running, tokens, drains) in enumerate(workers)
    ]

    placement = router(disaggregate).place(request(num_prompt), pool)

    able = {m.identity.role for m in pool if m.takes_work}
    if placement is None:
        assert D not in able or (disaggregate is Disaggregate.ALWAYS and P not in able)
        return
    assert placement.decode.identity.role is D
    assert placement.decode.takes_work
    assert (placement.prefill is None) == (placement.offer is None)
    if placement.prefill is not None:
        assert disaggregate is not Disaggregate.NEVER
        assert placement.prefill.identity.role is P
        assert placement.prefill.takes_work
