"""The mapped memories of peers: at most so many, each only for as long as its holder lives."""

import asyncio
import ctypes
import fcntl
import mmap
import os
import socket
import sys
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import numpy as np
import numpy.typing as npt
import structlog

from kvrelay.clock import Clock
from kvrelay.errors import HandoffLost, KvCorrupt, PeerUnavailable
from kvrelay.transfer import manifest
from kvrelay.transfer.base import RemoteHold
from kvrelay.transfer.refusals import Refusals
from kvrelay.transfer.shm_serve import ADDRESS_PREFIX, peer_uid
from kvrelay.transfer.side_thread import ended, raise_if_cancelled

_MAX_ADDRESS_CHARS = 100

_POPULATE_TIMEOUT_S = 10.0

_MADV_POPULATE_READ = 22
"""Of <linux/mman.h>, since 5.14."""

log = structlog.get_logger(__name__)


class PeerMemory:
    """One peer's cache, mapped read-only, and the connection that proves the peer alive."""

    def __init__(self, connection: socket.socket, fd: int, said: manifest.MemoryManifest) -> None:
        self.num_users = 0
        self.is_retired = False
        self.num_bytes = said.num_bytes
        self.closing = ExitStack()
        """What else ends with the mapping, for whoever keeps something beside it."""
        self._connection = connection
        self._loop: asyncio.AbstractEventLoop | None = None
        self._map = mmap.mmap(fd, said.num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._map, np.uint8)
        self._said = said

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        """[num_bytes]; no reference to it may outlive `close`."""
        assert self._bytes is not None, "the mapping is closed"
        return self._bytes

    def generation(self, block_id: int) -> int | None:
        """Of a block of the holder's, as its block pool has it now; None: it has no such block."""
        if not 0 <= block_id < self._said.num_blocks:
            return None
        at = self._said.generations_offset + block_id * manifest.GENERATION_NUM_BYTES
        return int.from_bytes(self.bytes[at : at + manifest.GENERATION_NUM_BYTES], sys.byteorder)

    def populate(self, num_bytes: int) -> None:
        """Enter the first `num_bytes` into our page table, which a copy would do page by page at a
        fifth of its speed. For a thread; nothing is lost where the system cannot.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        num_bytes = num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        libc.madvise(self.bytes.ctypes.data, num_bytes, _MADV_POPULATE_READ)

    def is_alive(self) -> bool:
        """Whether the holder still serves this memory."""
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False  # closed; or it spoke, which a holder never does

    def watch(self, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` in the event loop once the holder is gone, unless closed before."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._connection, on_gone)

    def unwatch(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._connection)
            self._loop = None

    def close(self) -> None:
        self.unwatch()
        self.closing.close()
        self._bytes = None
        self._map.close()
        self._connection.close()


class PeerMemories:
    """Mappings by (worker_id, epoch), the least recently used unmapped first.

    A memory in use is never unmapped: it is retired, and its last user closes it.
    """

    def __init__(self, *, max_peers: int, connect_timeout_s: float, clock: Clock) -> None:
        self._clock = clock
        self._refusals = Refusals()
        self._max_peers = max_peers
        self._connect_timeout_s = connect_timeout_s
        self._memories: OrderedDict[tuple[str, str], PeerMemory] = OrderedDict()
        self._opening: dict[tuple[str, str], asyncio.Task[PeerMemory]] = {}
        self._is_closed = False

    def prepare(self, remote: RemoteHold) -> bool:
        """Begin to map the memory of `remote`'s holder, unless it is mapped; `use` waits for it.

        Returns:
            Whether that is likely to work: not where it did not the last time, such as with a
            holder that has all the peers it can have. That is tried again after a while.
        """
        if self._find(remote) is None and self._refusals.shall_try(remote, self._clock.now()):
            self._begin(remote)
        return not self._refusals.has(remote)

    def _begin(self, remote: RemoteHold) -> "asyncio.Task[PeerMemory]":
        key = (remote.worker_id, remote.epoch)
        opening = self._opening.get(key)
        if opening is None:
            opening = self._opening[key] = asyncio.create_task(self._open(remote))
            opening.add_done_callback(lambda done: self._opened(remote, done))
        return opening

    def _opened(self, remote: RemoteHold, opening: "asyncio.Task[PeerMemory]") -> None:
        del self._opening[(remote.worker_id, remote.epoch)]
        if opening.cancelled():
            return
        error = opening.exception()  # whoever pulls meets it
        if error is None:
            self._refusals.reached(remote)
        elif isinstance(error, PeerUnavailable):
            self._refusals.refused(remote, self._clock.now())

    def known(self, remote: RemoteHold) -> PeerMemory | None:
        """The memory of `remote`'s holder, if it is mapped and the holder lives."""
        return self._find(remote)

    @asynccontextmanager
    async def use(self, remote: RemoteHold) -> AsyncIterator[PeerMemory]:
        """The memory of `remote`'s holder, mapped for as long as the block lasts.

        Raises:
            HandoffLost: another epoch answers: the holder restarted.
            KvCorrupt: what the holder sent is not a sealed cache of the size it claims.
            PeerUnavailable: the holder does not answer.
        """
        memory = self._find(remote)
        while memory is None:
            opening = self._begin(remote)
            await asyncio.wait([opening])  # whoever is cancelled here leaves it to the others
            if opening.cancelled():
                raise PeerUnavailable("the shm transport was closed meanwhile")
            opening.result()
            memory = self._find(remote)
        memory.num_users += 1
        try:
            yield memory
        finally:
            memory.num_users -= 1
            if memory.is_retired and memory.num_users == 0:
                memory.close()

    async def close(self) -> None:
        """Forget all; what is in use is closed by its user."""
        self._is_closed = True
        openings = list(self._opening.values())
        for opening in openings:
            opening.cancel()
        await asyncio.gather(*openings, return_exceptions=True)
        for key in list(self._memories):
            self._retire(key)

    def _find(self, remote: RemoteHold) -> PeerMemory | None:
        key = (remote.worker_id, remote.epoch)
        memory = self._memories.get(key)
        if memory is None:
            return None
        if not memory.is_alive():
            self._retire(key)
            return None
        self._memories.move_to_end(key)
        return memory

    async def _open(self, remote: RemoteHold) -> PeerMemory:
        memory = await self._mapped(remote)
        if self._is_closed:
            memory.close()
            raise PeerUnavailable("the shm transport was closed meanwhile")
        key = (remote.worker_id, remote.epoch)
        for other in [other for other in self._memories if other[0] == remote.worker_id]:
            self._retire(other)  # an older epoch
        while len(self._memories) >= self._max_peers:
            self._retire(next(iter(self._memories)))
        self._memories[key] = memory
        # Mapped memory of a dead holder is memory that nobody else gets.
        memory.watch(lambda: self._retire(key))
        log.info("shm.mapped", holder=remote.worker_id, num_bytes=memory.num_bytes)
        return memory

    async def _mapped(self, remote: RemoteHold) -> PeerMemory:
        address = remote.offer.address
        if not address.startswith(ADDRESS_PREFIX) or len(address) > _MAX_ADDRESS_CHARS:
            raise PeerUnavailable(f"holder {remote.worker_id} offers no address to map from")
        with ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            raw, fd = await self._ask(connection, remote)
            try:
                said = self._checked(raw, fd, remote)
                memory = PeerMemory(connection, fd, said)
                await _populated(memory, said.resident_num_bytes)
            except OSError as error:
                raise PeerUnavailable(
                    f"the memory of {remote.worker_id} cannot be mapped: {error.strerror}"
                ) from error
            finally:
                os.close(fd)
            undo.pop_all()  # the connection now closes with the mapping
        return memory

    async def _ask(self, connection: socket.socket, remote: RemoteHold) -> tuple[bytes, int]:
        connection.setblocking(False)
        address = b"\0" + remote.offer.address.encode()
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await asyncio.get_running_loop().sock_connect(connection, address)
                await _readable(connection)
            if peer_uid(connection) != os.geteuid():
                raise PeerUnavailable(f"holder {remote.worker_id} is another user's process")
            raw, fds, flags, _ = socket.recv_fds(
                connection, manifest.MAX_MANIFEST_BYTES, 1, socket.MSG_CMSG_CLOEXEC
            )
        except (OSError, TimeoutError) as error:
            raise PeerUnavailable(
                f"holder {remote.worker_id} does not pass its memory: {type(error).__name__}"
            ) from error
        if not raw:
            raise PeerUnavailable(f"holder {remote.worker_id} turned us away")
        if len(fds) != 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            for fd in fds:
                os.close(fd)
            raise KvCorrupt(f"holder {remote.worker_id} sent no descriptor or too much")
        return raw, fds[0]

    def _checked(self, raw: bytes, fd: int, remote: RemoteHold) -> manifest.MemoryManifest:
        """The manifest, once everything that mapping relies on was found true."""
        said = manifest.decode(raw)
        if (said.worker_id, said.epoch) != (remote.worker_id, remote.epoch):
            raise HandoffLost(
                f"worker {said.worker_id} of epoch {said.epoch} answers for "
                f"{remote.worker_id} of epoch {remote.epoch}"
            )
        if os.fstat(fd).st_size != said.num_bytes:
            raise KvCorrupt(f"memory of {os.fstat(fd).st_size} bytes, {said.num_bytes} announced")
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        except OSError as error:
            raise KvCorrupt("memory that cannot be sealed") from error
        if not seals & fcntl.F_SEAL_SHRINK:
            # A file that shrinks under a mapping kills whoever reads there.
            raise KvCorrupt("memory whose size is not sealed")
        return said

    def _retire(self, key: tuple[str, str]) -> None:
        memory = self._memories.pop(key)
        memory.unwatch()
        memory.is_retired = True
        if memory.num_users == 0:
            memory.close()


async def _populated(memory: PeerMemory, num_bytes: int) -> None:
    """Whoever is cancelled waits all the same: the mapping must outlive the thread."""
    populating = asyncio.get_running_loop().run_in_executor(None, memory.populate, num_bytes)
    await ended(populating, within_s=_POPULATE_TIMEOUT_S)
    try:
        raise_if_cancelled()
    except asyncio.CancelledError:
        memory.close()
        raise


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_reader(connection, _set, ready)
    try:
        await ready
    finally:
        loop.remove_reader(connection)


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
