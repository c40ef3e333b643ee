"""The one way KV moves between processes: the decode side pulls.

A transport carries bytes of whole blocks and decides nothing. Whether the bytes may be
used is settled elsewhere: by the digest of what landed and by the fence at `Release`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from kvrelay.types import BlockId, TransportOffer

if TYPE_CHECKING:  # whoever decides about transports needs no torch
    from kvrelay.kv.cache import KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteHold:
    """KV held by a prefill worker for one handoff, as the puller knows it."""

    handoff_id: str
    worker_id: str
    epoch: str
    address: str
    """HOST:PORT of the holder's gRPC server."""

    offer: TransportOffer


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """One block to fetch: `index` in the handoff, `source` at the holder, `target` here."""

    index: int
    source: BlockId
    source_generation: int
    target: BlockId


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStats:
    """What one pull cost."""

    num_bytes: int
    elapsed_s: float


class KvTransport(Protocol):
    """Copies held blocks of a peer into local ones.

    Implementations: `ShmTransport` (same host), `StreamTransport` (anywhere). All pass
    tests/contract/test_transport.py.
    """

    @property
    def name(self) -> str: ...

    def register(self, cache: "KvCache") -> None:
        """Make `cache` the memory that peers pull from and that pulls land in. Called once."""
        ...

    def describe(self) -> TransportOffer:
        """What a peer needs to pull from here. Only after `register`."""
        ...

    def can_pull(self, offer: TransportOffer) -> bool:
        """Whether `pull` could work with a peer that offers this. Pure, no I/O."""
        ...

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        """Copy the given blocks into the registered cache.

        On return the bytes are visible to whoever reads the cache afterwards. On any
        exception, cancellation included, nothing is still writing to the targets, so the
        caller may free them. The bytes are unverified.

        Raises:
            HandoffLost: the holder no longer has it.
            PeerUnavailable: the holder could not be reached or went away.
        """
        ...

    async def close(self) -> None:
        """Stop serving peers and forget connections. Safe to repeat."""
        ...
