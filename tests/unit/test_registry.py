"""Membership by heartbeat and epoch. No clock and no randomness: instants and keys are given."""

import dataclasses

import pytest

from coordinator.registry import Registry
from kvrelay.errors import Incompatible
from kvrelay.types import LinkSpeed, Role, WorkerLoad
from tests.support.members import FINGERPRINT, LAYOUT, identity

E0, E1 = "00000000000000e0", "00000000000000e1"


KEY = b"k" * 32


def registry():
    return Registry(model_digest="m", suspect_after_s=3.0)


def serving(**layout):
    """A fingerprint of the pool's, but for these parts of its layout."""
    changed = dataclasses.replace(LAYOUT, **layout)
    return dataclasses.replace(FINGERPRINT, layout=changed)


def with_kv(dtype, numerics="scripted"):
    changed = dataclasses.replace(LAYOUT, dtype=dtype)
    return dataclasses.replace(FINGERPRINT, layout=changed, numerics=numerics)


def test_a_worker_of_another_model_is_refused_with_the_difference():
    """
    The coordinator tokenizes for one model; a worker of another would answer nonsense.
    """
    other = dataclasses.replace(FINGERPRINT, model_digest="other")

    with pytest.raises(Incompatible) as refused:
        registry().join(identity("d0", fingerprint=other), 0.0, ticket_key=KEY)
    assert refused.value.details == {"model_digest": "other != m"}


def test_a_worker_of_another_version_is_refused_even_by_an_empty_pool():
    """
    The coordinator itself speaks with it.
    """
    other = dataclasses.replace(FINGERPRINT, protocol_version=1)

    with pytest.raises(Incompatible) as refused:
        registry().join(identity("d0", fingerprint=other), 0.0, ticket_key=KEY)
    assert refused.value.details == {"protocol_version": "1 != 2"}


@pytest.mark.parametrize("part", ["num_layers", "num_kv_heads", "head_dim"])
def test_a_worker_that_could_not_share_kv_with_the_others_is_refused(part):
    """
    With what differs: KV of the two could not be exchanged in any form.
    """
    pool = registry()
    pool.join(identity("d0"), 0.0, ticket_key=KEY)

    with pytest.raises(Incompatible) as refused:
        pool.join(
            identity("p0", Role.PREFILL, fingerprint=serving(**{part: 8})), 0.0, ticket_key=KEY
        )
    assert set(refused.value.details) == {part}


def test_members_may_differ_in_block_size_and_the_smallest_is_the_pools():
    """
    Larger blocks are cut into these where prefixes are told apart.
    """
    pool = registry()
    assert pool.block_size is None
    for name, block_size in (("d0", 32), ("d1", 8), ("d2", 64)):
        pool.join(identity(name, fingerprint=serving(block_size=block_size)), 0.0, ticket_key=KEY)

    assert pool.block_size == 8
    assert [m.num_slots for m in pool] == [64 * 32, 64 * 8, 64 * 64]


def test_members_may_differ_in_kv_dtype_whatever_that_does_to_their_numerics():
    """
    What is computed alike differs in name by how KV is kept, and by the bits that come of it.
    """
    pool = registry()
    names = {
        "bfloat16": "native-own-v1-0a1b2c3d",
        "int8": "native-own-v1-kv-int8-33333333",
        "fp8": "native-own-v1-kv-fp8-44444444",
    }
    for dtype, numerics in names.items():
        pool.join(identity(dtype, fingerprint=with_kv(dtype, numerics)), 0.0, ticket_key=KEY)

    assert pool.kv_dtypes == set(names)


@pytest.mark.parametrize(
    ("dtype", "numerics", "differs"),
    [
        ("bfloat16", "native-own-v1-11111111", {"numerics"}),
        ("int8", "native-int8-v1-kv-int8-0a1b2c3d", {"numerics"}),
        ("int8", "native-own-v2-kv-int8-0a1b2c3d", {"numerics"}),
        ("float32", "native-own-v1-0a1b2c3d", {"dtype"}),
    ],
)
def test_members_may_not_differ_in_how_they_compute_nor_mix_float32_with_others(
    dtype, numerics, differs
):
    """
    Machines that round differently, other weights, another version; float32 is for checking.
    """
    pool = registry()
    first = with_kv("bfloat16", "native-own-v1-0a1b2c3d")
    pool.join(identity("d0", fingerprint=first), 0.0, ticket_key=KEY)

    with pytest.raises(Incompatible) as refused:
        pool.join(identity("d1", fingerprint=with_kv(dtype, numerics)), 0.0, ticket_key=KEY)
    assert set(refused.value.details) == differs


def test_who_differs_from_any_member_is_refused_though_others_would_do():
    """
    Two that could share with a third might not with each other.
    """
    pool = registry()
    between = with_kv("int8", "native-own-v1-kv-int8-33333333")
    pool.join(identity("a", fingerprint=between), 0.0, ticket_key=KEY)
    one, other = (with_kv("bfloat16", f"native-own-v1-{i}{i}{i}{i}{i}{i}{i}{i}") for i in (1, 2))
    pool.join(identity("b", fingerprint=one), 0.0, ticket_key=KEY)

    with pytest.raises(Incompatible):
        pool.join(identity("c", fingerprint=other), 0.0, ticket_key=KEY)


def test_the_last_member_may_come_back_as_another():
    """
    Compatibility is with the others, so a whole pool can be replaced one by one from empty.
    """
    pool = registry()
    pool.join(identity("d0"), 0.0, ticket_key=KEY)

    _, replaced = pool.join(
        identity("d0", epoch=E1, fingerprint=serving(num_layers=8)), 1.0, ticket_key=KEY
    )

    assert replaced is not None
    assert replaced.identity.epoch == E0


def test_a_ticket_key_is_never_shown():
    """
    Not where a member is printed or logged.
    """
    member, _ = registry().join(identity("p0", Role.PREFILL), 0.0, ticket_key=KEY)

    assert member.ticket_key == KEY
    assert "kkk" not in repr(member)


def test_a_member_takes_work_once_it_is_linked_and_was_heard():
    """
    What it says first comes after its welcome, which brought the key of its tickets.
    """
    pool = registry()
    d0, _ = pool.join(identity("d0"), 0.0, ticket_key=KEY)
    d0.is_linked = True
    assert not d0.takes_work

    pool.heard(d0, WorkerLoad(), 1.0)
    assert d0.takes_work


def test_what_a_member_measured_last_counts():
    """
    By holder and transport; what it says no more is no more.
    """
    pool = registry()
    p0, _ = pool.join(identity("p0", Role.PREFILL), 0.0, ticket_key=KEY)
    d0, _ = pool.join(identity("d0"), 0.0, ticket_key=KEY)
    shm = LinkSpeed(holder_id="p0", transport="shm", bytes_per_s=2e9)
    stream = LinkSpeed(holder_id="p0", transport="stream", bytes_per_s=1e9)
    other = LinkSpeed(holder_id="p1", transport="shm", bytes_per_s=3e9)
    assert d0.measured_from(p0) == {}

    pool.heard(d0, WorkerLoad(links=(shm, stream, other)), 1.0)
    assert d0.measured_from(p0) == {"shm": 2e9, "stream": 1e9}
    assert p0.measured_from(d0) == {}

    pool.heard(d0, WorkerLoad(links=(other,)), 2.0)
    assert d0.measured_from(p0) == {}


@pytest.mark.parametrize("epoch", [E0, E1])
def test_who_joins_again_is_a_new_member_and_the_old_one_is_none(epoch):
    """
    In the same epoch too: a worker may come back before its old stream is known to be gone.
    """
    pool = registry()
    old, _ = pool.join(identity("d0"), 0.0, ticket_key=KEY)
    new, replaced = pool.join(identity("d0", epoch=epoch), 1.0, ticket_key=KEY)

    assert replaced is old
    assert old not in pool
    assert not pool.leave(old)
    assert list(pool) == [new]
    assert pool.leave(new)


def test_silence_is_suspected_exactly_at_its_time():
    """
    A heartbeat renews the lease; the time of the next suspicion is known in advance.
    """
    pool = registry()
    d0, _ = pool.join(identity("d0"), 0.0, ticket_key=KEY)
    pool.join(identity("d1"), 0.0, ticket_key=KEY)
    pool.heard(d0, WorkerLoad(), 2.0)

    assert pool.next_suspicion_s() == 3.0
    assert pool.silent(2.9) == []
    assert [m.worker_id for m in pool.silent(3.0)] == ["d1"]


def test_an_empty_pool_suspects_nobody():
    """
    There is nothing to wait for.
    """
    assert registry().next_suspicion_s() is None


def test_members_are_listed_prefill_first_then_by_name():
    """
    The order people and dashboards see does not depend on who joined when.
    """
    pool = registry()
    for name, role in (("d1", Role.DECODE), ("p0", Role.PREFILL), ("d0", Role.DECODE)):
        pool.join(identity(name, role), 0.0, ticket_key=KEY)

    assert [m.worker_id for m in pool] == ["p0", "d0", "d1"]
