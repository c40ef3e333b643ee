"""Which transports a worker runs by its setting, and which of them takes an offer."""

import pytest

from kvrelay.clock import MonotonicClock
from kvrelay.errors import Incompatible
from kvrelay.transfer.build import build_transports, transport_for
from kvrelay.transfer.host import host_identity
from kvrelay.types import TransportOffer


@pytest.mark.parametrize(
    ("choice", "names"),
    [("auto", ["shm", "stream"]), ("shm", ["shm"]), ("stream", ["stream"])],
)
def test_a_setting_names_its_transports(choice, names):
    """`auto` is all of them, best first."""
    built = build_transports(choice, worker_id="w", epoch="e", tls=None, clock=MonotonicClock())
    assert [transport.name for transport in built] == names


def test_an_offer_goes_to_the_transport_that_pulls_by_it():
    """shm of this host, stream of anywhere."""
    built = build_transports("auto", worker_id="w", epoch="e", tls=None, clock=MonotonicClock())
    shm = TransportOffer(name="shm", address="a", host=host_identity())
    stream = TransportOffer(name="stream", address="", host="")
    assert transport_for(built, shm).name == "shm"
    assert transport_for(built, stream).name == "stream"


@pytest.mark.parametrize("name", ["shm", "newer"])
def test_an_offer_that_none_pulls_by_is_incompatible(name):
    """Another host's shm, or a transport of a later version."""
    built = build_transports("auto", worker_id="w", epoch="e", tls=None, clock=MonotonicClock())
    with pytest.raises(Incompatible, match=name):
        transport_for(built, TransportOffer(name=name, address="a", host="elsewhere"))


def test_a_host_has_one_name_that_tells_nothing():
    """Equal each time, and only hex digits."""
    assert host_identity() == host_identity()
    assert len(bytes.fromhex(host_identity())) == 16
