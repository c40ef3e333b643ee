"""A man in the middle before one worker: sees every message of every call, and can act at one.

It speaks bytes, whatever the method: the handoff service, and the session of the worker's role.
A rule names a step of the protocol, and what happens to the message that is that step:

    proxy.at("release_asked", lose)
    proxy.at("blocks", then(kill_the_holder), which=1)

Whoever shall go through it must be told its address as that of the worker.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc

from kvrelay.rpc.channel import SHARED_OPTIONS, open_channel
from kvrelay.v1 import decode_pb2, handoff_pb2, prefill_pb2

Forward = Callable[[bytes], Awaitable[None]]
Act = Callable[[bytes, Forward], Awaitable[None]]
"""Is given a message and how to pass it on."""


class Cut(Exception):
    """The connection breaks here."""


async def lose(message: bytes, forward: Forward) -> None:
    """The message never arrives, and those behind it do."""


async def duplicate(message: bytes, forward: Forward) -> None:
    """It arrives twice."""
    await forward(message)
    await forward(message)


async def cut(message: bytes, forward: Forward) -> None:
    """The call breaks instead."""
    raise Cut


def late(delay_s: float) -> Act:
    """It arrives so much later, and those behind it after it."""

    async def act(message: bytes, forward: Forward) -> None:
        await asyncio.sleep(delay_s)
        await forward(message)

    return act


def first(hook: Callable[[], Awaitable[None]]) -> Act:
    """Something happens, and then it arrives, if it still can."""

    async def act(message: bytes, forward: Forward) -> None:
        await hook()
        await forward(message)

    return act


def then(hook: Callable[[], Awaitable[None]]) -> Act:
    """It arrives, and then something happens."""

    async def act(message: bytes, forward: Forward) -> None:
        await forward(message)
        await hook()

    return act


@dataclass(slots=True)
class Rule:
    """What shall happen once, at the `which`th message that is this step."""

    step: str
    act: Act
    which: int
    only: str
    """The id of a request or a handoff that must be in the message or its call; or nothing."""

    num_seen: int = 0
    has_acted: asyncio.Event = field(default_factory=asyncio.Event)

    def is_due(self, steps: frozenset[str], ids: frozenset[str]) -> bool:
        if self.step not in steps or (self.only and self.only not in ids):
            return False
        self.num_seen += 1
        return self.num_seen == self.which + 1 and not self.has_acted.is_set()


@dataclass(slots=True, eq=False)
class _Passage:
    """One call on its way through."""

    method: str
    handoff_id: str = ""
    is_answered: bool = False
    broken: asyncio.Event = field(default_factory=asyncio.Event)
    answering: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while an answer is written: nothing else may be said meanwhile."""

    @property
    def is_unary(self) -> bool:
        return self.method.rpartition("/")[2] in ("Release", "Freeze")


class HandoffProxy:
    """Listens at `address`, passes everything on to `upstream`."""

    def __init__(self, upstream: str = "") -> None:
        self.address = ""
        self.upstream = upstream
        self.hides_lapses = False
        """Whether the end of a `Pull` is never told, so that only the fence can tell of a lapse."""

        self.seen: Counter[str] = Counter()
        """How often each step was passed on, or acted upon."""

        self._rules: list[Rule] = []
        self._passages: set[_Passage] = set()
        self._is_down = False
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._channels: dict[str, grpc.aio.Channel] = {}

    # What a test does

    def at(self, step: str, act: Act, *, which: int = 0, only: str = "") -> Rule:
        """Have `act` done, once. `which` counts from 0."""
        assert step in STEPS, step
        rule = Rule(step, act, which, only)
        self._rules.append(rule)
        return rule

    def calm(self) -> None:
        """Forget all rules."""
        self._rules.clear()

    async def break_all(self) -> None:
        """Every call under way breaks, as when the worker's process ends."""
        for passage in self._passages:
            passage.broken.set()

    async def go_down(self) -> None:
        """And new calls are refused, as when nobody listens there."""
        self._is_down = True
        await self.break_all()

    async def come_back(self, upstream: str) -> None:
        """Somebody listens there again: another start of the worker, at the same address."""
        self.upstream = upstream
        self._is_down = False

    def stop(self) -> None:
        """Nothing moves, nothing breaks, as when the process is stopped."""
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    # What it does

    async def relay(
        self, passage: _Passage, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> None:
        if self._is_down:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection refused")
        channel = self._channel()
        call = channel.stream_stream(passage.method)(
            timeout=context.time_remaining(), metadata=_passed(context.invocation_metadata())
        )
        self._passages.add(passage)
        tasks = [
            asyncio.create_task(self._up(passage, requests, call)),
            asyncio.create_task(self._down(passage, call, context)),
            asyncio.create_task(passage.broken.wait()),
        ]
        up, down, broken = tasks
        try:
            await asyncio.wait([down, broken], return_when=asyncio.FIRST_COMPLETED)
            if up.done() and up.exception() is not None:
                up.result()
            if not down.done():
                raise Cut
            down.result()
            await self._end(passage, call, context)
        except Cut:
            async with passage.answering:
                down.cancel()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
        finally:
            self._passages.discard(passage)
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _up(
        self, passage: _Passage, requests: AsyncIterator[bytes], call: grpc.aio.StreamStreamCall
    ) -> None:
        try:
            async for message in requests:
                await self._pass(passage, message, call.write, is_request=True)
            await call.done_writing()
        except Cut:
            passage.broken.set()
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError, grpc.aio.UsageError):
            return  # the call is over, which `_down` tells

    async def _down(
        self, passage: _Passage, call: grpc.aio.StreamStreamCall, context: grpc.aio.ServicerContext
    ) -> None:
        async def answer(message: bytes) -> None:
            async with passage.answering:
                await context.write(message)
                passage.is_answered = True

        try:
            metadata = _passed(await call.initial_metadata())
            async with passage.answering:
                await context.send_initial_metadata(metadata)
            async for message in call:
                await self._pass(passage, message, answer, is_request=False)
        except grpc.aio.AioRpcError:
            return  # told by `_end`

    async def _pass(
        self, passage: _Passage, message: bytes, forward: Forward, *, is_request: bool
    ) -> None:
        await self._flowing.wait()
        steps, ids = read(passage.method, message, is_request=is_request)
        if is_request and not passage.handoff_id:
            passage.handoff_id = next(iter(ids), "")
        self.seen.update(steps)
        for rule in self._rules:
            if rule.is_due(steps, ids | {passage.handoff_id}):
                rule.has_acted.set()
                await rule.act(message, forward)
                return
        await forward(message)

    async def _end(
        self, passage: _Passage, call: grpc.aio.StreamStreamCall, context: grpc.aio.ServicerContext
    ) -> None:
        await self._flowing.wait()
        if self.hides_lapses and passage.method.endswith("/Pull"):
            await passage.broken.wait()
            raise Cut
        trailing, code = _passed(await call.trailing_metadata()), await call.code()
        if code is not grpc.StatusCode.OK:
            await context.abort(code, await call.details(), trailing)
        if passage.is_unary and not passage.is_answered:
            await passage.broken.wait()  # a lost answer is one that never comes
            raise Cut
        context.set_trailing_metadata(trailing)

    def _channel(self) -> grpc.aio.Channel:
        if self.upstream not in self._channels:
            self._channels[self.upstream] = open_channel(self.upstream)
        return self._channels[self.upstream]

    async def close(self) -> None:
        self.resume()
        await self.go_down()
        for channel in self._channels.values():
            await channel.close()


class _AnyMethod(grpc.GenericRpcHandler):
    """Gives every call to the proxy, as a stream of bytes each way."""

    def __init__(self, proxy: HandoffProxy) -> None:
        self._proxy = proxy

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        method = details.method

        async def relay(requests, context) -> None:
            await self._proxy.relay(_Passage(method), requests, context)

        return grpc.stream_stream_rpc_method_handler(relay)


@asynccontextmanager
async def proxy_before(upstream: str = "") -> AsyncIterator[HandoffProxy]:
    """A proxy that listens; `upstream` may be said later."""
    proxy = HandoffProxy(upstream)
    # As a worker's: it lets peers ping as often as ours do.
    server = grpc.aio.server(
        options=(*SHARED_OPTIONS, ("grpc.http2.min_ping_interval_without_data_ms", 500))
    )
    server.add_generic_rpc_handlers((_AnyMethod(proxy),))
    proxy.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield proxy
    finally:
        await proxy.close()
        await server.stop(None)


def _passed(metadata) -> tuple[tuple[str, str | bytes], ...]:
    """What may be passed on; gRPC sets the rest itself."""
    own = ("grpc-", "user-agent", ":", "content-type", "te")
    return tuple(
        (key, value)
        for key, value in metadata or ()
        if not key.startswith(own) or key == "grpc-status-details-bin"
    )


# What a message is


def read(method: str, raw: bytes, *, is_request: bool) -> tuple[frozenset[str], frozenset[str]]:
    """The steps that a message is, and the ids in it."""
    kind = _KINDS.get((method.rpartition("/")[2], is_request))
    if kind is None:
        return frozenset(), frozenset()
    message_type, name = kind
    message = message_type.FromString(raw)
    return name(message), _ids(message)


def _ids(message) -> frozenset[str]:
    """Of requests and handoffs."""
    if hasattr(message, "handoff_id"):
        return frozenset({message.handoff_id})
    if hasattr(message, "submit"):
        submit = getattr(message, message.WhichOneof("instruction"))
        return frozenset({submit.request_id})
    told = [*getattr(message, "failed", ()), *getattr(message, "outputs", ())]
    told += [*getattr(message, "prefilled", ()), *getattr(message, "moved", ())]
    return frozenset(it.request_id for it in told)


def _is(step: str) -> Callable[[object], frozenset[str]]:
    return lambda message: frozenset({step})


def _instruction(role: str) -> Callable[[object], frozenset[str]]:
    return lambda message: frozenset({f"{message.WhichOneof('instruction')}_{role}"})


def _told(role: str) -> Callable[[object], frozenset[str]]:
    def name(message) -> frozenset[str]:
        lists = {
            "prefilled": getattr(message, "prefilled", ()),
            "outputs": getattr(message, "outputs", ()),
            "moved": getattr(message, "moved", ()),
            f"failed_{role}": message.failed,
        }
        return frozenset(step for step, told in lists.items() if told)

    return name


_KINDS = {
    ("Prefill", True): (prefill_pb2.PrefillRequest, _instruction("prefill")),
    ("Prefill", False): (prefill_pb2.PrefillResponse, _told("prefill")),
    ("Decode", True): (decode_pb2.DecodeRequest, _instruction("decode")),
    ("Decode", False): (decode_pb2.DecodeResponse, _told("decode")),
    ("Pull", True): (handoff_pb2.PullRequest, _is("pull_asked")),
    ("Pull", False): (
        handoff_pb2.PullResponse,
        lambda message: frozenset(field.name for field, _ in message.ListFields()),
    ),
    ("Read", True): (handoff_pb2.ReadRequest, _is("read_asked")),
    ("Read", False): (handoff_pb2.ReadResponse, _is("frame")),
    ("Freeze", True): (handoff_pb2.FreezeRequest, _is("freeze_asked")),
    ("Freeze", False): (handoff_pb2.FreezeResponse, _is("freeze_answered")),
    ("Release", True): (handoff_pb2.ReleaseRequest, _is("release_asked")),
    ("Release", False): (handoff_pb2.ReleaseResponse, _is("release_answered")),
}

PREFILL_STEPS = (
    *("submit_prefill", "submit_decode", "pull_asked", "opened", "blocks"),
    *("read_asked", "frame", "digests", "complete", "prefilled"),
    *("release_asked", "release_answered", "outputs"),
)
"""Of a prompt's handoff, in about this order."""

MOVE_STEPS = (
    *("hand_over_decode", "submit_decode", "pull_asked", "opened", "blocks", "digests"),
    *("freeze_asked", "freeze_answered", "complete", "release_asked", "release_answered"),
    *("moved", "outputs"),
)
"""Of a running sequence's, in about this order."""

STEPS = frozenset(PREFILL_STEPS + MOVE_STEPS) | {
    *("cancel_prefill", "cancel_decode", "cancel_hand_over_decode"),
    *("failed_prefill", "failed_decode"),
}
