"""The load generator against real servers with scripted answers, over gRPC and HTTP."""

import asyncio
import contextlib
import json
import random
import sys
from contextlib import aclosing, asynccontextmanager

import pytest

from kvrelay.bench.base import Arrived, Ask, Ended, Failed
from kvrelay.bench.driver import Driver, RealTime
from kvrelay.bench.machine import ProcessCpuClock
from kvrelay.bench.plan import Plan
from kvrelay.bench.runs import carry_out
from kvrelay.bench.sources import GrpcSource, HttpSource
from kvrelay.bench.stats import Targets
from kvrelay.bench.workload import Item, Shape, parse_mix
from kvrelay.client import Client
from kvrelay.clock import MonotonicClock
from kvrelay.errors import KvCorrupt, PeerUnavailable, QueueFull
from kvrelay.types import Role
from tests.support.clock import ManualClock
from tests.support.scripted_coordinator import MODEL, scripted_coordinator
from tests.support.scripted_relay import ScriptedRelay, serving
from tests.support.scripted_workers import ScriptedWorker

ASK = Ask(token_ids=[1, 2, 3], max_tokens=5, temperature=0.0, seed=0)


class Unwatched:
    def begin(self, title, num_requests):
        pass

    def took(self, record):
        pass


class Watched:
    """A source whose tokens can be waited for."""

    def __init__(self, source):
        self._source = source
        self._came = asyncio.Condition()
        self._num_tokens = 0

    async def ask(self, ask):
        async with aclosing(self._source.ask(ask)) as events:
            async for event in events:
                yield event
                async with self._came:
                    self._num_tokens += getattr(event, "num_tokens", 0)
                    self._came.notify_all()

    async def until(self, num_tokens):
        async with asyncio.timeout(10), self._came:
            await self._came.wait_for(lambda: self._num_tokens >= num_tokens)


@asynccontextmanager
async def deployment(*, is_held=False, **options):
    """A coordinator with a scripted worker of each kind, and a source of it."""
    async with (
        scripted_coordinator(**options) as coordinator,
        ScriptedWorker("prefill-0", Role.PREFILL) as prefill,
        ScriptedWorker("decode-0", Role.DECODE, is_held=is_held) as decode,
    ):
        await coordinator.join(prefill, decode)
        async with Client(coordinator.address) as client:
            yield coordinator, decode, GrpcSource(client)


def plan(**given):
    fields = {
        "rates": (),
        "num_clients": 3,
        "num_requests": 9,
        "duration_s": None,
        "mix": parse_mix("20:4,40:6"),
        "trace": (),
        "seed": 1,
        "temperature": 0.0,
        "targets": Targets(ttft_s=10.0, tpot_s=10.0),
        "num_warm_up": 2,
        "timeout_s": 20.0,
    }
    return Plan(**(fields | given))


async def carried_out(plan, source, *, vocab_size=90):
    return await carry_out(
        plan,
        source,
        vocab_size=vocab_size,
        timeline=RealTime(MonotonicClock()),
        cpu_clock=ProcessCpuClock(),
        make_rng=random.Random,
        watcher=Unwatched(),
    )


async def test_a_closed_loop_counts_all_that_was_generated():
    """Warm-up aside, by the coordinator's own count."""
    async with deployment() as (coordinator, _, source):
        (run,) = await carried_out(plan(), source)
        served = await source.served()

    assert served.vocab_size == MODEL.vocab_size
    assert run.totals.num_finished == 9
    assert not run.totals.errors
    assert not run.totals.num_short
    assert {(r.prompt_tokens, len(r.token_at_s)) for r in run.records} == {(20, 4), (40, 6)}
    assert all(r.handoff_tax_s is not None for r in run.records)
    assert coordinator.relay.num_finished == 11


async def test_each_rate_is_a_run_of_its_own():
    """The same lengths in each, as many as asked for."""
    async with deployment() as (_, _, source):
        slow, fast = await carried_out(plan(rates=(50.0, 500.0)), source)

    assert [r.prompt_tokens for r in slow.records] == [r.prompt_tokens for r in fast.records]
    assert (slow.totals.attainment, fast.totals.attainment) == (1.0, 1.0)
    assert slow.totals.measures["lag_s"].count == 9


async def test_a_stream_that_stalls_shows_it_as_its_longest_stall():
    """A first gap is no stall; nothing is smoothed over."""
    clock = ManualClock()
    async with deployment(is_held=True) as (_, decode, source):
        watched = Watched(source)
        driver = Driver(
            watched,
            RealTime(clock),
            make_ask=lambda index, item: ASK,
            on_record=lambda record: None,
            timeout_s=20.0,
        )
        running = asyncio.create_task(driver.open_loop([Item(Shape(3, 5))]))
        decode.allow(1)  # its first token is the one that came from prefill-0
        for num_tokens, seconds in enumerate((9.0, 1.0, 5.0, 2.0), 1):
            await watched.until(num_tokens)
            clock.advance(seconds)
            decode.allow(1)
        (r,) = await running

    assert r.token_at_s == (0.0, 9.0, 10.0, 15.0, 17.0)
    assert (r.gap1_s, r.max_stall_s, r.tpot_s) == (9.0, 5.0, 17.0 / 4)


async def test_what_is_refused_is_counted():
    """With its reason."""
    async with deployment(is_held=True, max_requests=1) as (_, decode, source):
        running = asyncio.create_task(carried_out(plan(num_requests=3, num_warm_up=0), source))
        async with asyncio.timeout(10):
            await decode.heard.wait()
        decode.allow(100)
        (run,) = await running

    assert run.totals.errors == {QueueFull.reason: 2}
    assert run.totals.num_finished == 1
    assert run.totals.attainment == pytest.approx(1 / 3)


@pytest.mark.parametrize("protocol", ["gRPC", "HTTP"])
async def test_what_a_trace_has_too_long_is_counted(protocol):
    """The server refuses it; the others are served."""
    trace = (Item(Shape(20, 2)), Item(Shape(5000, 2)))
    asked = plan(trace=trace, rates=(None,), num_requests=None, num_warm_up=0)
    if protocol == "gRPC":
        async with deployment() as (_, _, source):
            (run,) = await carried_out(asked, source)
    else:
        async with serving(ScriptedRelay(["a", "b"])) as served:
            (run,) = await carried_out(asked, HttpSource(served.address))

    assert run.totals.errors == {"INVALID_REQUEST": 1}
    assert run.totals.num_finished == 1


async def heard(source, ask=ASK):
    """All events of one request."""
    async with aclosing(source.ask(ask)) as events:
        return [event async for event in events]


async def test_over_http_every_piece_of_text_is_an_arrival():
    """How many tokens there were is for the server to say."""
    relay = ScriptedRelay(["Hel", "", "lo"])
    async with serving(relay) as served:
        source = HttpSource(served.address)
        model = await source.served()
        events = await heard(source)

    assert (model.model, model.context_tokens, model.vocab_size) == ("tiny", 64, None)
    assert events == [Arrived(1), Arrived(1), Ended(output_tokens=3, cached_prompt_tokens=4)]
    (spec,) = relay.specs
    assert spec.prompt.token_ids == (1, 2, 3)
    assert (spec.max_tokens, spec.temperature, spec.seed, spec.ignore_eos) == (5, 0.0, 0, True)


async def test_over_http_a_failure_within_a_stream_is_a_failure():
    """Under the server's own name for it."""
    async with serving(ScriptedRelay(["a", KvCorrupt("bad")])) as served:
        with pytest.raises(Failed, match=KvCorrupt.reason):
            await heard(HttpSource(served.address))


async def test_leaving_an_answer_over_http_ends_it_at_the_server():
    """As a request that takes too long does."""
    relay = ScriptedRelay(["a", asyncio.Event()])
    async with serving(relay) as served:
        async with aclosing(HttpSource(served.address).ask(ASK)) as events:
            await anext(events)
        async with asyncio.timeout(10):
            await relay.has_ended.wait()

    assert relay.num_running == 0


async def test_where_nothing_answers_nothing_is_measured():
    """Neither over gRPC nor over HTTP."""
    async with serving(ScriptedRelay()) as served:
        address = served.address
    with pytest.raises(PeerUnavailable):
        await HttpSource(address).served()
    with pytest.raises(Failed, match=PeerUnavailable.reason):
        await heard(HttpSource(address))
    async with Client(address) as client:
        with pytest.raises(PeerUnavailable):
            await GrpcSource(client).served()


@asynccontextmanager
async def saying(answer):
    """A source of a server that says these bytes to everybody, whatever they ask."""

    async def serve(reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server:
        yield HttpSource(f"{host}:{port}")


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"

BROKEN = {
    "nothing": (b"", "PEER_UNAVAILABLE"),
    "another protocol": (b"SSH-2.0-x\r\n\r\n", "PEER_UNAVAILABLE"),
    "cut within a chunk": (CHUNKED + b"ff\r\ndata", "PEER_UNAVAILABLE"),
    "a chunk of no length": (CHUNKED + b"xx\r\n", "PEER_UNAVAILABLE"),
    "a chunk too large": (CHUNKED + b"ffffffff\r\n", "PEER_UNAVAILABLE"),
    "an endless header": (OK + b"a" * (1 << 17), "PEER_UNAVAILABLE"),
    "no JSON": (OK + b"\r\ndata: {\n\n", "NOT_UNDERSTOOD"),
    "no object": (OK + b"\r\ndata: []\n\n", "NOT_UNDERSTOOD"),
    "refused in plain text": (b"HTTP/1.1 429 x\r\n\r\nbusy", "HTTP_429"),
    "refused by number": (b'HTTP/1.1 400 x\r\n\r\n{"error": {"code": 400}}', "HTTP_400"),
    "an error without a name": (OK + b'\r\ndata: {"error": "bad"}\n\n', "HTTP_200"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_an_answer_that_is_none_is_a_failed_request(case):
    """Of a reason that tells it from others."""
    answer, reason = BROKEN[case]
    async with saying(answer) as source:
        with pytest.raises(Failed) as failed:
            await heard(source)

    assert failed.value.reason == reason


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"\r\n" + DONE,
        OK + b"Content-Length: 14\r\n\r\n" + DONE,
        CHUNKED + b"6\r\ndata: \r\n8;x=y\r\n[DONE]\n\n\r\n0\r\n\r\n",
    ],
)
async def test_every_way_to_end_a_body_is_understood(answer):
    """By closing, by length, in chunks. Without usage the tokens are those that were seen."""
    async with saying(answer) as source:
        assert await heard(source) == [Ended(output_tokens=None)]


@pytest.mark.parametrize("body", [b"{}", b'{"data": []}', b"no", b"[1]"])
async def test_a_server_of_something_else_is_named(body):
    """Before any load is sent."""
    async with saying(OK + b"\r\n" + body) as source:
        with pytest.raises(PeerUnavailable, match="does not say what it serves"):
            await source.served()


async def kvrelay(*arguments):
    """Exit status, output and errors of a command."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvrelay.cli.app", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def test_the_command_prints_a_report_and_writes_its_numbers(tmp_path):
    """No prompt is in them."""
    path = tmp_path / "bench.json"
    async with deployment() as (coordinator, _, _):
        status, out, err = await kvrelay(
            *("bench", "--target", coordinator.address, "--mode", "open", "--rate", "100"),
            *("--rate", "200", "--requests", "5", "--mix", "30:4", "--json", str(path)),
        )
    made = json.loads(path.read_text())

    assert (status, err) == (0, "")
    assert "goodput" in out
    assert "100% met TTFT ≤ 1.00 s and TPOT ≤ 100 ms" in out
    assert max(map(len, out.splitlines())) <= 100
    assert [run["rate_per_s"] for run in made["runs"]] == [100.0, 200.0]
    assert [len(run["requests"]) for run in made["runs"]] == [5, 5]
    assert made["command"][:2] == ["kvrelay", "bench"]
    assert "token_ids" not in path.read_text()


async def test_the_command_fails_where_every_request_does():
    """But it still says why."""
    async with serving(ScriptedRelay(refusal=QueueFull(what="x", queued=1, limit=1))) as served:
        status, out, _ = await kvrelay(
            *("bench", "--http", served.address, "--requests", "2"),
            *("--mix", "8:2", "--vocab-size", "90"),
        )

    assert status == 1
    assert "2 requests failed: QUEUE_FULL 2" in out


async def test_the_command_says_where_nothing_answers():
    """In one line."""
    async with serving(ScriptedRelay()) as served:
        address = served.address
    status, _, err = await kvrelay("bench", "--http", address)

    assert (status, err.count("\n")) == (1, 1)
    assert address in err
