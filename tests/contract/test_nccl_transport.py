"""What `nccl` does beside what all transports do: links, their order, and every way to lose one."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvrelay.errors import (
    HandoffLost,
    Incompatible,
    InvalidRequest,
    PeerUnavailable,
    QueueFull,
    QuiescenceLost,
)
from kvrelay.transfer.nccl import CupyNccl
from kvrelay.transfer.nccl_holder import link_id_of
from kvrelay.transfer.nccl_link import PULLER_RANK, NcclLink
from tests.support.clock import ManualClock
from tests.support.device_peer import HASTY, SHORT, DevicePeer, World, copies_of, open_device_peer


def open_peer(world, worker_id, **options):
    return open_device_peer("nccl", world, worker_id, **options)


@asynccontextmanager
async def linked(**options) -> AsyncIterator[tuple[DevicePeer, DevicePeer]]:
    """A holder and a puller whose link is ready."""
    world = World()
    async with (
        open_peer(world, "prefill-0", seed=1, **options) as holder,
        open_peer(world, "decode-0", seed=2, **options) as puller,
    ):
        await puller.nccl_transport.opened(holder.hold())
        yield holder, puller


async def until(is_so) -> None:
    """What threads do, and what is closed in the background, has no event to wait for."""
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def link_ids(puller: DevicePeer) -> list[str]:
    return [link_id_of(unique_id) for unique_id in puller.nccl.fabric.pairs]


# Opening.


async def test_nobody_waits_for_a_link():
    """The first pull is refused at once, and has the link opened for those to come."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "decode-0") as puller:
        holder.nccl.joins.clear()
        for _ in range(2):
            with pytest.raises(PeerUnavailable, match="its link is being opened"):
                await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
            assert not puller.nccl_transport.prepare(holder.hold())
        holder.nccl.joins.set()
        await puller.nccl_transport.opened(holder.hold())
        assert puller.nccl_transport.prepare(holder.hold())
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        assert puller.calls.opened == ["prefill-0"]


async def test_a_link_that_cannot_be_opened_is_tried_again_later():
    """After a second, then two, so that a broken pair costs little."""
    world, clock = World(), ManualClock()
    async with (
        open_peer(world, "prefill-0") as holder,
        open_peer(world, "decode-0", clock=clock) as puller,
    ):
        puller.nccl.refuses_to_join = True
        for wait_s in (1.0, 2.0):
            with pytest.raises(PeerUnavailable, match="SYSTEM_ERROR"):
                await puller.nccl_transport.opened(holder.hold())
            clock.advance(0.9 * wait_s)
            with pytest.raises(PeerUnavailable, match="next try in"):
                await puller.nccl_transport.opened(holder.hold())
            clock.advance(0.1 * wait_s)
        world.fabric.release()  # the holder still waits for somebody to join


@pytest.mark.parametrize("hangs_at", ["puller", "holder"])
async def test_a_join_that_hangs_is_told_to_whoever_ends_the_process(hangs_at):
    """It leaves no handle to abort by; meanwhile the pair does without."""
    world = World()
    async with (
        open_peer(world, "prefill-0", limits=HASTY) as holder,
        open_peer(world, "decode-0", limits=HASTY) as puller,
    ):
        hung = puller if hangs_at == "puller" else holder
        hung.nccl.joins.clear()
        with pytest.raises(QuiescenceLost, match=r"was not open within 0\.3 s"):
            await puller.nccl_transport.opened(holder.hold())
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        await until(lambda: len(puller.lost) == len(holder.lost) == 1)


async def test_a_join_that_comes_too_late_is_aborted_where_it_came():
    """Nobody keeps a communicator that nobody knows."""
    world = World()
    async with (
        open_peer(world, "prefill-0", limits=HASTY) as holder,
        open_peer(world, "decode-0", limits=HASTY) as puller,
    ):
        holder.nccl.joins.clear()
        with pytest.raises(QuiescenceLost):
            await puller.nccl_transport.opened(holder.hold())
        holder.nccl.joins.set()
        await until(lambda: puller.nccl.num_aborted == holder.nccl.num_aborted == 1)


async def test_a_holder_that_refuses_is_not_waited_for():
    """No thread of ours joins a pair that will not be."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "decode-0") as puller:
        remote = holder.hold()
        await holder.transport.close()
        with pytest.raises(PeerUnavailable, match="closed"):
            await puller.nccl_transport.opened(remote)
        assert puller.nccl.communicators == []


async def test_opening_twice_is_opening_once():
    """A repeated request is the same request."""
    async with linked() as (holder, puller):
        (unique_id,) = puller.nccl.fabric.pairs
        await holder.nccl_transport.holder.open_link(puller_id="decode-0", unique_id=unique_id)
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        assert holder.nccl_transport.holder.num_links == 1


async def test_a_link_that_is_forgotten_as_it_opens_leaves_nothing(monkeypatch):
    """Its join has ended, and in the same turn of the loop its puller leaves."""
    world = World()
    async with open_peer(world, "prefill-0") as holder, open_peer(world, "decode-0") as puller:
        served, opened = holder.nccl_transport.holder, NcclLink.open

        async def open_and_forget(link: NcclLink, unique_id: bytes) -> None:
            await opened(link, unique_id)
            served.forget("decode-0")

        monkeypatch.setattr(NcclLink, "open", open_and_forget)
        unique_id, before = puller.nccl.unique_id(), asyncio.all_tasks()
        await served.open_link(puller_id="decode-0", unique_id=unique_id)
        (opening,) = asyncio.all_tasks() - before
        await asyncio.to_thread(puller.nccl.join, unique_id, rank=PULLER_RANK)
        await until(lambda: holder.nccl.num_aborted == 1)
        assert served.num_links == 0
        assert opening.exception() is None


async def test_a_malformed_id_is_refused():
    """Before anything is done with it."""
    async with linked() as (holder, _):
        with pytest.raises(InvalidRequest, match="must be 128 bytes, is 3"):
            await holder.nccl_transport.holder.open_link(puller_id="d", unique_id=b"abc")


# How many there are.


async def test_the_least_recently_used_link_makes_room():
    """And is aborted on the puller's side."""
    world = World()
    async with (
        open_peer(world, "prefill-0") as a,
        open_peer(world, "prefill-1") as b,
        open_peer(world, "prefill-2") as c,
        open_peer(world, "decode-0", max_links=2) as puller,
    ):
        for holder in (a, b):
            await puller.nccl_transport.opened(holder.hold())
        await puller.transport.pull(a.hold(), copies_of([(0, 0)]))
        await puller.nccl_transport.opened(c.hold())
        await until(lambda: puller.nccl.num_aborted == 1)
        assert puller.nccl_transport.prepare(a.hold())
        assert not puller.nccl_transport.prepare(b.hold())


async def test_a_link_in_use_never_makes_room():
    """Whoever comes is told, and takes another way."""
    world = World()
    async with (
        open_peer(world, "prefill-0", seed=1) as a,
        open_peer(world, "prefill-1") as b,
        open_peer(world, "decode-0", seed=2, max_links=1) as puller,
    ):
        await puller.nccl_transport.opened(a.hold())
        puller.nccl.moves.clear()
        pulling = asyncio.create_task(puller.transport.pull(a.hold(), copies_of([(0, 0)])))
        await asyncio.to_thread(puller.nccl.moving.wait)
        with pytest.raises(PeerUnavailable, match="all 1 links are in use"):
            await puller.nccl_transport.opened(b.hold())
        puller.nccl.moves.set()
        await pulling
        assert puller.block(0) == a.block(0)


async def test_a_holder_has_so_many_links_too():
    """The puller of the one that made room notices, goes without, and comes back."""
    world, clock = World(), ManualClock()
    async with (
        open_peer(world, "prefill-0", seed=1, max_links=1) as holder,
        open_peer(world, "decode-0", clock=clock) as a,
        open_peer(world, "decode-1") as b,
    ):
        await a.nccl_transport.opened(holder.hold())
        await b.nccl_transport.opened(holder.hold())
        with pytest.raises(PeerUnavailable, match="has no link"):
            await a.transport.pull(holder.hold(), copies_of([(0, 0)]))
        clock.advance(1.0)
        await a.nccl_transport.opened(holder.hold())
        await a.transport.pull(holder.hold(), copies_of([(0, 0)]))
        assert a.block(0) == holder.block(0)


async def test_a_holder_whose_links_are_all_in_use_refuses():
    """By name and number."""
    async with linked(max_links=1) as (holder, puller):
        puller.nccl.moves.clear()
        pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies_of([(0, 0)])))
        await asyncio.to_thread(puller.nccl.moving.wait)
        with pytest.raises(QueueFull, match="1 nccl links queued, limit 1"):
            await holder.nccl_transport.holder.open_link(puller_id="d", unique_id=bytes(128))
        puller.nccl.moves.set()
        await pulling


async def test_a_puller_that_left_has_no_links():
    """Whoever hears of its end says so; the communicators are aborted."""
    async with linked() as (holder, _):
        holder.nccl_transport.holder.forget("decode-0")
        holder.nccl_transport.holder.forget("decode-7")
        assert holder.nccl_transport.holder.num_links == 0
        await until(lambda: holder.nccl.num_aborted == 1)


async def test_every_communicator_is_aborted_in_the_end():
    """One that is merely dropped waits for its peer, perhaps for ever."""
    async with linked() as (holder, puller):
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
    for peer in (holder, puller):
        assert [c.is_aborted for c in peer.nccl.communicators] == [True]
        assert peer.cuda.machine.streams == {}


# Order.


async def test_both_sides_move_in_the_pullers_order():
    """Numbered without a gap, whoever pulls."""
    async with linked() as (holder, puller):
        await asyncio.gather(
            *(
                puller.transport.pull(holder.hold(), copies_of([(i, i), (i + 8, i + 8)]))
                for i in (3, 1, 2)
            )
        )
        assert puller.calls.asked == [(0, [3, 11]), (1, [1, 9]), (2, [2, 10])]
        assert [puller.block(i) for i in (1, 2, 3, 9)] == [holder.block(i) for i in (1, 2, 3, 9)]


async def test_a_transfer_out_of_step_is_refused_and_ends_the_link():
    """Rather than meet another transfer's receive."""
    async with linked() as (holder, puller):
        (link_id,) = link_ids(puller)
        with pytest.raises(PeerUnavailable, match="transfer 3 asked for, 0 is next"):
            await holder.nccl_transport.holder.send(
                puller_id="decode-0", link_id=link_id, sequence=3, ranges=[(0, 1)]
            )
        with pytest.raises(PeerUnavailable, match="has no link"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))


async def test_a_link_serves_nobody_but_its_puller():
    """Knowing its name is not enough."""
    async with linked() as (holder, puller):
        (link_id,) = link_ids(puller)
        with pytest.raises(PeerUnavailable, match="decode-9 has no link"):
            await holder.nccl_transport.holder.send(
                puller_id="decode-9", link_id=link_id, sequence=0, ranges=[(0, 1)]
            )
        await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))


async def test_a_send_has_not_returned_before_its_bytes_are_gone():
    """So the holder keeps the blocks for so long."""
    async with linked() as (holder, puller):
        puller.nccl.moves.clear()
        (link_id,) = link_ids(puller)
        sending = asyncio.create_task(
            holder.nccl_transport.holder.send(
                puller_id="decode-0", link_id=link_id, sequence=0, ranges=[(0, 64)]
            )
        )
        await asyncio.to_thread(holder.nccl.moving.wait)
        await asyncio.wait([sending], timeout=0.02)
        assert not sending.done()
        sending.cancel()
        await asyncio.wait([sending])
        assert sending.cancelled()
        assert holder.nccl.num_aborted == 1


# Loss.


async def test_a_peer_that_dies_is_noticed_before_the_deadline():
    """The library is asked while we wait; it tells nobody."""
    async with linked() as (holder, puller):
        puller.calls.go_on.clear()
        pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies_of([(0, 0)])))
        await until(lambda: puller.calls.asked)
        holder.nccl.die()
        with pytest.raises(PeerUnavailable, match="REMOTE_ERROR"):
            async with asyncio.timeout(5):
                await pulling
        puller.calls.go_on.set()
        assert puller.nccl.num_aborted == 1


async def test_what_fails_late_is_not_believed():
    """A stream that has passed says nothing of an error that came after."""
    async with linked() as (holder, puller):
        puller.nccl.fails_late = True
        with pytest.raises(PeerUnavailable, match="and late"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        await until(lambda: puller.nccl.num_aborted == 1)


async def test_a_hold_that_lapsed_ends_the_wait_for_its_bytes():
    """Our receive is taken back; the caller hears the holder's own words."""
    async with linked() as (holder, puller):
        puller.calls.problem = HandoffLost("no such hold")
        with pytest.raises(HandoffLost, match="no such hold"):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        assert puller.nccl.num_aborted == 1


async def test_sizes_that_differ_end_the_link():
    """Neither side waits longer than its limit."""
    async with linked(limits=SHORT) as (holder, puller):
        (copy,) = copies_of([(0, 0)])
        half = type(copy)(index=0, source_offset=0, target_offset=0, num_bytes=copy.num_bytes // 2)
        with pytest.raises(PeerUnavailable, match=r"took more than 0\.3 s"):
            await puller.transport.pull(holder.hold(), [half])
        await until(lambda: puller.nccl.num_aborted == holder.nccl.num_aborted == 1)


@pytest.mark.parametrize("side", ["puller", "holder"])
async def test_an_abort_that_does_not_return_proves_nothing(side):
    """Without it nobody knows what still moves."""
    async with linked(limits=SHORT) as (holder, puller):
        one = puller if side == "puller" else holder
        one.nccl.aborts.clear()
        puller.nccl.fails_late = True
        if side == "puller":
            with pytest.raises(QuiescenceLost, match="not quiet"):
                await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        else:
            (link_id,) = link_ids(puller)
            with pytest.raises(QuiescenceLost, match="not quiet"):
                await holder.nccl_transport.holder.send(
                    puller_id="decode-0", link_id=link_id, sequence=0, ranges=[(0, 64)]
                )
            assert len(holder.lost) == 1


async def test_after_a_loss_the_link_is_made_anew():
    """With another communicator and from the first number on."""
    clock = ManualClock()
    async with linked(clock=clock) as (holder, puller):
        puller.nccl.fails_late = True
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))
        puller.nccl.fails_late = False
        clock.advance(1.0)
        await puller.nccl_transport.opened(holder.hold())
        await puller.transport.pull(holder.hold(), copies_of([(1, 1)]))
        assert puller.block(1) == holder.block(1)
        assert puller.calls.asked == [(0, [0]), (0, [1])]
        assert len(puller.nccl.communicators) == 2


async def test_closing_the_holder_ends_its_sends():
    """The puller hears of it at once."""
    async with linked() as (holder, puller):
        puller.calls.go_on.clear()
        pulling = asyncio.create_task(puller.transport.pull(holder.hold(), copies_of([(0, 0)])))
        await until(lambda: puller.calls.asked)
        await holder.transport.close()
        puller.calls.go_on.set()
        with pytest.raises(PeerUnavailable):
            await pulling


# Whom it is for.


@pytest.mark.parametrize(
    "address",
    ["", "e1", "e1 22809", "e1 22809 gpu x", "e1 x gpu", "e1 -1 gpu", "e1 999999999999 g"],
)
async def test_an_offer_that_makes_no_sense_is_not_taken(address):
    """It comes from elsewhere."""
    async with linked() as (holder, puller):
        offer = type(holder.transport.describe())(name="nccl", address=address, host="")
        assert not puller.transport.can_pull(offer)


async def test_two_versions_or_one_device_are_no_pair():
    """NCCL refuses both, after a while; this is known at once."""
    world = World()

    def older(cuda, nccl):
        nccl.number = 22703

    def same(cuda, nccl):
        cuda.uuid = "gpu-of-decode-0"

    async with (
        open_peer(world, "decode-0") as puller,
        open_peer(world, "prefill-0", wired=older) as other_version,
        open_peer(world, "prefill-1", wired=same) as other_rank,
    ):
        assert not puller.transport.can_pull(other_version.transport.describe())
        assert not puller.transport.can_pull(other_rank.transport.describe())


def test_without_cupy_the_extra_to_install_is_named(monkeypatch):
    """In one line."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(Incompatible, match=r"install kvrelay\[cuda12\] or kvrelay\[cuda13\]"):
        CupyNccl()
