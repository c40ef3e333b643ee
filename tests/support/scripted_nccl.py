"""NCCL without a device: bytes go from one host address to another, between two threads.

A `ScriptedFabric` joins all that use it; each `ScriptedNccl` is one process's library and says what
goes wrong there. Like the real one, a send ends when the other side has received, nobody is told of
anything, and an aborted communicator lets go of what it waits for, unless it is scripted to hang.
"""

import ctypes
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from kvrelay.transfer.cuda_runtime import DeviceFailed
from tests.support.scripted_cuda import ScriptedMachine, open_gate

VERSION = 22809

PIECE_NUM_BYTES = 1 << 16
"""Bytes come in pieces, so that a transfer can be met halfway."""


@dataclass
class _Pair:
    """What two ranks share: who is there, and what is on its way."""

    ranks: dict[int, "ScriptedCommunicator"] = field(default_factory=dict)
    sent: list[bytes] = field(default_factory=list)
    num_received: int = 0


class ScriptedFabric:
    """Where ranks meet."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.pairs: dict[bytes, _Pair] = {}
        self.is_released = False
        self._numbers = itertools.count(1)

    def unique_id(self) -> bytes:
        unique_id = next(self._numbers).to_bytes(128, "big")
        self.pairs[unique_id] = _Pair()
        return unique_id

    def release(self) -> None:
        """Let go of whoever waits, at the end of a test."""
        with self.changed:
            self.is_released = True
            self.changed.notify_all()


class ScriptedNccl:
    """See `NcclApi`."""

    def __init__(self, fabric: ScriptedFabric, machine: ScriptedMachine) -> None:
        self.fabric = fabric
        self.machine = machine
        self.number = VERSION
        self.joins = open_gate()
        self.moves = open_gate()
        """A move at this gate hears no abort; past it, it does what it was to do."""
        self.aborts = open_gate()
        self.refuses_to_join = False
        self.fails_late = False
        self.moving = threading.Event()
        self.num_aborted = 0
        self.communicators: list[ScriptedCommunicator] = []
        self._group = threading.local()

    def version(self) -> int:
        return self.number

    def unique_id(self) -> bytes:
        return self.fabric.unique_id()

    def join(self, unique_id: bytes, *, rank: int) -> "ScriptedCommunicator":
        self.joins.wait()
        if self.refuses_to_join:
            raise DeviceFailed("NCCL_ERROR_SYSTEM_ERROR: scripted")
        communicator = ScriptedCommunicator(self, self.fabric.pairs[unique_id], rank)
        self.communicators.append(communicator)
        with self.fabric.changed:
            communicator.pair.ranks[rank] = communicator
            self.fabric.changed.notify_all()
            self.fabric.changed.wait_for(
                lambda: len(communicator.pair.ranks) == 2 or self.fabric.is_released
            )
        return communicator

    @contextmanager
    def group(self) -> Iterator[None]:
        self._group.is_open = True
        yield
        self._group.is_open = False

    def require_group(self) -> None:
        assert getattr(self._group, "is_open", False), "not in a group"

    def die(self) -> None:
        """As if this process had been killed: its peers wait, and may ask why."""
        with self.fabric.changed:
            for communicator in self.communicators:
                communicator.is_dead = True
            self.fabric.changed.notify_all()


class ScriptedCommunicator:
    """See `Communicator`."""

    def __init__(self, nccl: ScriptedNccl, pair: _Pair, rank: int) -> None:
        self.pair = pair
        self.is_dead = False
        self.is_aborted = False
        self._nccl = nccl
        self._rank = rank
        self._has_moved = False

    def send(self, pointer: int, num_bytes: int, *, peer: int, stream: int) -> None:
        self._nccl.require_group()
        assert peer == 1 - self._rank
        self._nccl.machine.streams[stream].enqueue(lambda: self._sent(pointer, num_bytes))

    def recv(self, pointer: int, num_bytes: int, *, peer: int, stream: int) -> None:
        self._nccl.require_group()
        assert peer == 1 - self._rank
        self._nccl.machine.streams[stream].enqueue(lambda: self._received(pointer, num_bytes))

    def check_async_error(self) -> None:
        assert not self.is_aborted, "asked after it was aborted"
        other = self.pair.ranks[1 - self._rank]
        if other.is_dead:
            raise DeviceFailed("NCCL_ERROR_REMOTE_ERROR: scripted")
        if self._nccl.fails_late and self._has_moved:
            raise DeviceFailed("NCCL_ERROR_INTERNAL_ERROR: scripted, and late")

    def abort(self) -> None:
        assert not self.is_aborted, "aborted twice"
        self._nccl.aborts.wait()
        with self._nccl.fabric.changed:
            self.is_aborted = True
            self._nccl.num_aborted += 1
            self._nccl.fabric.changed.notify_all()

    def _sent(self, pointer: int, num_bytes: int) -> None:
        self._nccl.moving.set()
        self._nccl.moves.wait()
        data = ctypes.string_at(pointer, num_bytes)
        with self._nccl.fabric.changed:
            if self._is_over:
                return
            self.pair.sent.append(data)
            number = len(self.pair.sent)
            self._nccl.fabric.changed.notify_all()
            self._nccl.fabric.changed.wait_for(
                lambda: self.pair.num_received >= number or self._is_over
            )
        self._has_moved = True

    def _received(self, pointer: int, num_bytes: int) -> None:
        with self._nccl.fabric.changed:
            self._nccl.fabric.changed.wait_for(self._is_due_or_over(num_bytes))
            if self._is_over:
                return
            data = self.pair.sent[self.pair.num_received]
        for begin in range(0, num_bytes, PIECE_NUM_BYTES):
            piece = data[begin : begin + PIECE_NUM_BYTES]
            ctypes.memmove(pointer + begin, piece, len(piece))
            self._nccl.moving.set()
            self._nccl.moves.wait()
        with self._nccl.fabric.changed:
            self.pair.num_received += 1
            self._nccl.fabric.changed.notify_all()
        self._has_moved = True

    def _is_due_or_over(self, num_bytes: int):
        pair = self.pair

        def is_it() -> bool:
            is_there = len(pair.sent) > pair.num_received
            # Sizes that differ never meet, as the real ones do not.
            return self._is_over or (is_there and len(pair.sent[pair.num_received]) == num_bytes)

        return is_it

    @property
    def _is_over(self) -> bool:
        return self.is_aborted or self.is_dead or self._nccl.fabric.is_released
