"""A typed way to a running deployment: gRPC in, plain values out.

What goes wrong is raised as the `ServingError` the coordinator had, whether it came from
there or from a connection that never stood.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.events import Delta, Event, Finished, Started, Usage
from kvrelay.obs.ledger import Ledger
from kvrelay.rpc import convert
from kvrelay.rpc.channel import open_channel
from kvrelay.rpc.status import from_grpc
from kvrelay.types import WorkerIdentity, WorkerLoad
from kvrelay.v1 import common_pb2, generate_pb2, generate_pb2_grpc, pool_pb2, pool_pb2_grpc


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How to continue a prompt. None means: not sent, the coordinator's default applies."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A worker of the pool and what it said last."""

    identity: WorkerIdentity
    load: WorkerLoad
    load_age_ms: int
    placed_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The pool at one moment."""

    members: tuple[Member, ...]
    is_ready: bool
    not_ready_reason: str
    active_requests: int
    finished_requests_total: int
    lost_attempts_total: int


class Client:
    """One connection to a coordinator. Use as an async context manager.

    Raises:
        PeerUnavailable: from any method, nothing answers at `target`.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self._channel = open_channel(target)
        self._generate = generate_pb2_grpc.GenerateServiceStub(self._channel)
        self._pool = pool_pb2_grpc.PoolServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    async def generate(
        self,
        prompt: str | Sequence[Message],
        options: GenerateOptions,
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Continue plain text, or a conversation by the model's chat template.

        An async generator: closing it early cancels the request. Use `aclosing`.

        Raises:
            ServingError: whatever ended the request badly.
        """
        call = self._generate.Generate(_request(prompt, options), timeout=timeout_s)
        try:
            async with _errors_of_grpc():
                async for response in call:
                    yield _event(response)
        finally:
            call.cancel()

    async def pool(self, *, timeout_s: float | None = None) -> Pool:
        """The members of the pool and whether it serves."""
        async with _errors_of_grpc():
            response = await self._pool.GetPool(pool_pb2.GetPoolRequest(), timeout=timeout_s)
        return Pool(
            members=tuple(_member(member) for member in response.members),
            is_ready=response.is_ready,
            not_ready_reason=response.not_ready_reason,
            active_requests=response.active_requests,
            finished_requests_total=response.finished_requests_total,
            lost_attempts_total=response.lost_attempts_total,
        )

    async def explain(self, request_id: str, *, timeout_s: float | None = None) -> Ledger:
        """The ledger of a request that ended lately.

        Raises:
            NotFound: it has not ended, or is no longer remembered.
        """
        request = generate_pb2.ExplainRequest(request_id=request_id)
        async with _errors_of_grpc():
            response = await self._generate.Explain(request, timeout=timeout_s)
        return convert.ledger_from_wire(response.ledger)

    async def is_serving(self, service: str = "", *, timeout_s: float | None = None) -> bool:
        """Whether `service` (empty: the whole) says that it serves.

        Raises:
            NotFound: the server has no such service.
        """
        request = health_pb2.HealthCheckRequest(service=service)
        async with _errors_of_grpc():
            response = await self._health.Check(request, timeout=timeout_s)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def watch_serving(self, service: str = "") -> AsyncGenerator[bool, None]:
        """What `is_serving` says, now and at every change; waits for the server to come up."""
        request = health_pb2.HealthCheckRequest(service=service)
        call = self._health.Watch(request, wait_for_ready=True)
        try:
            async with _errors_of_grpc():
                async for response in call:
                    yield response.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            call.cancel()


@asynccontextmanager
async def _errors_of_grpc() -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_grpc(error) from error


def _request(
    prompt: str | Sequence[Message], options: GenerateOptions
) -> generate_pb2.GenerateRequest:
    request = generate_pb2.GenerateRequest(
        sampling=common_pb2.SamplingParams(
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            seed=options.seed,
        ),
        max_tokens=options.max_tokens,
        stop=options.stop,
        ignore_eos=options.ignore_eos,
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        turns = [generate_pb2.ChatMessage(role=m.role, content=m.content) for m in prompt]
        request.chat.CopyFrom(generate_pb2.ChatPrompt(messages=turns))
    return request


def _event(response: generate_pb2.GenerateResponse) -> Event:
    match response.WhichOneof("event"):
        case "started":
            started = response.started
            return Started(
                request_id=started.request_id,
                seed=started.seed,
                prompt_tokens=started.prompt_tokens,
            )
        case "delta":
            delta = response.delta
            return Delta(position=delta.position, token_ids=tuple(delta.token_ids), text=delta.text)
        case _:
            return _finished(response.finished)


def _finished(finished: generate_pb2.Finished) -> Finished:
    reason = convert.finish_from_wire(finished.reason)
    assert reason is not None, "a stream ended without a reason"
    return Finished(
        reason=reason,
        usage=Usage(
            prompt_tokens=finished.usage.prompt_tokens,
            completion_tokens=finished.usage.completion_tokens,
            cached_prompt_tokens=finished.usage.cached_prompt_tokens,
        ),
        ledger=convert.ledger_from_wire(finished.ledger),
    )


def _member(member: pool_pb2.PoolMember) -> Member:
    return Member(
        identity=convert.identity_from_wire(member.identity),
        load=convert.load_from_wire(member.load),
        load_age_ms=member.load_age_ms,
        placed_sequences=member.placed_sequences,
    )
