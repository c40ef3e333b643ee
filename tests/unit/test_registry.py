"""Membership by heartbeat and epoch. No clock: instants are given."""

import dataclasses

import pytest

from coordinator.registry import Registry
from kvrelay.errors import Incompatible
from kvrelay.types import Role, WorkerLoad
from tests.support.members import FINGERPRINT, LAYOUT, identity

E0, E1 = "00000000000000e0", "00000000000000e1"


def registry():
    return Registry(model_digest="m", suspect_after_s=3.0)


def test_a_worker_of_another_model_is_refused_with_the_difference():
    """
    The coordinator tokenizes for one model; a worker of another would answer nonsense.
    """
    other = dataclasses.replace(FINGERPRINT, model_digest="other")

    with pytest.raises(Incompatible) as refused:
        registry().join(identity("d0", fingerprint=other), 0.0)
    assert refused.value.details == {"model_digest": "other != m"}


def test_a_worker_that_could_not_finish_what_others_began_is_refused():
    """
    Block size is part of the layout: KV of the two could not be exchanged.
    """
    pool = registry()
    pool.join(identity("d0"), 0.0)
    other = dataclasses.replace(FINGERPRINT, layout=dataclasses.replace(LAYOUT, block_size=8))

    with pytest.raises(Incompatible) as refused:
        pool.join(identity("p0", Role.PREFILL, fingerprint=other), 0.0)
    assert set(refused.value.details) == {"layout"}


def test_the_last_member_may_come_back_with_another_layout():
    """
    Compatibility is with the others, so a whole pool can be replaced one by one from empty.
    """
    pool = registry()
    pool.join(identity("d0"), 0.0)
    other = dataclasses.replace(FINGERPRINT, layout=dataclasses.replace(LAYOUT, block_size=8))

    _, replaced = pool.join(identity("d0", epoch=E1, fingerprint=other), 1.0)

    assert replaced is not None
    assert replaced.identity.epoch == E0


@pytest.mark.parametrize("epoch", [E0, E1])
def test_who_joins_again_is_a_new_member_and_the_old_one_is_none(epoch):
    """
    In the same epoch too: a worker may come back before its old stream is known to be gone.
    """
    pool = registry()
    old, _ = pool.join(identity("d0"), 0.0)
    new, replaced = pool.join(identity("d0", epoch=epoch), 1.0)

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
    d0, _ = pool.join(identity("d0"), 0.0)
    pool.join(identity("d1"), 0.0)
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
        pool.join(identity(name, role), 0.0)

    assert [m.worker_id for m in pool] == ["p0", "d0", "d1"]
