"""Which transports a worker runs by its setting, and which of them takes an offer."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import torch

from kvrelay.clock import MonotonicClock
from kvrelay.config import SettingsError
from kvrelay.errors import PeerUnavailable
from kvrelay.kv.cache import KvCache
from kvrelay.kv.device_cache import DeviceCache
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer import nixl
from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.build import TransportBuilder, TransportChoice, Transports, transport_for
from kvrelay.transfer.host import host_identity
from kvrelay.types import TransportOffer

LAYOUT = KvLayout(num_layers=1, block_size=8, num_kv_heads=1, head_dim=8, dtype="bfloat16")


@asynccontextmanager
async def built(
    choice: TransportChoice, *, cache: KvCache | None = None, wrap=None
) -> AsyncIterator[Transports]:
    """What a worker with this setting runs, for as long as the block lasts."""
    cache = cache or KvCache(LAYOUT, 2, shareable=True)
    builder = TransportBuilder(
        worker_id="w",
        epoch="e",
        tls=None,
        clock=MonotonicClock(),
        on_lost=lambda error: None,
        wrap=wrap,
    )
    try:
        transports = builder.build(choice, cache)
        try:
            yield transports
        finally:
            await transports.close()
    finally:
        cache.close()


@pytest.mark.parametrize(
    ("choice", "names"),
    [("auto", ["shm", "stream"]), ("shm", ["shm"]), ("stream", ["stream"])],
)
async def test_a_setting_names_its_transports(choice, names):
    """`auto` is all that a worker without a device can use; a name is that one alone."""
    if choice == "auto" and nixl.is_installed() and nixl.leaves_this_host():
        names = [*names, "nixl"]
    async with built(choice) as transports:
        assert [transport.name for transport in transports.all] == names
        assert {transport.describe().name for transport in transports.all} == set(names)
        assert transports.sender is None


@pytest.mark.parametrize("choice", ["cuda_ipc", "nccl"])
@pytest.mark.parametrize("is_stand_in", [False, True])
async def test_what_cannot_be_had_here_is_refused_by_name(choice, is_stand_in):
    """KV in host memory does not move between CUDA devices, and a stand-in is none."""
    cache = (
        DeviceCache(LAYOUT, 2, shareable=True, device=torch.device("cpu")) if is_stand_in else None
    )
    with pytest.raises(SettingsError, match=f"transport = {choice}"):
        async with built(choice, cache=cache):
            pass


async def test_whoever_makes_transports_fail_is_put_around_each():
    """It stands where the transport would."""
    wrapped = []

    def wrap(transport):
        wrapped.append(transport)
        return transport

    async with built("auto", wrap=wrap) as transports:
        assert tuple(wrapped) == transports.all


class Scripted:
    """A transport that pulls by its own name, once it is ready."""

    lands_on = "host"

    def __init__(self, name: str, *, is_ready: bool = True) -> None:
        self.name = name
        self.is_ready = is_ready
        self.num_prepared = 0

    def can_pull(self, offer: TransportOffer) -> bool:
        return offer.name == self.name

    def prepare(self, remote: RemoteHold) -> bool:
        assert remote.offer.name == self.name
        self.num_prepared += 1
        return self.is_ready


def hold_of(*offers: TransportOffer) -> RemoteHold:
    return RemoteHold(
        handoff_id="h",
        worker_id="w",
        epoch="e",
        address="127.0.0.1:1",
        offer=offers[0],
        other_offers=offers[1:],
    )


def offer(name: str, *, host: str = "") -> TransportOffer:
    return TransportOffer(name=name, address="a", host=host)


async def test_an_offer_goes_to_the_transport_that_pulls_by_it():
    """shm of this host, stream of anywhere."""
    async with built("auto") as transports:
        for each in (offer("shm", host=host_identity()), offer("stream")):
            transport, hold = transport_for(transports.all, hold_of(each))
            assert (transport.name, hold.offer) == (each.name, each)


def test_the_first_offer_that_is_ready_is_taken():
    """What is not begins to be, so that it can serve the next handoff."""
    ours = [Scripted("late", is_ready=False), Scripted("slow"), Scripted("fast")]
    remote = hold_of(offer("newer"), offer("late"), offer("fast"), offer("slow"))

    transport, hold = transport_for(ours, remote)
    ours[0].is_ready = True
    then, _ = transport_for(ours, remote)

    assert transport is ours[2]
    assert hold.offer.name == "fast"
    assert then is ours[0]
    assert [each.num_prepared for each in ours] == [2, 0, 1]


@pytest.mark.parametrize("name", ["shm", "newer"])
async def test_an_offer_that_none_pulls_by_is_for_another_holder_to_better(name):
    """Another host's shm, or a transport of a later version."""
    async with built("auto") as transports:
        with pytest.raises(PeerUnavailable, match=name):
            transport_for(transports.all, hold_of(offer(name, host="elsewhere")))


def test_none_that_is_ready_says_what_was_offered():
    """All of it, and what we have; it may be tried again."""
    with pytest.raises(PeerUnavailable, match="it offers late, newer, we have late, other"):
        transport_for(
            [Scripted("late", is_ready=False), Scripted("other")],
            hold_of(offer("late"), offer("newer")),
        )


def test_a_host_has_one_name_that_tells_nothing():
    """Equal each time, and only hex digits."""
    assert host_identity() == host_identity()
    assert len(bytes.fromhex(host_identity())) == 16
