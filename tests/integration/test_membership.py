"""A worker stays in the pool through whatever happens to the coordinator."""

import asyncio
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
from structlog.testing import capture_logs

from kvrelay.clock import MonotonicClock
from kvrelay.errors import Draining, Incompatible, InvalidRequest, Unauthenticated
from kvrelay.handoff.ticket import KEY_NUM_BYTES
from kvrelay.kv.layout import KvLayout
from kvrelay.rpc import convert
from kvrelay.rpc.channel import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S
from kvrelay.rpc.membership import MAX_BACKOFF_S, Membership
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.types import Fingerprint, Role, WorkerIdentity, WorkerLoad
from kvrelay.v1 import pool_pb2, pool_pb2_grpc

LAYOUT = KvLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=8, dtype="float32")
IDENTITY = WorkerIdentity(
    worker_id="prefill-0",
    epoch="0123456789abcdef",
    role=Role.PREFILL,
    address="127.0.0.1:5000",
    pid=1,
    fingerprint=Fingerprint(model_digest="d", numerics="n", layout=LAYOUT),
    num_blocks=4,
    max_sequences=2,
)


class ScriptedPool(pool_pb2_grpc.PoolServiceServicer):
    """Answers each join with the next error of its script, then with welcomes."""

    def __init__(self, *script, interval_s=60.0):
        self._script = list(script)
        self._interval_ms = int(interval_s * 1000)
        self.num_welcomes = 0
        self.joins = asyncio.Queue()
        self.loads = asyncio.Queue()
        self.left = asyncio.Event()
        self.end = asyncio.Event()
        self.ended = asyncio.Event()

    async def Join(self, request_iterator, context):
        first = await anext(request_iterator)
        self.joins.put_nowait(convert.identity_from_wire(first.identity))
        make_error = self._script.pop(0) if self._script else None
        if make_error:
            raise make_error()
        self.num_welcomes += 1
        yield pool_pb2.JoinResponse(
            heartbeat_interval_ms=self._interval_ms, ticket_key=self.key(self.num_welcomes)
        )
        reading = asyncio.create_task(self._read(request_iterator))
        ending = asyncio.create_task(self.end.wait())
        try:
            await asyncio.wait({reading, ending}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.end.clear()
            self.ended.set()
            for task in (reading, ending):
                task.cancel()
            await asyncio.gather(reading, ending, return_exceptions=True)

    def key(self, num_welcomes):
        """Another one with each welcome."""
        return bytes([num_welcomes]) * KEY_NUM_BYTES

    async def _read(self, requests):
        async for request in requests:
            self.loads.put_nowait(convert.load_from_wire(request.load))
        self.left.set()


async def start_server(pool, listen="127.0.0.1:0"):
    service = Service(
        pool_pb2_grpc.add_PoolServiceServicer_to_server, pool, "kvrelay.v1.PoolService"
    )
    server = RpcServer(listen=listen, tls=None, insecure=False, services=[service])
    return server, await server.start()


class Worker:
    """A membership with a load that tests can change."""

    def __init__(self, address):
        self.coordinator = address
        self.load = WorkerLoad()
        self.keys = []
        self.membership = Membership(
            identity=IDENTITY,
            coordinator=address,
            load=lambda: self.load,
            clock=MonotonicClock(),
            random=Random(1),
            on_key=self.keys.append,
        )


@asynccontextmanager
async def joined(pool):
    """A server with `pool`, a worker whose membership runs, and the first load said."""
    server, address = await start_server(pool)
    worker = Worker(address)
    task = asyncio.create_task(worker.membership.run())
    try:
        yield worker, server
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await server.stop()


async def soon(awaitable):
    return await asyncio.wait_for(awaitable, 20)


async def test_a_worker_says_who_it_is_then_how_it_is():
    """Identity first, load at once after the welcome."""
    pool = ScriptedPool()
    async with joined(pool) as (worker, _):
        assert not worker.membership.is_member
        assert await soon(pool.joins.get()) == IDENTITY
        assert await soon(pool.loads.get()) == WorkerLoad()
        assert worker.membership.is_member


async def test_each_membership_brings_its_ticket_key_before_the_first_load():
    """Who is heard can tell tickets, and so may be given what others shall pull."""
    pool = ScriptedPool()
    async with joined(pool) as (worker, _):
        await soon(pool.loads.get())
        assert worker.keys == [pool.key(1)]
        pool.end.set()
        await soon(pool.loads.get())

        assert worker.keys == [pool.key(1), pool.key(2)]


async def test_a_coordinator_that_gives_no_whole_key_is_of_another_version():
    """No ticket could be told by half of one."""

    class Keyless(ScriptedPool):
        def key(self, num_welcomes):
            return b"half"

    server, address = await start_server(Keyless())
    worker = Worker(address)
    try:
        with pytest.raises(Incompatible, match="4 bytes, not 32"):
            await soon(worker.membership.run())
    finally:
        await server.stop()
    assert worker.keys == []


async def test_loads_come_at_the_interval_that_was_told():
    """Each is taken afresh."""
    pool = ScriptedPool(interval_s=0.05)
    async with joined(pool) as (worker, _):
        await soon(pool.loads.get())
        worker.load = WorkerLoad(running_sequences=3)
        seen = [await soon(pool.loads.get()) for _ in range(3)]

    assert seen[-1].running_sequences == 3


async def test_an_announced_drain_is_sent_at_once():
    """Long before the next interval, so that the router stops choosing the worker."""
    pool = ScriptedPool(interval_s=600)
    async with joined(pool) as (worker, _):
        await soon(pool.loads.get())
        worker.load = WorkerLoad(is_draining=True)
        worker.membership.announce()

        assert (await soon(pool.loads.get())).is_draining


async def test_leaving_ends_the_stream_cleanly_and_the_run():
    """The coordinator sees the end, not a break."""
    pool = ScriptedPool(interval_s=600)
    async with joined(pool) as (worker, _):
        await soon(pool.loads.get())
        await soon(worker.membership.leave())
        await soon(pool.left.wait())

        assert not worker.membership.is_member
        await soon(worker.membership.leave())


async def test_a_membership_that_never_ran_can_be_left():
    """A worker that stops before it started waits for nothing."""
    await soon(Worker("127.0.0.1:1").membership.leave())


async def test_a_worker_joins_again_when_its_stream_ends():
    """With the same identity: it is still the same process."""
    pool = ScriptedPool()
    async with joined(pool) as (worker, _):
        await soon(pool.joins.get())
        await soon(pool.loads.get())
        pool.end.set()

        assert await soon(pool.joins.get()) == IDENTITY
        await soon(pool.loads.get())
        assert worker.membership.is_member


async def test_a_worker_outlives_its_coordinator_and_joins_the_next_one():
    """A dead coordinator is not fatal, and its absence is logged once per cause."""
    pool = ScriptedPool()
    with capture_logs() as events:
        async with joined(pool) as (worker, server):
            await soon(pool.loads.get())
            await server.stop()
            successor = ScriptedPool()
            other, _ = await start_server(successor, worker.coordinator)
            try:
                assert await soon(successor.joins.get()) == IDENTITY
                await soon(successor.loads.get())
                assert worker.membership.is_member
            finally:
                await other.stop()

    names = [event["event"] for event in events]
    assert names.count("pool.joined") == 2
    assert 1 <= names.count("pool.not_joined") <= 4


@pytest.mark.parametrize(
    "make_error", [lambda: Draining("draining"), lambda: Unauthenticated("no certificate")]
)
async def test_what_may_pass_is_tried_again(make_error):
    """Coordinators restart and certificates are renewed."""
    pool = ScriptedPool(make_error, make_error)
    async with joined(pool) as (worker, _):
        for _ in range(3):
            await soon(pool.joins.get())
        await soon(pool.loads.get())

        assert worker.membership.is_member


@pytest.mark.parametrize(
    "make_error",
    [
        lambda: Incompatible("numerics: a != b", numerics="a != b"),
        lambda: InvalidRequest("worker_id", "must be 1 to 64 characters of a-z0-9.-"),
    ],
)
async def test_what_will_not_pass_is_logged_and_raised(make_error):
    """The worker serves something else; only a person can change that."""
    error = make_error()
    server, address = await start_server(ScriptedPool(make_error))
    try:
        with capture_logs() as events, pytest.raises(type(error)) as raised:
            await soon(Worker(address).membership.run())
    finally:
        await server.stop()
    (event,) = (event for event in events if event["event"] == "pool.refused")

    assert raised.value.details == error.details
    assert event["problem"] == str(error)
    assert event.items() >= error.details.items()


async def test_leaving_interrupts_the_wait_for_a_coordinator_that_is_away():
    """A worker that shuts down does not wait for the next try."""
    worker = Worker("127.0.0.1:1")
    task = asyncio.create_task(worker.membership.run())
    await asyncio.sleep(0)
    await asyncio.wait_for(worker.membership.leave(), MAX_BACKOFF_S * 5)
    await soon(task)


class Wire:
    """A TCP relay to `address` whose connections can be cut without either end being told."""

    def __init__(self, address):
        self._target = address.split(":")
        self._num_cuts = 0
        self._tasks = set()

    def cut(self):
        """Lose what present connections carry from now on; new ones work."""
        self._num_cuts += 1

    @asynccontextmanager
    async def address(self):
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader, writer):
        host, port = self._target
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.create_task(self._copy(source, sink, self._num_cuts)))

    async def _copy(self, source, sink, num_cuts):
        try:
            with suppress(ConnectionError):
                while data := await source.read(1 << 16):
                    if num_cuts == self._num_cuts:
                        sink.write(data)
        finally:
            sink.close()


async def test_both_ends_notice_within_seconds_that_the_other_fell_silent():
    """A stopped machine closes no connection; pings that nobody answers tell it."""
    pool = ScriptedPool(interval_s=600)
    server, address = await start_server(pool)
    wire = Wire(address)
    try:
        async with wire.address() as relayed:
            worker = Worker(relayed)
            task = asyncio.create_task(worker.membership.run())
            await soon(pool.loads.get())
            await soon(pool.joins.get())
            wire.cut()
            async with asyncio.timeout(2 * (KEEPALIVE_S + KEEPALIVE_TIMEOUT_S)):
                await pool.joins.get()
                await pool.ended.wait()
            await soon(worker.membership.leave())
            await soon(task)
    finally:
        await server.stop()
