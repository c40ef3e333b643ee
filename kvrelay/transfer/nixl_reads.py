"""The thread that has NIXL read: many pulls at once, each over when its future is done.

NIXL has no way to stop a read, and letting go of one does not stop it either: measured, the bytes
of a peer that had been stopped landed seconds after its read was released and the peer removed.
What does end every read is the end of the agent that makes them. So all reads are one agent's,
which does nothing else and is cheap to open again (15 ms), and whenever a read fails or takes too
long that agent is closed before anybody is told. Reads of other pulls may end before: a holder that
sends by TCP may abort where its reader leaves in the middle (UCX 1.23).

The agent moves bytes only while it is looked at, so this thread looks: at once at what ends
within the call, as reads on one machine do, and else in growing intervals, in which it waits for
new pulls. Long intervals are the faster ones: 2.4 GB/s over TCP on one machine at 0.4 ms,
1.6 GB/s without a pause, when the looking takes the processor from what is looked for.
"""

import asyncio
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog

from kvrelay.clock import Clock
from kvrelay.errors import KvCorrupt, PeerUnavailable, QuiescenceLost, ServingError
from kvrelay.transfer.runs import Run
from kvrelay.transfer.side_thread import ended, raise_if_cancelled

Ranges = npt.NDArray[np.uint64]
"""[num_ranges, 3]: address, number of bytes, 0."""

RUN_NUM_BYTES = 16 << 20
"""Most bytes in a run of neighbours. Runs are read together until they are as many, or more."""

_FIRST_WAIT_S = 20e-6
_LAST_WAIT_S = 400e-6

log = structlog.get_logger(__name__)


class ReadFailed(Exception):
    """An agent's call failed. `is_nonsense`: the fault is in what the peer told of itself."""

    def __init__(self, problem: str, *, is_nonsense: bool = False) -> None:
        super().__init__(problem)
        self.is_nonsense = is_nonsense


class ReadAgent(Protocol):
    """What reads from peers. Used by one thread; all but `close` may raise `ReadFailed`."""

    def add_peer(self, metadata: bytes) -> str:
        """The name of the peer that this describes; it can be read from afterwards."""
        ...

    def remove_peer(self, name: str) -> None: ...

    def begin(self, peer: str, *, sources: Ranges, targets: Ranges) -> int:
        """A handle of the read, which may be over already."""
        ...

    def is_over(self, handle: int) -> bool: ...

    def forget(self, handle: int) -> None:
        """Of a read that is over."""
        ...

    def close(self) -> None:
        """When this returns, no read writes any more, whatever its state was."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Ranges that are read as one; a pull is not given up in the middle of a batch."""

    sources: Ranges
    targets: Ranges
    limit_s: float
    """How long it may take at the most."""


@dataclass(slots=True, eq=False)
class Pull:
    """One pull on its way through the thread. `over` is done when nothing of it writes any more."""

    worker_id: str
    peer: str
    metadata: bytes
    batches: Sequence[Batch]
    over: Future[None] = field(default_factory=Future)
    is_unwanted: bool = False
    """Set by whoever no longer wants it: it then ends after its batch, as unavailable."""

    num_read: int = 0
    handle: int | None = None
    until_s: float = 0.0


class Reads:
    """Carries pulls out, until `close`."""

    def __init__(
        self, open_agent: Callable[[], ReadAgent], *, clock: Clock, max_peers: int, name: str
    ) -> None:
        self._open_agent = open_agent
        self._clock = clock
        self._max_peers = max_peers
        self._asked: queue.SimpleQueue[Pull | None] = queue.SimpleQueue()
        self._active: list[Pull] = []
        self._failed: list[tuple[Pull, ServingError]] = []  # over once the agent is closed
        self._agent: ReadAgent | None = None
        self._peers: OrderedDict[str, bytes] = OrderedDict()  # least recently used first
        self._over: Future[None] = Future()
        # A daemon: a call that never returns must not keep a process that wants to end.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def start(self, pull: Pull) -> None:
        self._asked.put(pull)

    def close(self) -> Future[None]:
        """Done once all pulls are over, those under way as unavailable. Call once."""
        self._asked.put(None)
        return self._over

    def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while self._take(wait_s):
            has_moved = [self._advance(pull) for pull in tuple(self._active)]
            if self._failed and all(pull.handle is None for pull in self._active):
                self._close_agent()
            wait_s = 0.0 if any(has_moved) else min(max(2 * wait_s, _FIRST_WAIT_S), _LAST_WAIT_S)
        self._failed += [(pull, PeerUnavailable("nixl was closed")) for pull in self._active]
        self._active.clear()
        self._close_agent()
        self._over.set_result(None)

    def _take(self, wait_s: float) -> bool:
        """Take what was asked for meanwhile; False if the end was. Waits as long as is useful."""
        try:
            if self._active:
                pull = self._asked.get(block=wait_s > 0, timeout=wait_s)
            else:
                pull = self._asked.get()
        except queue.Empty:
            return True
        if pull is None:
            return False
        self._active.append(pull)
        return True

    def _advance(self, pull: Pull) -> bool:
        """Whether anything happened. Begins a batch, or ends one."""
        try:
            if pull.handle is not None and not self._is_read(pull, pull.handle):
                return False
            if pull.is_unwanted:
                self._end(pull, PeerUnavailable(f"the pull from {pull.worker_id} was given up"))
            elif pull.num_read == len(pull.batches):
                self._end(pull, None)
            elif self._failed:
                return False  # the agent is to be closed
            else:
                self._begin(pull, pull.batches[pull.num_read])
        except ReadFailed as failure:
            self._fail(pull, failure)
        return True

    def _begin(self, pull: Pull, batch: Batch) -> None:
        pull.until_s = self._clock.now() + batch.limit_s
        agent = self._agent = self._agent or self._open_agent()
        self._know(agent, pull)
        pull.handle = agent.begin(pull.peer, sources=batch.sources, targets=batch.targets)

    def _is_read(self, pull: Pull, handle: int) -> bool:
        assert self._agent is not None
        if not self._agent.is_over(handle):
            if self._clock.now() < pull.until_s:
                return False
            limit_s = pull.batches[pull.num_read].limit_s
            raise ReadFailed(f"no answer within {limit_s:.2f} s")
        self._agent.forget(handle)
        pull.handle = None
        pull.num_read += 1
        return True

    def _know(self, agent: ReadAgent, pull: Pull) -> None:
        known = self._peers.get(pull.peer)
        if known == pull.metadata:
            self._peers.move_to_end(pull.peer)
            return
        if known is not None:
            raise ReadFailed("it describes itself in two ways", is_nonsense=True)
        busy = {other.peer for other in self._active if other.handle is not None}
        for name in [name for name in self._peers if name not in busy]:
            if len(self._peers) < self._max_peers:
                break
            del self._peers[name]
            agent.remove_peer(name)
        name = agent.add_peer(pull.metadata)
        if name != pull.peer:
            raise ReadFailed(f"it is described as {name}", is_nonsense=True)
        self._peers[name] = pull.metadata

    def _fail(self, pull: Pull, failure: ReadFailed) -> None:
        log.warning("nixl.read_failed", holder=pull.worker_id, problem=str(failure))
        kind = KvCorrupt if failure.is_nonsense else PeerUnavailable
        self._active.remove(pull)
        self._failed.append((pull, kind(f"holder {pull.worker_id} by nixl: {failure}")))

    def _close_agent(self) -> None:
        """Afterwards nothing writes, and those who failed may hear of it."""
        agent, self._agent = self._agent, None
        self._peers.clear()
        if agent is not None:
            agent.close()
        failed, self._failed = self._failed, []
        for pull, error in failed:
            _settle(pull, error)

    def _end(self, pull: Pull, error: ServingError | None) -> None:
        assert pull.handle is None
        self._active.remove(pull)
        _settle(pull, error)


def _settle(pull: Pull, error: ServingError | None) -> None:
    if not pull.over.set_running_or_notify_cancel():
        return
    if error is None:
        pull.over.set_result(None)
    else:
        pull.over.set_exception(error)


async def outcome(pull: Pull, *, patience_s: float, quiesce_timeout_s: float) -> None:
    """Return or raise when nothing of a started pull writes any more, cancelled or not.

    `patience_s` is what it may wait for others beyond the limits of its own batches.

    Raises:
        KvCorrupt: what the peer told of itself makes no sense.
        PeerUnavailable: it does not answer, or the pull was ended from here.
        QuiescenceLost: the thread did not end it within `quiesce_timeout_s`.
    """
    over = asyncio.wrap_future(pull.over)
    patience_s += sum(batch.limit_s for batch in pull.batches)
    with suppress(asyncio.CancelledError):
        await asyncio.wait([over], timeout=patience_s)
    pull.is_unwanted = True
    if not await ended(over, within_s=quiesce_timeout_s):
        raise QuiescenceLost(
            f"a read from {pull.worker_id} did not end within {quiesce_timeout_s} s",
            worker_id=pull.worker_id,
            waited_s=quiesce_timeout_s,
        )
    failure = over.exception()
    raise_if_cancelled()
    if failure is not None:
        raise failure


def batches_of(
    runs: Sequence[Run],
    *,
    target_begin: int,
    source_begin: int,
    stall_s: float,
    floor_bytes_per_s: float,
) -> list[Batch]:
    """`runs` in order, between two memories that begin at these addresses.

    A batch may take `stall_s` and what its bytes need at `floor_bytes_per_s`.
    """
    parts: list[list[Run]] = []
    num_bytes = RUN_NUM_BYTES
    for run in runs:
        if num_bytes >= RUN_NUM_BYTES:
            parts.append([])
            num_bytes = 0
        parts[-1].append(run)
        num_bytes += run.num_bytes
    return [
        Batch(
            sources=_ranges((source_begin + run.source_offset, run.num_bytes) for run in part),
            targets=_ranges((target_begin + run.target_offset, run.num_bytes) for run in part),
            limit_s=stall_s + sum(run.num_bytes for run in part) / floor_bytes_per_s,
        )
        for part in parts
    ]


def _ranges(places: Iterable[tuple[int, int]]) -> Ranges:
    return np.array([(address, num_bytes, 0) for address, num_bytes in places], np.uint64)
