"""The one way KV moves between processes: the decode side pulls.

A transport carries ranges of bytes and decides nothing; it knows of no layout. Whether the bytes
may be used is settled elsewhere: by the digest of what landed and by the fence at `Release`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from kvrelay.types import BlockId, TransportOffer

if TYPE_CHECKING:  # whoever decides about transports needs no torch
    from kvrelay.kv.cache import KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteHold:
    """KV held by a worker for one handoff, as the puller knows it."""

    handoff_id: str
    worker_id: str
    epoch: str
    address: str
    """HOST:PORT of the holder's gRPC server."""

    offer: TransportOffer
    other_offers: tuple[TransportOffer, ...] = ()
    """What else the two have in common, best first."""

    ticket: bytes = b""
    """The coordinator's word that we may pull it; see `kvrelay.handoff.ticket`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopy:
    """One block to fetch, as ranges of bytes."""

    index: int
    """Of the block in the handoff."""

    source_offset: int
    """In the memory that the holder registered."""

    target_offset: int
    """In the memory that we registered."""

    num_bytes: int


@dataclass(frozen=True, slots=True)
class BlockGeneration:
    """A block of the holder's, and which of its contents is meant."""

    block_id: BlockId
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PullStats:
    """What one pull cost."""

    num_bytes: int
    elapsed_s: float
    digests: tuple[int, ...] | None = None
    """xxh3 of each block as it landed, in order, where the transport took them on the way."""


class KvTransport(Protocol):
    """Copies held blocks of a peer into local memory.

    Implementations: `ShmTransport` (same host), `StreamTransport` (anywhere), `NixlTransport`,
    `CudaIpcTransport`, `NcclTransport`. All keep the promises of tests/contract/test_transport.py.
    """

    @property
    def name(self) -> str: ...

    @property
    def lands_on(self) -> Literal["host", "device"]:
        """Which side of the cache pulls write to."""
        ...

    def register(self, cache: "KvCache") -> None:
        """Make `cache` the memory that peers pull from and that pulls land in. Called once."""
        ...

    def describe(self) -> TransportOffer:
        """What a peer needs to pull from here. Only after `register`."""
        ...

    def can_pull(self, offer: TransportOffer) -> bool:
        """Whether `pull` could work with a peer that offers this. Pure, no I/O."""
        ...

    def prepare(self, remote: RemoteHold) -> bool:
        """Whether `pull` could begin now. False begins what is missing, and never waits; until
        then another transport has to do.
        """
        ...

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        """Copy the given blocks into the registered cache.

        On return the bytes are visible to whoever reads the cache afterwards. On any
        exception, cancellation included, nothing is still writing to the targets, so the
        caller may free them. The bytes are unverified.

        Raises:
            HandoffLost: the holder no longer has it.
            PeerUnavailable: the holder could not be reached or went away.
            KvCorrupt: what the holder told of its memory makes no sense.
            QuiescenceLost: nobody can tell whether something still writes to the targets. The
                process must end; until then the caller keeps them.
        """
        ...

    def still(self, remote: RemoteHold, blocks: Sequence[BlockGeneration]) -> bool | None:
        """The fence, where we can see for ourselves: whether the holder's blocks have had these
        contents until now. None where only the holder can tell, by its answer to `Release`.
        """
        ...

    async def close(self) -> None:
        """Stop serving peers and forget connections. Safe to repeat."""
        ...
