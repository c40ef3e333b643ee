"""The pool in motion: the registry's decisions, carried out on sessions and waiters.

A worker is a member while three things hold: its `Join` stream lives, it is heard from
within the suspicion time, and our session with it stands. Whichever ends first ends all.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

import structlog

from coordinator.convert import Work
from coordinator.registry import Member, Registry
from coordinator.router import Placement, Router, RouteRequest
from coordinator.workers import Attempt, Inbox, Workers
from kvrelay.clock import Clock
from kvrelay.transfer.select import explain
from kvrelay.types import Role, WorkerIdentity, WorkerLoad

log = structlog.get_logger(__name__)

DEFAULT_BLOCK_SIZE = 16

STALL_S = 0.5
"""A timer that fires so late says that the event loop was kept from running."""


class Seat:
    """A worker's membership; `expelled` is set when the pool ends it."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.expelled = asyncio.Event()


class Pool:
    """Owns who is in, who is told, and who waits for a change."""

    def __init__(
        self,
        *,
        registry: Registry,
        router: Router,
        workers: Workers,
        clock: Clock,
        mint_key: Callable[[], bytes],
        on_change: Callable[[Sequence[Member]], None],
    ) -> None:
        """`mint_key` makes a key of `KEY_NUM_BYTES` that nobody can guess."""
        self._registry = registry
        self._router = router
        self._workers = workers
        self._clock = clock
        self._mint_key = mint_key
        self._on_change = on_change
        self._seats: dict[Member, Seat] = {}
        self._ways: dict[tuple[str, str], str] = {}
        """The transport last taken, by holder and puller; of members only."""

        self._changed = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()

    def members(self) -> list[Member]:
        """All members, prefill workers first."""
        return list(self._registry)

    @property
    def able(self) -> str:
        """Who could be given work, for people."""
        counts = Counter(m.identity.role for m in self._registry if m.takes_work)
        return f"{counts[Role.PREFILL]} prefill and {counts[Role.DECODE]} decode workers take work"

    @property
    def block_size(self) -> int:
        """In which prefixes are told apart: the smallest of the members'; a common one while there
        is none.
        """
        return self._registry.block_size or DEFAULT_BLOCK_SIZE

    def join(self, identity: WorkerIdentity) -> Seat:
        """Make a worker a member and open a session with it.

        Raises:
            Incompatible: see `Registry.join`.
        """
        was_mixed = len(self._registry.kv_dtypes) > 1
        member, replaced = self._registry.join(
            identity, self._clock.now(), ticket_key=self._mint_key()
        )
        if replaced is not None:
            self._expel(replaced, "replaced")
        seat = self._seats[member] = Seat(member)
        self._workers.add(
            member,
            on_open=lambda: self._linked(member),
            on_end=lambda: self.leave(member, "session ended"),
        )
        log.info(
            "pool.joined",
            worker_id=member.worker_id,
            role=identity.role.value,
            block_size=member.block_size,
            kv_dtype=member.kv_dtype,
        )
        if not was_mixed:
            self._say_if_mixed()
        self._notify()
        return seat

    def heard(self, member: Member, load: WorkerLoad) -> None:
        """Note a heartbeat. A member that starts draining changes where requests may go."""
        if member in self._registry:
            self._registry.heard(member, load, self._clock.now())
            self._notify()

    def leave(self, member: Member, why: str) -> None:
        """End a membership. Safe to repeat; its requests are placed again."""
        if self._registry.leave(member):
            self._expel(member, why)

    def _say_if_mixed(self) -> None:
        """What was promised of tokens holds no longer when workers keep KV differently."""
        dtypes = self._registry.kv_dtypes
        if len(dtypes) > 1:
            log.warning(
                "pool.mixes_kv_dtypes",
                kv_dtypes=", ".join(sorted(dtypes)),
                promise="no token is lost or repeated and what was sent never changes, "
                "but tokens depend on which workers serve",
            )

    def _linked(self, member: Member) -> None:
        member.is_linked = True
        self._notify()

    def place(self, request: RouteRequest) -> Placement | None:
        """Where the request goes now, or None while nothing suitable takes work."""
        return self._router.place(request, self._registry)

    def dispatch(
        self, work: Work, placement: Placement, request: RouteRequest, inbox: Inbox
    ) -> Attempt:
        """Tell the chosen workers, and count the work as theirs until `settle`."""
        self._router.placed(placement, request)
        self._say_way(placement)
        prefiller = placement.prefill or placement.decode
        placement.decode.placed[_attempt(work)] = 0
        prefiller.placed[_attempt(work)] = placement.num_prefill_tokens
        return self._workers.dispatch(work, placement, inbox)

    def _say_way(self, placement: Placement) -> None:
        """How KV goes from one worker to another, and why so: once, and when it changes."""
        holder, puller, offer = placement.holder, placement.decode, placement.offer
        if holder is None or offer is None:
            return
        pair = (holder.worker_id, puller.worker_id)
        if self._ways.get(pair) != offer.name:
            self._ways[pair] = offer.name
            why = explain(
                holder.identity.offers, puller.identity.offers, puller.measured_from(holder)
            )
            log.info("pool.transport", holder=pair[0], puller=pair[1], name=offer.name, why=why)

    def prefilled(self, work: Work, placement: Placement) -> None:
        """The prompt is computed: its tokens no longer stand before others."""
        if placement.prefill is not None:
            placement.prefill.placed.pop(_attempt(work), None)
        else:
            placement.decode.placed[_attempt(work)] = 0

    def settle(self, work: Work, placement: Placement) -> None:
        """The attempt is over, well or badly."""
        for member in (placement.prefill, placement.decode):
            if member is not None:
                member.placed.pop(_attempt(work), None)

    async def wait_change(self) -> None:
        """Return when a worker joined, left or was heard."""
        await self._changed.wait()

    async def run(self) -> None:
        """Expel members that fall silent. Ends when cancelled."""
        while True:
            suspicion_s = self._registry.next_suspicion_s()
            wait_s = None if suspicion_s is None else max(0.0, suspicion_s - self._clock.now())
            try:
                async with asyncio.timeout(wait_s):
                    await self.wait_change()
            except TimeoutError:
                self._expel_silent(suspicion_s)

    def _expel_silent(self, suspicion_s: float | None) -> None:
        """Expel who fell silent, unless it was this process that stood still: then heartbeats
        wait unread, and everybody gets another suspicion time.
        """
        now_s = self._clock.now()
        if suspicion_s is not None and now_s - suspicion_s > STALL_S:
            log.warning("pool.stalled", stalled_s=round(now_s - suspicion_s, 3))
            self._registry.excuse(now_s)
        for member in self._registry.silent(now_s):
            self.leave(member, "silent")

    async def close(self) -> None:
        """End every membership and session."""
        for member in self.members():
            self.leave(member, "coordinator stops")
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._workers.close()

    def _expel(self, member: Member, why: str) -> None:
        log.info("pool.left", worker_id=member.worker_id, why=why)
        self._router.forget(member.worker_id)
        self._ways = {pair: way for pair, way in self._ways.items() if member.worker_id not in pair}
        self._seats.pop(member).expelled.set()
        task = asyncio.create_task(self._workers.remove(member))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        self._notify()

    def _notify(self) -> None:
        self._on_change(self.members())
        self._changed.set()
        self._changed = asyncio.Event()


def _attempt(work: Work) -> tuple[str, int]:
    return (work.request_id, work.attempt)
