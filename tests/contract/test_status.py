"""Every error has a code and comes back as itself."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from structlog.testing import capture_logs

from kvrelay import errors
from kvrelay.rpc.channel import open_channel
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.rpc.status import CODES, MAX_TEXT_CHARS, from_failure, from_grpc, to_failure
from kvrelay.v1 import common_pb2, generate_pb2, generate_pb2_grpc


def later(error, retry_after_s):
    error.retry_after_s = retry_after_s
    return error


def examples():
    """One of each, made afresh: an error that was raised holds on to whoever raised it."""
    return [
        errors.InvalidRequest("temperature", "must be in [0, 2], is nan", low=0, high=2),
        later(errors.QueueFull(what="prompt tokens", queued=9000, limit=8192), 0.25),
        errors.KvPoolExhausted(wanted_blocks=4, free_blocks=3),
        later(errors.NoWorker("no prefill worker within 5 s", waited_s=5), 2.5),
        errors.PeerUnavailable("decode-0 went away", worker_id="decode-0"),
        errors.Draining("draining"),
        errors.HandoffLost("hold abc lapsed", handoff_id="abc"),
        errors.QuiescenceLost("nixl: still reading from prefill-0 after 30 s", waited_s=30),
        errors.KvCorrupt("block 3 of 9 differs", index=3, num_blocks=9),
        errors.Incompatible("numerics: a != b", numerics="cpu-bfloat16-v1 != cpu-float32-v1"),
        errors.DeadlinePassed("queued"),
        errors.Cancelled("the caller left"),
        errors.NotFound("no request by that id — müßig"),
        errors.ModelInvalid("m/config.json", "truncated: at byte 12"),
        errors.Unauthenticated("a client certificate is needed"),
        errors.PermissionDenied("decode may not call it", role="decode"),
    ]


def leaves(cls):
    below = cls.__subclasses__()
    return {leaf for child in below for leaf in leaves(child)} if below else {cls}


def facts(error):
    extra = {name: getattr(error, name, None) for name in ("field", "problem", "file")}
    retry_after_s = getattr(error, "retry_after_s", None)
    return type(error), str(error), error.details, extra, retry_after_s, error.retryable


def test_every_leaf_of_the_error_tree_has_a_code_and_nothing_else_has():
    """A new error cannot be forgotten here, and reasons tell all of them apart."""
    assert set(CODES) == leaves(errors.ServingError)
    assert {type(error) for error in examples()} == set(CODES)
    assert len({cls.reason for cls in CODES}) == len(CODES)
    assert grpc.StatusCode.INTERNAL not in CODES.values()


class Raiser(generate_pb2_grpc.GenerateServiceServicer):
    """Raises what it is given, from a unary and from a streaming method."""

    def __init__(self):
        self.error = None

    async def Tokenize(self, request, context):
        raise self.error

    async def Generate(self, request, context):
        yield generate_pb2.GenerateResponse(delta=generate_pb2.Delta(position=7))
        raise self.error


@asynccontextmanager
async def serving(servicer):
    service = Service(
        generate_pb2_grpc.add_GenerateServiceServicer_to_server,
        servicer,
        "kvrelay.v1.GenerateService",
    )
    server = RpcServer(listen="127.0.0.1:0", tls=None, insecure=False, services=[service])
    try:
        async with open_channel(await server.start()) as channel:
            yield generate_pb2_grpc.GenerateServiceStub(channel)
    finally:
        await server.stop()


async def unary(stub):
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Tokenize(generate_pb2.TokenizeRequest())
    return raised.value


async def stream(stub):
    call = stub.Generate(generate_pb2.GenerateRequest())
    first = await call.read()
    assert first.delta.position == 7
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call.read()
    return raised.value


@pytest.mark.parametrize("call", [unary, stream])
async def test_every_error_comes_back_as_itself_with_its_code(call):
    """Class, text, details and retry time survive, before and after the first message."""
    raiser = Raiser()
    async with serving(raiser) as stub:
        for error in examples():
            raiser.error = error
            status = await call(stub)

            assert status.code() is CODES[type(error)]
            assert facts(from_grpc(status)) == facts(error)


@pytest.mark.parametrize("error", examples(), ids=lambda e: e.reason)
def test_every_error_comes_back_as_itself_through_a_failure(error):
    """Inside of sessions it travels as a message."""
    wire = common_pb2.Failure.FromString(to_failure(error).SerializeToString())

    assert facts(from_failure(wire)) == facts(error)
    assert wire.retryable == error.retryable


def unpack(status, kind):
    rich = rpc_status.from_call(status)
    for detail in rich.details:
        message = kind()
        if detail.Unpack(message):
            return message
    return None


async def test_the_standard_details_say_field_and_retry_time():
    """Clients in other languages need no library of ours."""
    invalid, queue_full, *_ = examples()
    raiser = Raiser()
    async with serving(raiser) as stub:
        raiser.error = invalid
        refused = await unary(stub)
        raiser.error = queue_full
        full = await unary(stub)

    info = unpack(refused, error_details_pb2.ErrorInfo)
    (violation,) = unpack(refused, error_details_pb2.BadRequest).field_violations
    assert (info.domain, info.reason) == ("kvrelay", "INVALID_REQUEST")
    assert (violation.field, violation.description) == ("temperature", invalid.problem)
    assert unpack(refused, error_details_pb2.RetryInfo) is None
    assert unpack(full, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 250


async def test_long_texts_are_cut_so_that_the_code_still_arrives():
    """Trailers that are too large would turn any error into another."""
    raiser = Raiser()
    raiser.error = errors.Incompatible("x" * 9000, **{f"d{i}": "y" * 9000 for i in range(99)})
    async with serving(raiser) as stub:
        back = from_grpc(await unary(stub))

    assert type(back) is errors.Incompatible
    assert len(str(back)) == MAX_TEXT_CHARS


def plain(code, details=None):
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.PeerUnavailable),
        (grpc.StatusCode.INTERNAL, errors.PeerUnavailable),
        (grpc.StatusCode.UNKNOWN, errors.PeerUnavailable),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.PeerUnavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlinePassed),
        (grpc.StatusCode.CANCELLED, errors.Cancelled),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound),
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Incompatible),
        (grpc.StatusCode.FAILED_PRECONDITION, errors.Incompatible),
        (grpc.StatusCode.DATA_LOSS, errors.KvCorrupt),
        (grpc.StatusCode.UNAUTHENTICATED, errors.Unauthenticated),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDenied),
    ],
)
def test_a_status_without_our_details_becomes_the_nearest_error(code, cls):
    """gRPC itself and proxies send plain statuses."""
    assert type(from_grpc(plain(code, "why"))) is cls
    assert type(from_grpc(plain(code))) is cls


def test_an_unknown_reason_is_a_peer_that_is_no_use():
    """A later version may have errors that this one has not."""
    back = from_failure(common_pb2.Failure(reason="NEW", message="m", details={"a": "b"}))

    assert type(back) is errors.PeerUnavailable
    assert (str(back), back.details) == ("NEW: m", {"a": "b"})


async def test_a_dead_address_is_an_unavailable_peer():
    """The first thing a worker meets whose coordinator is not up yet."""
    async with open_channel("127.0.0.1:1") as channel:
        status = await unary(generate_pb2_grpc.GenerateServiceStub(channel))

    assert type(from_grpc(status)) is errors.PeerUnavailable


class Waiter(generate_pb2_grpc.GenerateServiceServicer):
    """Streams for ever and says when its generator was closed."""

    def __init__(self):
        self.is_closed = asyncio.Event()

    async def Generate(self, request, context):
        try:
            while True:
                yield generate_pb2.GenerateResponse(delta=generate_pb2.Delta(text="x" * 4096))
        finally:
            self.is_closed.set()


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_caller_that_leaves_closes_the_generator_and_is_no_bug(how):
    """Even one that waits to be read, and nothing is logged of it."""
    waiter = Waiter()
    with capture_logs() as events:
        await leave(waiter, how)

    assert events == []


async def leave(waiter, how):
    async with serving(waiter) as stub:
        timeout_s = 0.2 if how == "deadline" else None
        call = stub.Generate(generate_pb2.GenerateRequest(), timeout=timeout_s)
        await call.read()
        if how == "cancel":
            call.cancel()
        await asyncio.wait_for(waiter.is_closed.wait(), 10)
