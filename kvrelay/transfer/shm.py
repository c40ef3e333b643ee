"""KV between processes of one host: the puller maps the holder's memory and copies from it.

1. `register` serves the descriptor of our own cache (`shm_serve`).
2. The first pull from a peer maps that peer's cache, read-only (`shm_map`).
3. A pull is then one copy of each block, in a thread of its own, which digests what it has copied
   while that is still near the processor.
"""

import asyncio
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvrelay.clock import Clock
from kvrelay.errors import KvCorrupt, PeerUnavailable
from kvrelay.kv.cache import KvCache
from kvrelay.transfer import manifest
from kvrelay.transfer.base import BlockCopy, BlockGeneration, PullStats, RemoteHold
from kvrelay.transfer.digest import BlockDigest
from kvrelay.transfer.host import host_identity
from kvrelay.transfer.shm_map import PeerMemories, PeerMemory
from kvrelay.transfer.shm_serve import DescriptorServer
from kvrelay.types import TransportOffer

_PIECE_NUM_BYTES = 512 << 10
"""Most bytes copied at once, and between two looks at whether the pull is still wanted. Large
copies go past the processor's caches, and are a sixth slower than as many small ones."""


class ShmTransport:
    """See `KvTransport`. For processes of one user on one host, in one network namespace."""

    name = "shm"
    lands_on: Literal["host", "device"] = "host"

    def __init__(
        self,
        *,
        worker_id: str,
        epoch: str,
        clock: Clock,
        max_peers: int = 64,
        connect_timeout_s: float = 2.0,
        digests: bool = True,
    ) -> None:
        """Without `digests` they are the caller's to take, of memory that has cooled down."""
        self._has_digests = digests
        self._worker_id = worker_id
        self._epoch = epoch
        self._max_peers = max_peers
        self._connect_timeout_s = connect_timeout_s
        self._clock = clock
        self._host = host_identity()
        self._registered: _Registered | None = None
        self._stops: set[threading.Event] = set()
        self._is_closed = False

    def register(self, cache: KvCache) -> None:
        """`cache` must be shareable."""
        assert self._registered is None, "registered twice"
        assert cache.fd is not None, "the cache is not shareable"
        said = manifest.MemoryManifest(
            worker_id=self._worker_id,
            epoch=self._epoch,
            num_bytes=cache.num_bytes,
            resident_num_bytes=cache.staging_offset,
            num_blocks=cache.num_blocks,
            generations_offset=cache.generations_offset,
        )
        self._registered = _Registered(
            memory=cache.bytes,
            server=DescriptorServer(cache.fd, manifest.encode(said), max_peers=self._max_peers),
            peers=PeerMemories(
                max_peers=self._max_peers,
                connect_timeout_s=self._connect_timeout_s,
                clock=self._clock,
            ),
            executor=ThreadPoolExecutor(1, thread_name_prefix="kv-shm-copy"),
        )

    def describe(self) -> TransportOffer:
        return TransportOffer(name=self.name, address=self._here.server.address, host=self._host)

    def can_pull(self, offer: TransportOffer) -> bool:
        return offer.name == self.name and offer.host == self._host

    def prepare(self, remote: RemoteHold) -> bool:
        """Unless the holder's memory could not be mapped lately. It is mapped meanwhile, and a
        pull waits for that.
        """
        return self._here.peers.prepare(remote)

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        """Whether the hold lasted is left to `Release`."""
        here = self._here
        assert all(0 <= copy.target_offset <= len(here.memory) - copy.num_bytes for copy in copies)
        async with here.peers.use(remote) as memory:
            started = self._clock.now()
            _check_sources(memory, copies, remote)
            digests = await self._copy(memory, copies)
            if digests is None or not memory.is_alive():
                raise PeerUnavailable(f"holder {remote.worker_id} or we went away during a pull")
            return PullStats(
                num_bytes=sum(copy.num_bytes for copy in copies),
                elapsed_s=self._clock.now() - started,
                digests=digests if self._has_digests else None,
            )

    def still(self, remote: RemoteHold, blocks: Sequence[BlockGeneration]) -> bool | None:
        """Looked up in the holder's memory, where its block pool keeps them."""
        memory = self._here.peers.known(remote)
        if memory is None:
            return None
        return all(memory.generation(it.block_id) == it.generation for it in blocks)

    async def close(self) -> None:
        """Pulls under way end with `PeerUnavailable`. Waits for at most one piece's copy."""
        self._is_closed = True
        here, self._registered = self._registered, None
        if here is None:
            return
        for stop in self._stops:
            stop.set()
        here.executor.shutdown()
        await here.peers.close()
        here.server.close()

    @property
    def _here(self) -> "_Registered":
        if self._is_closed:
            raise PeerUnavailable("the shm transport is closed")
        assert self._registered is not None, "not registered"
        return self._registered

    async def _copy(
        self, memory: PeerMemory, copies: Sequence[BlockCopy]
    ) -> tuple[int, ...] | None:
        """Digests of what was copied; None if not all was. When this returns or raises, nothing
        is being copied.
        """
        here = self._here
        stop = threading.Event()
        self._stops.add(stop)
        copying = asyncio.get_running_loop().run_in_executor(
            here.executor,
            _copy_blocks,
            memory,
            here.memory,
            copies,
            stop,
            self._has_digests,
        )
        try:
            return await asyncio.shield(copying)
        except asyncio.CancelledError:
            stop.set()
            while not copying.done():  # however often we are cancelled: the thread still writes
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([copying])
            raise
        finally:
            self._stops.discard(stop)


@dataclass(frozen=True, slots=True)
class _Registered:
    """What exists between `register` and `close`."""

    memory: npt.NDArray[np.uint8]
    server: DescriptorServer
    peers: PeerMemories
    executor: ThreadPoolExecutor


def _check_sources(memory: PeerMemory, copies: Sequence[BlockCopy], remote: RemoteHold) -> None:
    for copy in copies:
        if not 0 <= copy.source_offset <= memory.num_bytes - copy.num_bytes:
            raise KvCorrupt(
                f"{copy.num_bytes} bytes at {copy.source_offset} announced by {remote.worker_id}, "
                f"which has {memory.num_bytes}"
            )


def _copy_blocks(
    memory: PeerMemory,
    target: npt.NDArray[np.uint8],
    copies: Iterable[BlockCopy],
    stop: threading.Event,
    has_digests: bool,
) -> tuple[int, ...] | None:
    """Digests of all that was copied, none if they are not wanted; None if it was stopped."""
    digests: list[int] = []
    for copy in copies:
        landing = target[copy.target_offset : copy.target_offset + copy.num_bytes]
        source = memory.bytes[copy.source_offset : copy.source_offset + copy.num_bytes]
        digest = BlockDigest()
        for first in range(0, copy.num_bytes, _PIECE_NUM_BYTES):
            if stop.is_set():
                return None
            piece = slice(first, first + _PIECE_NUM_BYTES)
            # numpy lets go of the interpreter for the length of each copy.
            np.copyto(landing[piece], source[piece])
            if has_digests:
                digest.update(landing[piece].data)
        digests.append(digest.value)
    return tuple(digests)
