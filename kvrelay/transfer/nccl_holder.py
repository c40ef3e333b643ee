"""The holder's end of links: joins when a puller asks, sends when a puller asks.

The order of transfers is the puller's. Each carries a number that both sides count, because a send
that met another transfer's receive would move the right bytes to the wrong place.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from kvrelay.clock import Clock
from kvrelay.errors import InvalidRequest, PeerUnavailable, QueueFull, QuiescenceLost, ServingError
from kvrelay.transfer.nccl_link import UNIQUE_ID_NUM_BYTES, LinkLimits, NcclLink, OnLost, Rank
from kvrelay.transfer.nccl_links import LinkTable

log = structlog.get_logger(__name__)


def link_id_of(unique_id: bytes) -> str:
    """What both sides call a link; it does not give away the secret that made it."""
    return hashlib.blake2b(unique_id, digest_size=16).hexdigest()


class NcclHolder:
    """Serves what pullers ask over gRPC. Whether they may have the bytes was settled before."""

    def __init__(
        self, rank: Rank, *, clock: Clock, limits: LinkLimits, max_links: int, on_lost: OnLost
    ) -> None:
        self._rank = rank
        self._clock = clock
        self._limits = limits
        self._max_links = max_links
        self._on_lost = on_lost
        self._table: LinkTable[str] = LinkTable(max_links=max_links)
        self._links: dict[str, _Held] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def open_link(self, *, puller_id: str, unique_id: bytes) -> None:
        """Begin to join. Returns at once: the puller, which waits for us, joins meanwhile.

        Links of this puller's earlier life, and the one it gave up for this, are closed. May be
        repeated.

        Raises:
            InvalidRequest: `unique_id` is none.
            PeerUnavailable: we are closing.
            QueueFull: all links are in use.
        """
        if self._is_closed:
            raise PeerUnavailable("the nccl transport is closed")
        if len(unique_id) != UNIQUE_ID_NUM_BYTES:
            problem = f"must be {UNIQUE_ID_NUM_BYTES} bytes, is {len(unique_id)}"
            raise InvalidRequest("unique_id", problem)
        link_id = link_id_of(unique_id)
        if link_id in self._links:
            return
        self.forget(puller_id)
        answer = self._table.ask(link_id, self._clock.now())
        if not answer.shall_open:
            raise QueueFull(what="nccl links", queued=self._table.num_links, limit=self._max_links)
        if answer.give_way is not None:
            self._close_later(self._links.pop(answer.give_way))
        link = NcclLink(self._rank, name=f"to-{puller_id}", limits=self._limits)
        held = _Held(puller_id=puller_id, link=link)
        self._links[link_id] = held
        held.opening = asyncio.create_task(self._open(link_id, held, unique_id))

    async def send(
        self, *, puller_id: str, link_id: str, sequence: int, ranges: Sequence[tuple[int, int]]
    ) -> None:
        """Send (offset, num_bytes) of our memory, in this order; the puller receives as many.

        The ranges must stay as they are until this has returned or raised. Then nothing reads
        them any more, but after `QuiescenceLost`.

        Raises:
            PeerUnavailable: there is no such link (any more), it is out of step, or it broke.
            QuiescenceLost: nobody can tell whether something still reads. The process must end.
        """
        held = await self._ready(puller_id, link_id)
        if not held.idle.is_set() or sequence != held.next_sequence:
            problem = f"transfer {sequence} asked for, {held.next_sequence} is next"
            self._drop(link_id, PeerUnavailable(f"link out of step: {problem}"))
            raise PeerUnavailable(f"link {link_id} is out of step: {problem}")
        held.next_sequence += 1
        held.idle.clear()
        self._table.take(link_id)
        is_sent = False
        try:
            await held.link.transfer(ranges)
            is_sent = True
        except QuiescenceLost as lost:
            self._on_lost(lost)
            raise
        finally:
            held.idle.set()
            self._table.give_back(link_id, worked=is_sent)
            if not is_sent or held.is_unwanted:
                self._drop(link_id)

    def forget(self, puller_id: str) -> None:
        """Close what links this puller has; it is gone, or about to make a new one."""
        for link_id in [i for i, held in self._links.items() if held.puller_id == puller_id]:
            self._drop(link_id, PeerUnavailable(f"the links of {puller_id} are closed"))

    async def close(self) -> None:
        """Sends under way end with `PeerUnavailable`. Safe to repeat."""
        self._is_closed = True
        for link_id in list(self._links):
            self._drop(link_id, PeerUnavailable("the nccl transport is closed"))
        for held in list(self._links.values()):
            await held.idle.wait()
        while self._closing:
            await asyncio.wait(self._closing)

    @property
    def num_links(self) -> int:
        return self._table.num_links

    async def _ready(self, puller_id: str, link_id: str) -> "_Held":
        held = self._links.get(link_id)
        if held is None or held.puller_id != puller_id:
            raise PeerUnavailable(f"{puller_id} has no link {link_id} here")
        assert held.opening is not None
        await asyncio.wait([held.opening])
        if self._links.get(link_id) is not held or held.is_unwanted:
            raise PeerUnavailable(f"link {link_id} was closed")
        return held

    async def _open(self, link_id: str, held: "_Held", unique_id: bytes) -> None:
        try:
            await held.link.open(unique_id)
        except (PeerUnavailable, QuiescenceLost) as error:
            log.warning("nccl.not_joined", puller=held.puller_id, problem=str(error))
            if self._links.get(link_id) is held:
                self._drop(link_id)
            if isinstance(error, QuiescenceLost):
                self._on_lost(error)
            return
        if self._links.get(link_id) is not held:
            return  # it was closed just now, before we heard
        self._table.joined(link_id)
        log.info("nccl.joined", puller=held.puller_id, num_links=self._table.num_links)

    def _drop(self, link_id: str, error: ServingError | None = None) -> None:
        """Close a link, or the one in use as soon as its transfer has been broken off."""
        held = self._links[link_id]
        if not held.idle.is_set():
            held.is_unwanted = True
            if error is not None:
                held.link.break_off(error)
            return
        self._table.drop(link_id)
        self._close_later(self._links.pop(link_id))

    def _close_later(self, held: "_Held") -> None:
        closing = asyncio.create_task(held.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


@dataclass(slots=True, eq=False)
class _Held:
    """One puller's link."""

    puller_id: str
    link: NcclLink
    opening: asyncio.Task[None] | None = None
    next_sequence: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    is_unwanted: bool = False
    """In use, and closed as soon as it is not."""

    def __post_init__(self) -> None:
        self.idle.set()

    async def close(self) -> None:
        """Also while it is being opened."""
        if self.opening is not None:
            self.opening.cancel()
            await asyncio.wait([self.opening])
        await self.link.close()
