"""One communicator of two ranks: opened, used for one transfer at a time, and ended safely.

1. `open` joins in the link's own thread, with a deadline. CuPy's constructor cannot be interrupted
   and leaves no handle before it returns, so a join that hangs is lost for good.
2. `transfer` enqueues one group of sends or receives and waits for the stream, looking meanwhile
   whether the library has noticed an error.
3. After any error the communicator is aborted. That alone proves nothing about the stream, so the
   stream is awaited too; only then may anybody touch the memory again.

All calls of a communicator are made in the link's thread, but for `abort` and `check_async_error`,
which are there to be called while that thread waits.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog

from kvrelay.errors import PeerUnavailable, QuiescenceLost, ServingError
from kvrelay.transfer.cuda_runtime import CudaApi, CudaStream, DeviceFailed
from kvrelay.transfer.side_thread import SideThread, ended, raise_if_cancelled

UNIQUE_ID_NUM_BYTES = 128

HOLDER_RANK, PULLER_RANK = 0, 1

T = TypeVar("T")

OnLost = Callable[[QuiescenceLost], None]
"""Told of what nobody waits for: the process must end."""

log = structlog.get_logger(__name__)


class Communicator(Protocol):
    """Two ranks, of which we are one. Every method may raise `DeviceFailed`."""

    def send(self, pointer: int, num_bytes: int, *, peer: int, stream: int) -> None: ...

    def recv(self, pointer: int, num_bytes: int, *, peer: int, stream: int) -> None: ...

    def check_async_error(self) -> None:
        """Raise what went wrong after a call had returned. Does not wait."""
        ...

    def abort(self) -> None:
        """Give up what is under way and the communicator with it. Safe to repeat."""
        ...


class NcclApi(Protocol):
    """What is needed of NCCL, as CuPy has it. Every method may raise `DeviceFailed`."""

    def version(self) -> int: ...

    def unique_id(self) -> bytes:
        """`UNIQUE_ID_NUM_BYTES` bytes. Whoever knows them can join: a secret of two workers."""
        ...

    def join(self, unique_id: bytes, *, rank: int) -> Communicator:
        """Wait for the other rank, however long that takes."""
        ...

    def group(self) -> AbstractContextManager[None]:
        """What is sent and received within begins together at its end."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLimits:
    """How long each part may take before the link is given up."""

    open_timeout_s: float = 20.0
    transfer_timeout_s: float = 10.0
    """For one group."""

    quiesce_timeout_s: float = 5.0
    """For all that is left to end, after a transfer was given up."""

    check_interval_s: float = 0.05
    """NCCL tells nobody of an error; it has to be asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank:
    """This process's side of any link: its device, its registered memory, its part."""

    nccl: NcclApi
    cuda: CudaApi
    begin: int
    num_bytes: int
    rank: int

    @property
    def peer(self) -> int:
        return 1 - self.rank


class NcclLink:
    """See the module. Broken for good after any error; `close` it in every case."""

    def __init__(self, rank: Rank, *, name: str, limits: LinkLimits) -> None:
        self._rank = rank
        self._name = name
        self._limits = limits
        self._thread = SideThread(f"kv-nccl-{name}")
        self._communicator: Communicator | None = None
        self._stream: CudaStream | None = None
        self._broken_by: asyncio.Future[ServingError] | None = None
        self._is_over = False
        self._dropping: asyncio.Future[None] | None = None

    async def unique_id(self) -> bytes:
        """A name for a new pair, for both sides to `open` with.

        Raises:
            PeerUnavailable: NCCL has none.
        """
        return await self._called(self._new_unique_id)

    async def open(self, unique_id: bytes) -> None:
        """Join with whoever has the same `unique_id`.

        Raises:
            PeerUnavailable: NCCL refused.
            QuiescenceLost: the call has not come back. Nothing of the cache is in danger, but
                nothing will ever free what the call holds, short of the end of the process.
        """
        await self._called(partial(self._join, unique_id))

    async def transfer(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Send or receive, by our rank, (offset, num_bytes) of our memory, in this order.

        On return the copies are over on this side. On any exception, too, but `QuiescenceLost`.

        Raises:
            PeerUnavailable: it failed, took too long, or was broken off.
            QuiescenceLost: nobody can tell whether something still reads or writes the ranges.
        """
        assert self.is_usable, "not open"
        assert all(0 <= offset <= self._rank.num_bytes - size for offset, size in ranges)
        self._broken_by = asyncio.get_running_loop().create_future()
        moving = self._thread.call(partial(self._move, ranges))
        is_whole = False
        try:
            await self._watched(moving)
            is_whole = True
        except DeviceFailed as error:
            raise PeerUnavailable(f"nccl link {self._name}: {error}") from error
        finally:
            self._broken_by = None
            if not is_whole:
                await self._quieten(moving)

    def break_off(self, error: ServingError) -> None:
        """Have the transfer under way, if any, end with `error`."""
        if self._broken_by is not None and not self._broken_by.done():
            self._broken_by.set_result(error)

    async def close(self) -> None:
        """Give up an idle or broken link, or one that is still being opened. Safe to repeat."""
        assert self._broken_by is None, "a transfer is under way"
        if not await ended(self._end(), within_s=self._limits.quiesce_timeout_s):
            log.warning("nccl.close_hangs", link=self._name)
        raise_if_cancelled()

    @property
    def is_usable(self) -> bool:
        return self._communicator is not None and not self._is_over

    async def _called(self, function: Callable[[], T]) -> T:
        calling = self._thread.call(function)
        is_over = False
        try:
            await asyncio.wait([calling], timeout=self._limits.open_timeout_s)
            is_over = calling.done()
        finally:
            if not is_over:
                self._end()  # whatever comes of the call is dropped in its thread
        if not is_over:
            raise QuiescenceLost(
                f"nccl link {self._name} was not open within {self._limits.open_timeout_s} s"
            )
        try:
            return calling.result()
        except DeviceFailed as error:
            raise PeerUnavailable(f"nccl link {self._name}: {error}") from error

    async def _watched(self, moving: "asyncio.Future[None]") -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.transfer_timeout_s
        assert self._communicator is not None
        assert self._broken_by is not None
        while not moving.done():
            left_s = until - loop.time()
            if left_s <= 0:
                raise PeerUnavailable(
                    f"nccl link {self._name}: a transfer took more than "
                    f"{self._limits.transfer_timeout_s} s"
                )
            either: list[asyncio.Future[Any]] = [moving, self._broken_by]
            look_s = min(left_s, self._limits.check_interval_s)
            await asyncio.wait(either, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
            if self._broken_by.done():
                raise self._broken_by.result()
            # After the end, too: a stream that has passed says nothing of what failed in it.
            self._communicator.check_async_error()
        moving.result()

    async def _quieten(self, moving: "asyncio.Future[None]") -> None:
        """Return when nothing of the transfer goes on, on this side, any more.

        Raises:
            QuiescenceLost: that could not be found out in time.
        """
        assert self._communicator is not None
        assert self._stream is not None
        self._is_over = True
        loop = asyncio.get_running_loop()
        until = loop.time() + self._limits.quiesce_timeout_s
        aborter = SideThread(f"kv-nccl-{self._name}-abort")
        aborting = aborter.call(self._communicator.abort)
        aborter.close()
        quiet = self._thread.call(self._stream.synchronize)  # after `moving`, in the same thread
        dropping = self._end(aborts=False)  # never twice at once
        for step in (aborting, quiet):
            if not await ended(step, within_s=until - loop.time()):
                raise QuiescenceLost(
                    f"nccl link {self._name} is not quiet "
                    f"{self._limits.quiesce_timeout_s} s after it was given up"
                )
        if isinstance(moving.exception(), DeviceFailed):
            log.info("nccl.broke", link=self._name, problem=str(moving.exception()))
        if isinstance(error := quiet.exception(), DeviceFailed):
            raise QuiescenceLost(f"nccl link {self._name}: {error}") from error
        await ended(dropping, within_s=until - loop.time())
        raise_if_cancelled()

    def _end(self, *, aborts: bool = True) -> "asyncio.Future[None]":
        """Have the link's thread drop all that it has, and end. Only the first call counts."""
        self._is_over = True
        if self._dropping is None:
            self._dropping = self._thread.call(partial(self._drop, aborts=aborts))
            self._thread.close()
        return self._dropping

    def _new_unique_id(self) -> bytes:
        self._rank.cuda.use_device()
        return self._rank.nccl.unique_id()

    def _join(self, unique_id: bytes) -> None:
        self._rank.cuda.use_device()
        self._stream = self._rank.cuda.open_stream()
        self._communicator = self._rank.nccl.join(unique_id, rank=self._rank.rank)

    def _move(self, ranges: Sequence[tuple[int, int]]) -> None:
        assert self._communicator is not None
        assert self._stream is not None
        is_holder = self._rank.rank == HOLDER_RANK
        move = self._communicator.send if is_holder else self._communicator.recv
        with self._rank.nccl.group():
            for offset, num_bytes in ranges:
                pointer = self._rank.begin + offset
                move(pointer, num_bytes, peer=self._rank.peer, stream=self._stream.pointer)
        self._stream.synchronize()

    def _drop(self, *, aborts: bool) -> None:
        with suppress(DeviceFailed):
            if aborts and self._communicator is not None:
                # Otherwise it is destroyed when it is collected, which waits for the other rank.
                self._communicator.abort()
            if self._stream is not None:
                self._stream.close()
