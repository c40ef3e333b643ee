"""The puller's end of links: opens them ahead of need, and decides what moves over them when.

    1. whoever wants to pull from a holder asks; a link is opened in the background, and nobody's
       request waits for it
    2. a pull takes the link for one group of blocks at a time: it asks the holder to send them and
       receives them meanwhile, in the same order
    3. whatever goes wrong breaks the link; it is made anew at a later wish

A cancelled pull still waits for its group: the holder sends it whatever we wish, and to give up a
transfer is to give up the link.
"""

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import structlog

from kvrelay.clock import Clock
from kvrelay.errors import PeerUnavailable, QuiescenceLost, ServingError
from kvrelay.transfer.base import BlockCopy, RemoteHold
from kvrelay.transfer.nccl_holder import link_id_of
from kvrelay.transfer.nccl_link import LinkLimits, NcclLink, OnLost, Rank
from kvrelay.transfer.nccl_links import LinkTable
from kvrelay.transfer.side_thread import ended

GROUP_NUM_BYTES = 64 << 20
"""Most bytes of one group: what a cancelled pull still waits for, 3 ms at 20 GB/s."""

GROUP_NUM_BLOCKS = 512

Peer = tuple[str, str]
"""worker_id and epoch: a worker that restarted is another peer."""

log = structlog.get_logger(__name__)


class HolderCalls(Protocol):
    """What a puller asks of a holder over gRPC. Failures are `ServingError`s."""

    async def open_link(self, remote: RemoteHold, unique_id: bytes) -> None:
        """Returns when the holder has begun to join."""
        ...

    async def send(
        self, remote: RemoteHold, *, link_id: str, sequence: int, indexes: Sequence[int]
    ) -> None:
        """Returns when the holder has sent these blocks of the handoff, in this order."""
        ...


class NcclPuller:
    """See the module. For the event loop's thread."""

    def __init__(
        self,
        rank: Rank,
        *,
        calls: HolderCalls,
        clock: Clock,
        limits: LinkLimits,
        max_links: int,
        on_lost: OnLost,
    ) -> None:
        self._rank = rank
        self._calls = calls
        self._clock = clock
        self._limits = limits
        self._on_lost = on_lost
        self._table: LinkTable[Peer] = LinkTable(max_links=max_links)
        self._links: dict[Peer, _Pulled] = {}
        self._moving: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def ask(self, remote: RemoteHold) -> str:
        """Why there is no link to pull by right now, or nothing if there is. Begins to open one.

        Raises:
            PeerUnavailable: we are closed.
        """
        if self._is_closed:
            raise PeerUnavailable("the nccl transport is closed")
        peer = _peer(remote)
        answer = self._table.ask(peer, self._clock.now())
        if answer.is_ready:
            return ""
        if answer.shall_open:
            if answer.give_way is not None:
                self._close_later(self._links.pop(answer.give_way).link)
            self._begin(peer, remote)
        return answer.why_not

    async def opened(self, remote: RemoteHold) -> None:
        """Wait for the link; have it opened, if need be.

        Raises:
            ServingError: what kept it from being opened.
        """
        why_not = self.ask(remote)
        pulled = self._links.get(_peer(remote))
        if pulled is None:
            raise PeerUnavailable(f"no nccl link to {remote.worker_id}: {why_not}")
        if pulled.opening is not None:
            await asyncio.wait([pulled.opening])
        if pulled.problem is not None:
            raise pulled.problem
        if not pulled.link.is_usable:
            raise PeerUnavailable(f"the link to {remote.worker_id} was closed")

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> None:
        """As `KvTransport.pull`; also raises `PeerUnavailable` where there is no link yet."""
        if why_not := self.ask(remote):
            raise PeerUnavailable(f"no nccl link to {remote.worker_id}: {why_not}")
        peer = _peer(remote)
        pulled = self._links[peer]
        self._table.take(peer)
        is_whole = False
        try:
            for group in groups_of(copies):
                async with pulled.turn:
                    if not pulled.link.is_usable:
                        raise PeerUnavailable(f"the link to {remote.worker_id} broke")
                    await self._to_its_end(self._move(peer, pulled, remote, group))
            is_whole = True
        finally:
            self._table.give_back(peer, worked=is_whole)

    async def close(self) -> None:
        """Pulls under way end with `PeerUnavailable`. Safe to repeat."""
        self._is_closed = True
        openings = [pulled.opening for pulled in self._links.values() if pulled.opening is not None]
        for opening in openings:
            opening.cancel()
        for pulled in self._links.values():
            pulled.link.break_off(PeerUnavailable("the nccl transport is closed"))
        for tasks in (openings, self._moving):
            if tasks:
                await asyncio.wait(tasks)
        while self._links:
            self._close_later(self._links.popitem()[1].link)
        if self._closing:
            await asyncio.wait(self._closing)

    def _begin(self, peer: Peer, remote: RemoteHold) -> None:
        link = NcclLink(self._rank, name=f"from-{remote.worker_id}", limits=self._limits)
        pulled = self._links[peer] = _Pulled(link=link)
        pulled.opening = asyncio.create_task(self._open(peer, pulled, remote))

    async def _open(self, peer: Peer, pulled: "_Pulled", remote: RemoteHold) -> None:
        started = self._clock.now()
        try:
            unique_id = await pulled.link.unique_id()
            async with asyncio.timeout(self._limits.open_timeout_s):
                await self._calls.open_link(remote, unique_id)
            await pulled.link.open(unique_id)
        except (ServingError, TimeoutError) as error:
            self._not_opened(peer, pulled, error)
            return
        pulled.link_id = link_id_of(unique_id)
        self._table.joined(peer)
        elapsed_s = self._clock.now() - started
        log.info("nccl.opened", holder=remote.worker_id, elapsed_s=round(elapsed_s, 3))

    def _not_opened(self, peer: Peer, pulled: "_Pulled", error: Exception) -> None:
        if isinstance(error, TimeoutError):
            silent = f"{peer[0]} did not answer within {self._limits.open_timeout_s} s"
            error = PeerUnavailable(silent)
        assert isinstance(error, ServingError)
        log.warning("nccl.not_opened", holder=peer[0], problem=str(error))
        pulled.problem = error
        self._broke(peer, pulled)
        if isinstance(error, QuiescenceLost):
            self._on_lost(error)

    async def _to_its_end(self, move: Coroutine[None, None, None]) -> None:
        """Await it, and await it to its end when we are cancelled."""
        moving = asyncio.create_task(move)
        self._moving.add(moving)
        moving.add_done_callback(self._moving.discard)
        try:
            await asyncio.shield(moving)
        except asyncio.CancelledError:
            limits = self._limits
            most_s = 2 * limits.transfer_timeout_s + 2 * limits.quiesce_timeout_s
            if not await ended(moving, within_s=most_s):
                raise QuiescenceLost(f"a transfer has not ended within {most_s} s") from None
            if isinstance(lost := moving.exception(), QuiescenceLost):
                raise lost from None
            raise

    async def _move(
        self, peer: Peer, pulled: "_Pulled", remote: RemoteHold, group: Sequence[BlockCopy]
    ) -> None:
        sequence = pulled.next_sequence
        pulled.next_sequence += 1
        sending = asyncio.create_task(
            self._calls.send(
                remote,
                link_id=pulled.link_id,
                sequence=sequence,
                indexes=[copy.index for copy in group],
            )
        )
        sending.add_done_callback(partial(_break_off_unless_sent, pulled.link))
        is_moved = False
        try:
            await pulled.link.transfer([(copy.target_offset, copy.num_bytes) for copy in group])
            await asyncio.wait([sending], timeout=self._limits.transfer_timeout_s)
            if not sending.done():
                raise PeerUnavailable(f"{remote.worker_id} does not end a transfer that is over")
            sending.result()
            is_moved = True
        finally:
            if not is_moved:
                self._broke(peer, pulled)
            if not sending.done():
                sending.cancel()
                await asyncio.wait([sending])

    def _broke(self, peer: Peer, pulled: "_Pulled") -> None:
        if self._links.get(peer) is pulled:
            del self._links[peer]
            self._table.failed(peer, self._clock.now())
            self._close_later(pulled.link)

    def _close_later(self, link: NcclLink) -> None:
        closing = asyncio.create_task(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


@dataclass(slots=True, eq=False)
class _Pulled:
    """The link to one holder."""

    link: NcclLink
    link_id: str = ""
    opening: asyncio.Task[None] | None = None
    problem: ServingError | None = None
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    next_sequence: int = 0


def groups_of(copies: Sequence[BlockCopy]) -> Iterator[list[BlockCopy]]:
    """`copies` in order, so many at a time as go into one group."""
    group: list[BlockCopy] = []
    num_bytes = 0
    for copy in copies:
        is_full = num_bytes + copy.num_bytes > GROUP_NUM_BYTES or len(group) == GROUP_NUM_BLOCKS
        if group and is_full:
            yield group
            group, num_bytes = [], 0
        group.append(copy)
        num_bytes += copy.num_bytes
    if group:
        yield group


def _peer(remote: RemoteHold) -> Peer:
    return remote.worker_id, remote.epoch


def _break_off_unless_sent(link: NcclLink, sending: "asyncio.Task[None]") -> None:
    if sending.cancelled() or (error := sending.exception()) is None:
        return
    if not isinstance(error, ServingError):
        error = PeerUnavailable(f"asking to send failed: {type(error).__name__}")
    link.break_off(error)
