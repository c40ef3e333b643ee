"""What only `nixl` promises: where it listens, what it believes, and peers that stop or die."""

import asyncio
import base64
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.clock import MonotonicClock
from kvrelay.errors import Incompatible, KvCorrupt, PeerUnavailable
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer import nixl
from kvrelay.transfer.base import BlockCopy
from kvrelay.transfer.nixl_offer import describe, described
from kvrelay.types import TransportOffer
from tests.support.kv_peer import (
    SMALL,
    ChildPeer,
    copies_of,
    make_transport,
    open_child,
    open_peer,
    why_not,
)

pytestmark = pytest.mark.skipif(why_not("nixl") is not None, reason=f"nixl: {why_not('nixl')}")

WIDE = KvLayout(num_layers=8, block_size=16, num_kv_heads=4, head_dim=512, dtype="float32")
"""2 MiB a block."""

STALL_S = 0.5


def impatient() -> nixl.NixlTransport:
    return nixl.NixlTransport(
        worker_id="decode-0", epoch="e9", clock=MonotonicClock(), stall_s=STALL_S
    )


def open_puller(**options):
    return open_peer("nixl", worker_id="decode-0", epoch="e9", **options)


@contextmanager
def stopped(child: ChildPeer) -> Iterator[None]:
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        child.process.send_signal(signal.SIGCONT)


def all_of(layout: KvLayout, num_blocks: int) -> list[BlockCopy]:
    return copies_of([(i, i) for i in range(num_blocks)], layout)


async def test_a_stopped_peer_is_unavailable_and_writes_nothing_when_it_goes_on(monkeypatch):
    """Over TCP, where it takes part: the pull ends after the limit, and for good."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with (
        open_puller(layout=WIDE, num_blocks=24, transport=impatient()) as puller,
        open_child("nixl", layout=WIDE, num_blocks=24, seed=5) as silent,
        open_child("nixl", layout=WIDE, num_blocks=1, seed=6, worker_id="p2") as healthy,
    ):
        copies = all_of(WIDE, 23)
        (other,) = copies_of([(0, 23)], WIDE)
        await puller.transport.pull(silent.remote, [other])  # connected from now on
        with stopped(silent):
            began, busy = time.monotonic(), time.process_time()
            with pytest.raises(PeerUnavailable, match="no answer within"):
                await puller.transport.pull(silent.remote, copies)
            assert STALL_S <= time.monotonic() - began < STALL_S + 5.0
            assert time.process_time() - busy < STALL_S / 2  # nobody spins while it waits
            puller.cache.tensor.fill_(3.0)
        for _ in range(10):  # time for stragglers, which an agent would take in as it reads
            await puller.transport.pull(healthy.remote, [other])
        assert bool((puller.cache.tensor[:23] == 3.0).all())


async def test_pulls_of_others_outlast_a_stopped_peer(monkeypatch):
    """They end, and bring the right bytes, before and after."""
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with (
        open_peer("nixl", layout=WIDE, seed=6, worker_id="twin") as twin,
        open_puller(layout=WIDE, transport=impatient()) as puller,
        open_child("nixl", layout=WIDE, num_blocks=1, seed=5) as silent,
        open_child("nixl", layout=WIDE, num_blocks=16, seed=6, worker_id="p2") as healthy,
    ):
        await puller.transport.pull(silent.remote, all_of(WIDE, 1))
        with stopped(silent):
            stalled = asyncio.create_task(puller.transport.pull(silent.remote, all_of(WIDE, 1)))
            while not stalled.done():
                await puller.transport.pull(healthy.remote, all_of(WIDE, 16)[1:])
                assert [puller.block(i) for i in range(1, 16)] == [
                    twin.block(i) for i in range(1, 16)
                ]
            assert isinstance(stalled.exception(), PeerUnavailable)


@pytest.mark.parametrize("tls", ["tcp", "all"])
async def test_a_peer_killed_during_pulls_is_unavailable_soon(monkeypatch, tls):
    """Whichever way the bytes go."""
    monkeypatch.setenv("UCX_TLS", tls)
    async with (
        open_puller(layout=WIDE, num_blocks=24) as puller,
        open_child("nixl", layout=WIDE, num_blocks=24, seed=5) as child,
    ):
        await puller.transport.pull(child.remote, all_of(WIDE, 24))
        pulls = [
            asyncio.create_task(puller.transport.pull(child.remote, all_of(WIDE, 24)))
            for _ in range(4)
        ]
        await asyncio.wait(pulls, return_when=asyncio.FIRST_COMPLETED)
        child.process.send_signal(signal.SIGKILL)
        began = time.monotonic()
        await asyncio.wait(pulls)
        assert time.monotonic() - began < 2.0
        assert all(isinstance(pull.exception(), PeerUnavailable | None) for pull in pulls)
        await child.process.wait()
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(child.remote, all_of(WIDE, 1))


async def test_peers_beyond_the_limit_take_turns():
    """Three holders are read from where two may be known."""
    transport = nixl.NixlTransport(
        worker_id="decode-0", epoch="e9", clock=MonotonicClock(), max_peers=2
    )
    async with (
        open_peer("nixl", seed=1, worker_id="p1") as one,
        open_peer("nixl", seed=2, worker_id="p2") as two,
        open_peer("nixl", seed=3, worker_id="p3") as three,
        open_puller(transport=transport) as puller,
    ):
        for holder in (one, two, three, one, three, two) * 2:
            await puller.transport.pull(holder.hold(), copies_of([(4, 5)]))
            assert puller.block(5) == holder.block(4)


async def test_it_listens_on_this_machine_only():
    """Unless devices are named, for UCX neither encrypts nor asks who calls."""
    async with open_peer("nixl"):
        listening = {
            connection.laddr.ip
            for connection in psutil.Process().net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert listening == {"127.0.0.1"}


async def test_a_worker_whose_network_is_open_pairs_with_such_workers(monkeypatch):
    """And not with one that stays on its machine."""
    inside = make_transport("nixl", worker_id="w", epoch="e")
    monkeypatch.setenv("UCX_NET_DEVICES", "all")
    async with open_puller() as outside:
        offer = outside.transport.describe()
        assert offer.host == ""
        assert outside.transport.can_pull(offer)
        assert not inside.can_pull(offer)


async def test_ranges_beyond_the_holders_memory_are_corrupt():
    """Nothing is asked of the kernel that the holder did not offer."""
    async with open_peer("nixl") as holder, open_puller() as puller:
        end = holder.cache.num_bytes
        for offset, num_bytes in [(end, 1), (end - 1, 2), (-1, 1), (1 << 62, 1 << 62)]:
            wrong = BlockCopy(index=0, source_offset=offset, target_offset=0, num_bytes=num_bytes)
            fits = num_bytes <= puller.cache.num_bytes
            with pytest.raises(KvCorrupt if fits else AssertionError):
                await puller.transport.pull(holder.hold(), [wrong])
        whole = BlockCopy(index=0, source_offset=0, target_offset=0, num_bytes=end)
        await puller.transport.pull(holder.hold(), [whole])
        assert np.array_equal(puller.cache.bytes, holder.cache.bytes)


def test_ucx_settings_that_leave_no_way_are_told_at_the_start(monkeypatch):
    """Not at the first pull."""
    monkeypatch.setenv("UCX_TLS", "posix")
    transport = make_transport("nixl", worker_id="w", epoch="e")
    with (
        closing(KvCache(SMALL, 4, shareable=True)) as cache,
        pytest.raises(Incompatible, match="UCX_TLS is posix, and must have tcp"),
    ):
        transport.register(cache)


def test_what_is_described_is_read_back():
    """Name, place and NIXL's own bytes."""
    said = described(describe("w/e", 1 << 40, 77, b"\x00\xff"))
    assert (said.name, said.begin, said.num_bytes) == ("w/e", 1 << 40, 77)
    assert said.metadata == b"\x00\xff"


@given(st.data())
def test_no_damaged_description_is_believed(data):
    """Cut, changed or made up."""
    raw = bytearray(base64.b64decode(describe("w/e", 4096, 4096, bytes(range(64)))))
    kind = data.draw(st.sampled_from(["cut", "flip", "other"]))
    if kind == "cut":
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    elif kind == "flip":
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        raw = bytearray(data.draw(st.binary(max_size=200)))
    with pytest.raises(KvCorrupt):
        described(base64.b64encode(raw).decode())


@pytest.mark.parametrize("address", ["", "stream", "é", "AAAA=AAA"])
def test_what_is_not_base64_is_corrupt(address):
    """An offer's address is any string."""
    with pytest.raises(KvCorrupt):
        described(address)


def test_a_description_too_long_for_an_offer_says_what_to_do():
    """Many devices make it long."""
    with pytest.raises(Incompatible, match="name fewer devices in UCX_NET_DEVICES"):
        describe("w/e", 0, 1, bytes(4000))


def test_without_nixl_the_message_names_the_extra(monkeypatch):
    """It is an extra, and nothing else of kvrelay needs it."""
    for package in ("nixl", "nixl_cu13", "nixl_cu12"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}._bindings", None)
    with pytest.raises(Incompatible, match=r"install kvrelay\[nixl\]"):
        make_transport("nixl", worker_id="w", epoch="e")


async def test_only_offers_of_this_host_are_pulled_from():
    """As long as UCX stays on this machine."""
    async with open_peer("nixl") as peer:
        offer = peer.transport.describe()
        assert peer.transport.can_pull(offer)
        elsewhere = TransportOffer(name="nixl", address=offer.address, host="elsewhere")
        assert not peer.transport.can_pull(elsewhere)
        assert len(offer.address) < 1500
