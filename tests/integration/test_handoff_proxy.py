"""The man in the middle: what it passes on arrives as it was sent, and a rule acts once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from kvrelay.errors import HandoffLost, PeerUnavailable
from kvrelay.rpc import status
from kvrelay.rpc.channel import open_channel
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc
from tests.support.handoff_proxy import cut, duplicate, first, late, lose, proxy_before

pytestmark = pytest.mark.timeout(60)


class Holder(handoff_pb2_grpc.HandoffServiceServicer):
    """Answers a `Read` with an empty frame per block."""

    def __init__(self) -> None:
        self.address = ""
        self.epoch = "e1"
        self.stall_at = -1
        self.stalled = asyncio.Event()

    async def Read(self, request, context):
        for i, index in enumerate(request.indexes):
            if request.epoch != self.epoch:
                await context.abort_with_status(status.to_grpc(HandoffLost("another epoch")))
            if i == self.stall_at:
                self.stalled.set()
                await asyncio.Event().wait()
            yield handoff_pb2.ReadResponse(index=index)


@asynccontextmanager
async def holding() -> AsyncIterator[Holder]:
    holder, server = Holder(), grpc.aio.server()
    handoff_pb2_grpc.add_HandoffServiceServicer_to_server(holder, server)
    holder.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield holder
    await server.stop(None)


class Peer:
    """A holder behind a proxy, and a client of it."""

    def __init__(self, holder, proxy, stub) -> None:
        self.holder = holder
        self.proxy = proxy
        self.stub = stub

    async def read(self, *indexes: int) -> list[int]:
        """Which frames arrived, by their block."""
        request = handoff_pb2.ReadRequest(handoff_id="0" * 32, epoch="e1", indexes=indexes)
        try:
            return [frame.index async for frame in self.stub.Read(request)]
        except grpc.aio.AioRpcError as error:
            raise status.from_grpc(error) from None


@asynccontextmanager
async def proxied() -> AsyncIterator[Peer]:
    async with (
        holding() as holder,
        proxy_before(holder.address) as proxy,
        open_channel(proxy.address) as channel,
    ):
        yield Peer(holder, proxy, handoff_pb2_grpc.HandoffServiceStub(channel))


async def test_what_no_rule_names_passes():
    """Messages in order, and the status with its details at the end."""
    async with proxied() as peer:
        assert await peer.read(3, 1, 2) == [3, 1, 2]
        assert peer.proxy.seen == {"read_asked": 1, "frame": 3}
        peer.holder.epoch = "e2"
        with pytest.raises(HandoffLost):
            await peer.read(1)


async def test_a_message_can_be_lost_or_come_twice():
    """Only the one that the rule counts to, and only once."""
    async with proxied() as peer:
        peer.proxy.at("frame", lose, which=1)
        assert await peer.read(5, 6, 7) == [5, 7]
        peer.proxy.at("frame", duplicate, which=2)
        assert await peer.read(5, 6, 7) == [5, 6, 7, 7]
        assert await peer.read(5, 6, 7) == [5, 6, 7]


async def test_a_message_can_be_late():
    """It comes all the same, in its place."""
    async with proxied() as peer:
        peer.proxy.at("frame", late(0.01))
        assert await peer.read(5, 6) == [5, 6]


async def test_a_call_can_break():
    """As when the peer's process ends; the next one passes."""
    async with proxied() as peer:
        peer.proxy.at("frame", cut, which=1)
        with pytest.raises(PeerUnavailable):
            await peer.read(5, 6)
        peer.proxy.at("read_asked", cut)
        with pytest.raises(PeerUnavailable):
            await peer.read(5, 6)
        assert await peer.read(5) == [5]


async def test_something_can_happen_at_a_message():
    """Before it is passed on: here the hold lapses before anybody hears of the wish."""
    async with proxied() as peer:

        async def lapse() -> None:
            peer.holder.epoch = "e2"

        rule = peer.proxy.at("read_asked", first(lapse))
        with pytest.raises(HandoffLost):
            await peer.read(5)
        assert rule.has_acted.is_set()


async def test_a_rule_may_be_for_one_handoff_only():
    """Others pass beside it."""
    async with proxied() as peer:
        peer.proxy.at("frame", lose, only="1" * 32)
        assert await peer.read(5) == [5]
        peer.proxy.at("frame", lose, only="0" * 32)
        assert await peer.read(5) == []


async def test_it_stands_for_a_worker_that_dies_and_is_started_again():
    """Down, every call breaks and new ones are refused; back, it may be somebody else."""
    async with proxied() as peer:
        peer.holder.stall_at = 1
        reading = asyncio.create_task(peer.read(5, 6))
        await peer.holder.stalled.wait()
        await peer.proxy.go_down()
        with pytest.raises(PeerUnavailable):
            await reading
        with pytest.raises(PeerUnavailable):
            await peer.read(5)
        async with holding() as reborn:
            reborn.epoch = "e2"
            await peer.proxy.come_back(reborn.address)
            with pytest.raises(HandoffLost):
                await peer.read(5)
            reborn.epoch = "e1"
            assert await peer.read(5) == [5]


async def test_it_stands_for_a_worker_that_is_stopped():
    """Nothing moves and nothing breaks until it goes on."""
    async with proxied() as peer:
        peer.proxy.stop()
        reading = asyncio.create_task(peer.read(5))
        done, _ = await asyncio.wait([reading], timeout=0.05)
        assert not done
        peer.proxy.resume()
        assert await reading == [5]
