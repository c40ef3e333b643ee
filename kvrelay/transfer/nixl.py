"""KV by NIXL: one-sided reads through UCX, which takes the best path that two machines share.

1. `register` opens an agent that serves our memory: a listening port where UCX has one, and a
   thread that sleeps until a peer needs it. What peers need to know goes into the offer.
2. A pull is cut into batches of neighbouring ranges; the thread of `nixl_reads` has a second
   agent read them, without the holder's doing where the path allows it (on one machine the
   kernel copies from process to process).

UCX encrypts nothing and asks nobody who they are. So it stays on this machine, and a pull only
works between workers of one host, unless whoever runs the worker names the devices that UCX may
use: UCX_NET_DEVICES=mlx5_0:1, eth0 or all, on a network where every machine is trusted. UCX's
other settings are taken from the environment as well.

The agents are opened through NIXL's bindings: those of its Python class spend a whole core on
looking for peers, and so would take half of a small machine.
"""

import asyncio
import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from kvrelay.clock import Clock
from kvrelay.errors import (
    HandoffLost,
    Incompatible,
    KvCorrupt,
    PeerUnavailable,
)
from kvrelay.kv.cache import KvCache
from kvrelay.transfer.base import BlockCopy, BlockGeneration, PullStats, RemoteHold
from kvrelay.transfer.host import host_identity
from kvrelay.transfer.nixl_offer import Described, agent_name, describe, described
from kvrelay.transfer.nixl_reads import (
    RUN_NUM_BYTES,
    Batch,
    Pull,
    Ranges,
    ReadFailed,
    Reads,
    batches_of,
    outcome,
)
from kvrelay.transfer.runs import runs_of
from kvrelay.transfer.side_thread import ended, raise_if_cancelled
from kvrelay.types import TransportOffer

_PACKAGES = ("nixl", "nixl_cu13", "nixl_cu12")
_SERVING_WAIT_US = 100_000
"""The serving agent's thread wakes when a peer speaks, and as often as this without a reason."""

log = structlog.get_logger(__name__)


def is_installed() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in _PACKAGES)


def leaves_this_host() -> bool:
    """Whether UCX was given devices that reach other machines."""
    return os.environ.get("UCX_NET_DEVICES", "lo") != "lo"


class NixlTransport:
    """See `KvTransport`. `stall_s` and `floor_bytes_per_s` bound how long a batch may take."""

    name = "nixl"
    lands_on: Literal["host", "device"] = "host"

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: str,
        clock: Clock,
        max_peers: int = 64,
        stall_s: float = 3.0,
        floor_bytes_per_s: float = 64e6,
        quiesce_timeout_s: float = 30.0,
    ) -> None:
        """Raises:
        Incompatible: NIXL is not installed.
        """
        self._library = _library()
        self._name = agent_name(worker_id, epoch)
        self._clock = clock
        self._max_peers = max_peers
        self._stall_s = stall_s
        self._floor_bytes_per_s = floor_bytes_per_s
        self._quiesce_timeout_s = quiesce_timeout_s
        self._host = "" if leaves_this_host() else host_identity()
        self._num_agents = 0
        self._registered: _Registered | None = None
        self._is_closed = False

    def register(self, cache: KvCache) -> None:
        """Takes half a second, for UCX looks at every device there is.

        Raises:
            Incompatible: UCX finds no device that it may use, or what peers need to know is more
                than an offer carries.
        """
        assert self._registered is None, "registered twice"
        begin, num_bytes = cache.bytes.ctypes.data, cache.num_bytes
        try:
            agent = _Agent(self._library, self._name, begin, num_bytes, serves=True)
        except ReadFailed as error:
            tls = os.environ.get("UCX_TLS", "all")
            raise Incompatible(
                f"UCX cannot be used here: {error}; UCX_TLS is {tls}, and must have tcp",
                ucx_tls=tls,
            ) from error
        try:
            address = describe(self._name, begin, num_bytes, agent.metadata())
        except Incompatible:
            agent.close()
            raise
        self._registered = _Registered(
            begin=begin,
            num_bytes=num_bytes,
            address=address,
            serving=agent,
            reads=Reads(
                self._open_reader, clock=self._clock, max_peers=self._max_peers, name="kv-nixl"
            ),
        )

    def describe(self) -> TransportOffer:
        return TransportOffer(name=self.name, address=self._here.address, host=self._host)

    def can_pull(self, offer: TransportOffer) -> bool:
        return offer.name == self.name and offer.host == self._host

    def prepare(self, remote: RemoteHold) -> bool:
        """Always: what is missing is opened when it is first pulled."""
        return True

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        """Whether the hold lasted is left to `Release`. A cancelled pull ends after its batch."""
        here = self._here
        num_bytes = sum(copy.num_bytes for copy in copies)
        started = self._clock.now()
        peer = described(remote.offer.address)
        if peer.name != agent_name(remote.worker_id, remote.epoch):
            raise HandoffLost(f"{peer.name} is described, not {remote.worker_id}/{remote.epoch}")
        pull = Pull(
            worker_id=remote.worker_id,
            peer=peer.name,
            metadata=peer.metadata,
            batches=self._batches(here, peer, copies),
        )
        here.reads.start(pull)
        await outcome(pull, patience_s=self._stall_s, quiesce_timeout_s=self._quiesce_timeout_s)
        return PullStats(num_bytes=num_bytes, elapsed_s=self._clock.now() - started)

    def still(self, remote: RemoteHold, blocks: Sequence[BlockGeneration]) -> bool | None:
        """Only the holder can tell."""
        return None

    async def close(self) -> None:
        """Pulls under way end with `PeerUnavailable`."""
        self._is_closed = True
        here, self._registered = self._registered, None
        if here is None:
            return
        over = asyncio.wrap_future(here.reads.close())
        if not await ended(over, within_s=self._quiesce_timeout_s):
            # Whoever waits for a pull hears of it by `QuiescenceLost`.
            log.error("nixl.reads_do_not_end", waited_s=self._quiesce_timeout_s)
        here.serving.close()
        raise_if_cancelled()

    @property
    def _here(self) -> "_Registered":
        if self._is_closed:
            raise PeerUnavailable("the nixl transport is closed")
        assert self._registered is not None, "not registered"
        return self._registered

    def _batches(
        self, here: "_Registered", peer: Described, copies: Sequence[BlockCopy]
    ) -> list[Batch]:
        for copy in copies:
            assert 0 <= copy.target_offset <= here.num_bytes - copy.num_bytes
            if not 0 <= copy.source_offset <= peer.num_bytes - copy.num_bytes:
                raise KvCorrupt(
                    f"{copy.num_bytes} bytes at {copy.source_offset} announced by {peer.name}, "
                    f"which has {peer.num_bytes}"
                )
        return batches_of(
            runs_of(copies, max_bytes=RUN_NUM_BYTES),
            target_begin=here.begin,
            source_begin=peer.begin,
            stall_s=self._stall_s,
            floor_bytes_per_s=self._floor_bytes_per_s,
        )

    def _open_reader(self) -> "_Agent":
        here = self._registered
        if here is None:
            raise ReadFailed("closed")
        self._num_agents += 1  # peers tell our agents apart by their names
        name = f"{self._name}/{self._num_agents}"
        return _Agent(self._library, name, here.begin, here.num_bytes, serves=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Registered:
    """What exists between `register` and `close`."""

    begin: int
    num_bytes: int
    address: str
    serving: "_Agent"
    reads: Reads


class _Agent:
    """One agent of NIXL with one memory. See `ReadAgent`; one that `serves` does not read."""

    def __init__(
        self, library: Any, name: str, begin: int, num_bytes: int, *, serves: bool
    ) -> None:
        config = library.nixlAgentConfig()
        config.useProgThread = serves
        config.pthrDelay = _SERVING_WAIT_US
        memory = library.nixlRegDList(library.DRAM_SEG, [(begin, num_bytes, 0, "")])
        self._library = library
        with _told_by(library):
            self._agent: Any = library.nixlAgent(name, config)
            self._backends = [self._agent.createBackend("UCX", {})]
            self._agent.registerMem(memory, self._backends)

    def metadata(self) -> bytes:
        said: bytes = self._agent.getLocalMD()
        return said

    def add_peer(self, metadata: bytes) -> str:
        with _told_by(self._library):
            name: bytes = self._agent.loadRemoteMD(metadata)
        return name.decode(errors="replace")

    def remove_peer(self, name: str) -> None:
        with suppress(self._library.nixlNotFoundError), _told_by(self._library):
            self._agent.invalidateRemoteMD(name)

    def begin(self, peer: str, *, sources: Ranges, targets: Ranges) -> int:
        lists, memory = self._library.nixlXferDList, self._library.DRAM_SEG
        with _told_by(self._library):
            handle: int = self._agent.createXferReq(
                self._library.NIXL_READ,
                lists(memory, targets),
                lists(memory, sources),
                peer,
                b"",
                self._backends,
            )
            self._agent.postXferReq(handle, b"")
        return handle

    def is_over(self, handle: int) -> bool:
        with _told_by(self._library):
            state = self._agent.getXferStatus(handle)
        if state == self._library.NIXL_SUCCESS:
            return True
        if state == self._library.NIXL_IN_PROG:
            return False
        raise ReadFailed(f"state {state}")

    def forget(self, handle: int) -> None:
        with _told_by(self._library):
            self._agent.releaseXferReq(handle)

    def close(self) -> None:
        self._agent = None  # the last reference: UCX's worker ends, and its connections


@contextmanager
def _told_by(library: Any) -> Iterator[None]:
    """Raise what NIXL raises as `ReadFailed`."""
    try:
        yield
    except (library.nixlMismatchError, library.nixlInvalidParamError) as error:
        raise ReadFailed(str(error), is_nonsense=True) from error
    except (
        library.nixlBackendError,
        library.nixlCancelledError,
        library.nixlNotFoundError,
        library.nixlNotSupportedError,
        library.nixlRemoteDisconnectError,
        library.nixlUnknownError,
    ) as error:
        raise ReadFailed(str(error)) from error


def _library() -> Any:
    """NIXL's bindings, told to be quiet and to stay on this machine, unless told otherwise.

    Raises:
        Incompatible: not installed.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")
    os.environ.setdefault("UCX_LOG_LEVEL", "fatal")
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    for package in _PACKAGES:
        with suppress(ImportError):
            return importlib.import_module(f"{package}._bindings")
    raise Incompatible("the nixl transport needs NIXL: install kvrelay[nixl]")
