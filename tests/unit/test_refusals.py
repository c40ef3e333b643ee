"""Peers that were not reached are left alone for a while."""

from dataclasses import replace

from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.refusals import Refusals
from kvrelay.types import TransportOffer

PEER = RemoteHold(
    handoff_id="h",
    worker_id="prefill-0",
    epoch="e1",
    address="",
    offer=TransportOffer(name="shm", address="", host=""),
)


def test_a_peer_is_refused_until_it_was_reached() -> None:
    """And tried again only after a while; one that nobody tried is tried at once."""
    refusals = Refusals(retry_s=5.0)
    before = refusals.has(PEER), refusals.shall_try(PEER, 0.0)
    refusals.refused(PEER, 10.0)
    told = [(refusals.has(PEER), refusals.shall_try(PEER, now)) for now in (10.0, 14.9, 15.0)]
    refusals.refused(PEER, 15.0)
    again = refusals.has(PEER), refusals.shall_try(PEER, 19.9)
    refusals.reached(PEER)
    refusals.reached(PEER)
    assert before == (False, True)
    assert told == [(True, False), (True, False), (True, True)]
    assert again == (True, False)
    assert (refusals.has(PEER), refusals.shall_try(PEER, 15.0)) == (False, True)


def test_a_peer_that_restarted_is_another() -> None:
    """Whatever kept us from the one before."""
    refusals = Refusals()
    refusals.refused(PEER, 0.0)
    for other in (replace(PEER, epoch="e2"), replace(PEER, worker_id="prefill-1")):
        assert not refusals.has(other)
        assert refusals.shall_try(other, 0.0)
    assert refusals.has(replace(PEER, handoff_id="another"))


def test_only_so_many_are_remembered() -> None:
    """Those that failed last."""
    refusals = Refusals(max_peers=2)
    peers = [replace(PEER, worker_id=f"prefill-{i}") for i in range(3)]
    for at, i in enumerate((0, 1, 0, 2)):
        refusals.refused(peers[i], float(at))
    assert [refusals.has(peer) for peer in peers] == [True, False, True]
