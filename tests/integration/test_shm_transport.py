"""What only `shm` promises: who is passed memory, what is mapped, and when it is let go."""

import asyncio
import fcntl
import gc
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.clock import MonotonicClock
from kvrelay.errors import HandoffLost, KvCorrupt, PeerUnavailable
from kvrelay.transfer import manifest
from kvrelay.transfer.base import BlockCopy, BlockGeneration, RemoteHold
from kvrelay.transfer.refusals import RETRY_S
from kvrelay.transfer.runs import Run, runs_of
from kvrelay.transfer.shm import ShmTransport
from kvrelay.transfer.shm_serve import ADDRESS_PREFIX, DescriptorServer
from kvrelay.types import BlockId, TransportOffer
from tests.support.clock import ManualClock
from tests.support.kv_peer import HANDOFF, SMALL, copies_of, open_peer

GOOD = manifest.MemoryManifest(
    worker_id="p",
    epoch="e",
    num_bytes=10_000,
    resident_num_bytes=9_000,
    num_blocks=4,
    generations_offset=9_984,
)


def remote_at(address: str) -> RemoteHold:
    return RemoteHold(
        handoff_id=HANDOFF,
        worker_id=GOOD.worker_id,
        epoch=GOOD.epoch,
        address="",
        offer=TransportOffer(name="shm", address=address, host=""),
    )


def num_mapped() -> int:
    gc.collect()  # of errors kept by earlier tests, whose tracebacks refer to caches
    return Path("/proc/self/maps").read_text().count("memfd:")


@contextmanager
def memory(num_bytes: int, *, sealed: bool) -> Iterator[int]:
    fd = os.memfd_create("test", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, num_bytes)
    if sealed:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    yield fd
    os.close(fd)


@pytest.mark.parametrize(
    ("said", "num_bytes", "sealed", "error"),
    [
        (GOOD, GOOD.num_bytes, False, KvCorrupt),
        (GOOD, GOOD.num_bytes - 1, True, KvCorrupt),
        (GOOD, GOOD.num_bytes + 1, True, KvCorrupt),
        (replace(GOOD, epoch="other"), GOOD.num_bytes, True, HandoffLost),
        (replace(GOOD, worker_id="other"), GOOD.num_bytes, True, HandoffLost),
    ],
    ids=["unsealed", "short", "long", "other-epoch", "other-worker"],
)
async def test_memory_that_is_not_what_was_promised_is_never_mapped(said, num_bytes, sealed, error):
    """A holder that lies, or is not the one meant, costs a refusal and nothing else."""
    async with open_peer("shm", worker_id="d") as puller:
        mapped = num_mapped()
        with memory(num_bytes, sealed=sealed) as fd:
            server = DescriptorServer(fd, manifest.encode(said), max_peers=4)
            with pytest.raises(error):
                await puller.transport.pull(remote_at(server.address), copies_of([(0, 0)]))
            server.close()
        assert num_mapped() == mapped


@pytest.mark.parametrize(
    "address",
    ["", "/etc/passwd", "other", ADDRESS_PREFIX + "0" * 32, ADDRESS_PREFIX + "x" * 200],
)
async def test_an_address_that_no_holder_has_is_unavailable(address):
    """Also one that is no abstract name of ours: nothing else is ever dialled."""
    async with open_peer("shm", worker_id="d") as puller:
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(remote_at(address), copies_of([(0, 0)]))


@pytest.mark.parametrize("messages", [[b"\xc1"], [b"x" * 5000], []], ids=["junk", "long", "eof"])
async def test_a_holder_that_passes_no_descriptor_is_refused(messages):
    """Whatever it says instead."""
    address = ADDRESS_PREFIX + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(b"\0" + address.encode())
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                for message in messages:
                    connection.send(message)

        thread = threading.Thread(target=serve)
        thread.start()
        async with open_peer("shm", worker_id="d") as puller:
            with pytest.raises((KvCorrupt, PeerUnavailable)):
                await puller.transport.pull(remote_at(address), copies_of([(0, 0)]))
        thread.join()


async def test_a_holder_that_stands_still_is_unavailable_in_time():
    """Its kernel accepts, it never answers: the connect timeout ends the wait."""
    address = ADDRESS_PREFIX + secrets.token_hex(8)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(b"\0" + address.encode())
        listener.listen()
        transport = ShmTransport(
            worker_id="d", epoch="e", clock=MonotonicClock(), connect_timeout_s=0.05
        )
        async with open_peer("shm", transport=transport) as puller:
            with pytest.raises(PeerUnavailable, match="TimeoutError"):
                await puller.transport.pull(remote_at(address), copies_of([(0, 0)]))


async def test_closing_while_a_peer_is_being_mapped_leaves_nothing():
    """The pull that comes back with a mapping finds the transport closed, and unmaps."""
    async with open_peer("shm") as holder, open_peer("shm", worker_id="d") as puller:
        mapped, num_fds = num_mapped(), len(os.listdir("/proc/self/fd"))
        pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies_of([(0, 0)])))
        await asyncio.sleep(0)  # it has connected, and waits for the descriptor
        await puller.transport.close()
        with pytest.raises(PeerUnavailable):
            await pulling
        assert num_mapped() == mapped
        assert len(os.listdir("/proc/self/fd")) <= num_fds


@pytest.mark.parametrize("num_turns", range(8))
async def test_a_pull_cancelled_while_it_connects_leaves_nothing(num_turns):
    """At whichever of its steps: once both sides closed, no descriptor or mapping is left."""
    idle = num_mapped(), len(os.listdir("/proc/self/fd"))
    async with open_peer("shm") as holder, open_peer("shm", worker_id="d") as puller:
        pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies_of([(0, 0)])))
        for _ in range(num_turns):
            await asyncio.sleep(0)
        pulling.cancel()
        await asyncio.wait([pulling])
        del pulling  # its traceback refers to the cache
        await puller.transport.pull(holder.hold(), copies_of([(1, 1)]))
        assert puller.block(1) == holder.block(1)
    assert (num_mapped(), len(os.listdir("/proc/self/fd"))) == idle


async def test_a_source_outside_of_the_holders_cache_is_refused():
    """An announcement of a block that does not exist reads nothing."""
    async with open_peer("shm") as holder, open_peer("shm", worker_id="d") as puller:
        outside = holder.cache.num_bytes
        for offset in (outside - SMALL.block_num_bytes + 1, outside, 1 << 60):
            before = puller.block(0)
            (inside,) = copies_of([(0, 0)])
            with pytest.raises(KvCorrupt, match=f"at {offset} announced by prefill-0"):
                await puller.transport.pull(
                    holder.hold(), [inside, replace(inside, source_offset=offset)]
                )
            assert puller.block(0) == before


async def test_the_descriptor_passed_on_cannot_be_written_through():
    """A puller reads; it never writes into the holder."""
    async with open_peer("shm") as holder:
        address = b"\0" + holder.transport.describe().address.encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(address)
            _, (fd,), _, _ = socket.recv_fds(connection, manifest.MAX_MANIFEST_BYTES, 1)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(fd, b"x", 0)
            os.close(fd)


async def test_a_dead_holders_memory_is_unmapped_without_another_pull():
    """Its pages would otherwise be lost to the machine."""
    async with open_peer("shm", worker_id="d") as puller:
        mapped = num_mapped()
        async with open_peer("shm") as holder:
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        for _ in range(3):  # turns of the loop, for it to see the end of the connection
            await asyncio.sleep(0)
        assert num_mapped() == mapped


async def test_only_so_many_peers_stay_mapped():
    """The least recently used goes, and is mapped again when needed."""
    transport = ShmTransport(worker_id="d", epoch="e", clock=MonotonicClock(), max_peers=2)
    async with (
        open_peer("shm", worker_id="a", seed=1) as a,
        open_peer("shm", worker_id="b", seed=2) as b,
        open_peer("shm", worker_id="c", seed=3) as c,
        open_peer("shm", transport=transport) as puller,
    ):
        base = num_mapped()
        for holder, most in ((a, 1), (b, 2), (a, 2), (c, 2), (a, 2), (b, 2)):
            await puller.transport.pull(holder.hold(), copies_of([(1, 1)]))
            assert puller.block(1) == holder.block(1)
            assert num_mapped() == base + most


async def test_a_holder_turns_away_more_peers_than_it_has_room_for():
    """Who is inside stays inside."""
    holder_transport = ShmTransport(
        worker_id="prefill-0", epoch="e1", clock=MonotonicClock(), max_peers=1
    )
    async with (
        open_peer("shm", transport=holder_transport) as holder,
        open_peer("shm", worker_id="d1") as first,
        open_peer("shm", worker_id="d2") as second,
    ):
        await first.transport.pull(holder.hold(), copies_of([(0, 0)]))
        with pytest.raises(PeerUnavailable):
            await second.transport.pull(holder.hold(), copies_of([(0, 0)]))
        await first.transport.pull(holder.hold(), copies_of([(0, 0)]))


async def test_who_was_turned_away_leaves_pulls_to_other_transports():
    """For a while; then it is tried again, and nobody waits for that."""
    clock = ManualClock()
    holder_transport = ShmTransport(
        worker_id="prefill-0", epoch="e1", clock=MonotonicClock(), max_peers=1
    )
    second_transport = ShmTransport(worker_id="d2", epoch="e", clock=clock)
    async with (
        open_peer("shm", transport=holder_transport) as holder,
        open_peer("shm", transport=second_transport) as second,
        open_peer("shm", worker_id="prefill-1") as other,
    ):
        async with open_peer("shm", worker_id="d1") as first:
            await first.transport.pull(holder.hold(), copies_of([(0, 0)]))
            assert second.transport.prepare(holder.hold())
            with pytest.raises(PeerUnavailable):
                await second.transport.pull(holder.hold(), copies_of([(0, 0)]))
            assert not second.transport.prepare(holder.hold())
            assert second.transport.prepare(other.hold())
        clock.advance(0.9 * RETRY_S)
        assert not second.transport.prepare(holder.hold())
        clock.advance(0.1 * RETRY_S)
        async with asyncio.timeout(5):
            while not second.transport.prepare(holder.hold()):
                await asyncio.sleep(0.001)
                clock.advance(RETRY_S)
        await second.transport.pull(holder.hold(), copies_of([(0, 0)]))
        assert second.block(0) == holder.block(0)


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=24),
    st.integers(1, 5),
)
def test_runs_are_the_copies_in_order(pairs, max_blocks):
    """Joining neighbours changes neither what is copied nor the order, and keeps the bound."""
    size = SMALL.block_num_bytes
    runs = runs_of(copies_of(pairs), max_bytes=max_blocks * size)
    assert all(size <= run.num_bytes <= max_blocks * size for run in runs)
    spread = [
        ((run.source_offset + at) // size, (run.target_offset + at) // size)
        for run in runs
        for at in range(0, run.num_bytes, size)
    ]
    assert spread == pairs


def test_neighbours_are_one_run():
    """A whole handoff that lies in one piece on both sides is one copy."""
    copies = copies_of([(i + 3, i + 9) for i in range(40)])
    (run,) = runs_of(copies, max_bytes=1 << 30)
    assert (run.source_offset, run.num_bytes) == (
        copies[0].source_offset,
        40 * SMALL.block_num_bytes,
    )


def test_copies_of_any_size_are_joined_where_they_meet():
    """A transport knows nothing of blocks: ranges of bytes may be of any size."""
    sizes = (1, 100, 3, 4096)
    starts = (7, 8, 108, 111)
    copies = [
        BlockCopy(index=i, source_offset=start, target_offset=start + 50, num_bytes=size)
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    assert runs_of(copies, max_bytes=1 << 20) == [Run(7, 57, sum(sizes))]
    assert [run.num_bytes for run in runs_of(copies, max_bytes=104)] == [104, 4096]


async def test_bytes_written_by_the_holder_are_seen_without_remapping():
    """The mapping is the memory itself."""
    async with open_peer("shm") as holder, open_peer("shm", worker_id="d") as puller:
        for value in range(5):
            holder.cache.block_bytes(2)[:] = np.full(SMALL.block_num_bytes, value, np.uint8).data
            await puller.transport.pull(holder.hold(), copies_of([(2, 7)]))
            assert puller.block(7) == bytes([value]) * SMALL.block_num_bytes


async def test_whether_blocks_are_the_same_is_seen_in_the_holders_memory():
    """Only once it is mapped, and while its holder lives; a block it does not have is not the
    same."""

    def block(block_id: int, generation: int) -> BlockGeneration:
        return BlockGeneration(BlockId(block_id), generation)

    async with open_peer("shm", worker_id="d") as puller:
        async with open_peer("shm") as holder:
            remote, still = holder.hold(), puller.transport.still
            unmapped = still(remote, [block(3, 0)])
            await puller.transport.pull(remote, copies_of([(3, 0)]))
            told = [still(remote, []), still(remote, [block(3, 0), block(15, 0)])]
            holder.cache.generations[3] = (1 << 32) - 1
            then = [
                still(remote, [block(3, 0)]),
                still(remote, [block(2, 0), block(3, (1 << 32) - 1)]),
                still(remote, [block(16, 0)]),
                still(holder.hold(epoch="e2"), [block(2, 0)]),
            ]
        gone = still(remote, [block(2, 0)])

    assert (unmapped, told) == (None, [True, True])
    assert then == [False, True, False, None]
    assert gone is None
