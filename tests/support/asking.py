"""Asking a running deployment for tokens, over its public stubs."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvrelay.rpc.channel import open_channel
from kvrelay.v1 import common_pb2, generate_pb2, generate_pb2_grpc
from tests.support.deployment import Deployment, deployment


@dataclass(frozen=True, slots=True)
class Ask:
    """One request by token ids; greedy unless a temperature is given."""

    prompt_ids: tuple[int, ...]
    max_tokens: int = 24
    temperature: float = 0.0
    seed: int = 0

    @property
    def message(self) -> generate_pb2.GenerateRequest:
        return generate_pb2.GenerateRequest(
            tokens=generate_pb2.TokenPrompt(token_ids=self.prompt_ids),
            sampling=common_pb2.SamplingParams(temperature=self.temperature, seed=self.seed),
            max_tokens=self.max_tokens,
            ignore_eos=True,
        )


@dataclass(slots=True)
class Answer:
    """What came back. `position` grew without a gap or a repeat, or `read` has raised."""

    token_ids: list[int] = field(default_factory=list)
    request_id: str = ""
    ledger: common_pb2.Ledger | None = None

    def take(self, response: generate_pb2.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "started":
                assert not self.request_id
                self.request_id = response.started.request_id
            case "delta":
                assert self.ledger is None
                assert response.delta.position == len(self.token_ids)
                self.token_ids += response.delta.token_ids
            case "finished":
                self.ledger = response.finished.ledger


class Asker:
    """A caller's channel to one deployment."""

    def __init__(self, target: str) -> None:
        self._channel = open_channel(target)
        self.stub = generate_pb2_grpc.GenerateServiceStub(self._channel)

    async def __aenter__(self) -> "Asker":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def one(self, ask: Ask, *, timeout_s: float = 120.0) -> Answer:
        answer = Answer()
        async for response in self.stub.Generate(ask.message, timeout=timeout_s):
            answer.take(response)
        assert answer.ledger is not None, "the stream ended without `finished`"
        return answer

    async def all(self, asks: Sequence[Ask], *, at_once: int) -> list[Answer]:
        """Every answer, in order of `asks`, with `at_once` requests under way."""
        room = asyncio.Semaphore(at_once)

        async def one(ask: Ask) -> Answer:
            async with room:
                return await self.one(ask)

        return await asyncio.gather(*(one(ask) for ask in asks))


@asynccontextmanager
async def deployed(
    model: Path, log_dir: Path, *flags: str, num_prefill: int = 1, num_decode: int = 1
) -> AsyncIterator[tuple[Deployment, Asker]]:
    """A deployment of its own, and somebody to ask it."""
    start = deployment(
        model, log_dir=log_dir, num_prefill=num_prefill, num_decode=num_decode, flags=flags
    )
    async with start as it, Asker(it.grpc) as asker:
        yield it, asker
    errors = [line for line in it.logs().splitlines() if '"level": "error"' in line]
    assert not errors, "whatever was done to it, no process found an error of its own"
