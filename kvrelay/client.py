"""A typed way to a running deployment: gRPC in, plain values out.

What goes wrong is raised as the `ServingError` the coordinator had, whether it came from
there or from a connection that never stood.
"""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvrelay.config import TlsFiles
from kvrelay.errors import PeerUnavailable
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


@dataclass(frozen=True, slots=True)
class Tokens:
    """A prompt that is tokenized already."""

    token_ids: Sequence[int]


Prompt = str | Sequence[Message] | Tokens
"""Plain text is continued as it stands; messages are rendered by the model's chat template."""


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
    """Text before which the output ends."""

    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, besides the model's own."""

    ignore_eos: bool = False
    """Go on after the model's end-of-sequence tokens."""


_DEFAULTS = GenerateOptions()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What is served and with which limits."""

    name: str
    model_digest: str
    context_tokens: int
    """Most tokens of prompt and output together."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_max_tokens: int
    disaggregate: str


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

    For example, all of an answer's text:

        async with Client("127.0.0.1:50051") as client:
            options = GenerateOptions(max_tokens=64, temperature=0.0)
            events = client.generate([Message("user", "Why is the sky blue?")], options)
            async with aclosing(events):
                text = "".join([e.text async for e in events if isinstance(e, Delta)])

    Any number of requests may share a client. `timeout_s` of a method is its whole deadline;
    without one it waits as long as the server lives.

    Args:
        target: HOST:PORT of the coordinator's gRPC server.
        tls: where the services speak TLS, a certificate whose name is the role `client`.

    Raises:
        SettingsError: a TLS file cannot be read.
        PeerUnavailable: from any method, nothing answers at `target`, or not in TLS as we do.
    """

    def __init__(self, target: str, *, tls: TlsFiles | None = None) -> None:
        self.target = target
        self._channel = open_channel(target, tls=tls)
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
        prompt: Prompt,
        options: GenerateOptions = _DEFAULTS,
        *,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Continue a prompt: one `Started`, then `Delta` after `Delta`, then `Finished`.

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

    async def tokenize(
        self, text: str | Sequence[Message], *, timeout_s: float | None = None
    ) -> tuple[int, ...]:
        """The token ids that `generate` would make of the same."""
        request = generate_pb2.TokenizeRequest()
        if isinstance(text, str):
            request.text = text
        else:
            request.chat.CopyFrom(_chat(text))
        async with _errors_of_grpc():
            response = await self._generate.Tokenize(request, timeout=timeout_s)
        return tuple(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, timeout_s: float | None = None) -> str:
        """The text of token ids, special tokens left out."""
        request = generate_pb2.DetokenizeRequest(token_ids=token_ids)
        async with _errors_of_grpc():
            response = await self._generate.Detokenize(request, timeout=timeout_s)
        return str(response.text)

    async def model(self, *, timeout_s: float | None = None) -> Model:
        """What is served and with which limits."""
        async with _errors_of_grpc():
            response = await self._generate.GetModel(
                generate_pb2.GetModelRequest(), timeout=timeout_s
            )
        return Model(
            name=response.model,
            model_digest=response.model_digest,
            context_tokens=response.context_tokens,
            vocab_size=response.vocab_size,
            eos_token_ids=tuple(response.eos_token_ids),
            default_max_tokens=response.default_max_tokens,
            disaggregate=response.disaggregate,
        )

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
        """What `is_serving` says, now and at every change; waits for the server to come up, and
        again after it went away, which is told as False.
        """
        told: bool | None = None
        while True:
            with suppress(PeerUnavailable):
                async with aclosing(self._watch_serving(service)) as states:
                    async for told in states:
                        yield told
            if told is not False:
                told = False
                yield told

    async def _watch_serving(self, service: str) -> AsyncGenerator[bool, None]:
        """As `watch_serving`, until the connection ends."""
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


def _request(prompt: Prompt, options: GenerateOptions) -> generate_pb2.GenerateRequest:
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
        stop_token_ids=options.stop_token_ids,
        ignore_eos=options.ignore_eos,
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, Tokens):
        request.tokens.CopyFrom(generate_pb2.TokenPrompt(token_ids=prompt.token_ids))
    else:
        request.chat.CopyFrom(_chat(prompt))
    return request


def _chat(messages: Sequence[Message]) -> generate_pb2.ChatPrompt:
    turns = [generate_pb2.ChatMessage(role=m.role, content=m.content) for m in messages]
    return generate_pb2.ChatPrompt(messages=turns)


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
