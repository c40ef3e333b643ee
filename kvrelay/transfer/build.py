"""Which transports a worker runs, by the name of the setting."""

from collections.abc import Sequence
from typing import Literal

from kvrelay.clock import Clock
from kvrelay.config import TlsFiles
from kvrelay.errors import Incompatible
from kvrelay.transfer.base import KvTransport
from kvrelay.transfer.shm import ShmTransport
from kvrelay.transfer.stream import StreamTransport
from kvrelay.types import TransportOffer

TransportChoice = Literal["auto", "shm", "stream"]


def build_transports(
    choice: TransportChoice, *, worker_id: str, epoch: str, tls: TlsFiles | None, clock: Clock
) -> tuple[KvTransport, ...]:
    """The transports of one worker, unregistered, the preferred one first.

    `auto` has all of them, and each pair of workers uses the best it has in common. A name
    has that one alone; `shm` then serves only workers of the same host.
    """
    transports: list[KvTransport] = []
    if choice in ("auto", "shm"):
        transports.append(ShmTransport(worker_id=worker_id, epoch=epoch, clock=clock))
    if choice in ("auto", "stream"):
        transports.append(StreamTransport(worker_id=worker_id, tls=tls, clock=clock))
    assert transports, choice
    return tuple(transports)


def transport_for(transports: Sequence[KvTransport], offer: TransportOffer) -> KvTransport:
    """The one of ours that pulls by `offer`.

    Raises:
        Incompatible: none does.
    """
    for transport in transports:
        if transport.can_pull(offer):
            return transport
    have = ", ".join(transport.name for transport in transports)
    raise Incompatible(f"cannot pull by {offer.name}, have {have}", offered=offer.name)
