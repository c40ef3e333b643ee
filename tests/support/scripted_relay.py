"""A relay that plays a script, and a front that serves it, for tests of the ways in."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from coordinator.http import HttpFront
from coordinator.request import GenerateSpec, ModelInfo, check
from kvrelay.errors import ServingError
from kvrelay.events import Delta, Event, Finished, Started, Usage
from kvrelay.obs.ledger import LedgerBuilder
from kvrelay.types import FinishReason

MODEL = ModelInfo(
    name="tiny",
    model_digest="0123456789abcdef" * 2,
    context_tokens=64,
    vocab_size=100,
    eos_token_ids=(2,),
    default_max_tokens=16,
    disaggregate="auto",
)
REQUEST_ID = "00c0ffee00c0ffee00c0ffee00c0ffee"

Step = str | Exception | asyncio.Event
"""Text to hand out, an error to raise, or an event to wait for."""


class ScriptedRelay:
    """Checks a request as the real one does, then plays `script` and finishes."""

    def __init__(self, script: Iterable[Step] = (), *, refusal: ServingError | None = None) -> None:
        self.model = MODEL
        self.specs: list[GenerateSpec] = []
        self.num_running = 0
        self.has_started = asyncio.Event()
        self.has_ended = asyncio.Event()
        self._script = script
        self._refusal = refusal

    async def generate(
        self, spec: GenerateSpec, *, time_left_s: float | None = None
    ) -> AsyncGenerator[Event, None]:
        check(spec, self.model)
        self.specs.append(spec)
        if self._refusal is not None:
            raise self._refusal
        self.num_running += 1
        self.has_started.set()
        try:
            async for event in self._play():
                yield event
        finally:
            self.num_running -= 1
            self.has_ended.set()

    async def _play(self) -> AsyncIterator[Event]:
        yield Started(request_id=REQUEST_ID, seed=7, prompt_tokens=5)
        position = 0
        for step in self._script:
            match step:
                case str():
                    yield Delta(position=position, token_ids=(position,), text=step)
                    position += 1
                case asyncio.Event():
                    await step.wait()
                case _:
                    raise step
        ledger = LedgerBuilder(request_id=REQUEST_ID, arrived_at_s=0.0).build("stop", 1.0)
        usage = Usage(prompt_tokens=5, completion_tokens=position, cached_prompt_tokens=4)
        yield Finished(reason=FinishReason.STOP, usage=usage, ledger=ledger)


@dataclass
class ScriptedReadiness:
    """Ready unless told a reason."""

    not_ready_reason: str = ""


@dataclass
class Served:
    """A front that listens, and the base URL of it."""

    front: HttpFront
    url: str
    address: str
    readiness: ScriptedReadiness


@asynccontextmanager
async def serving(relay: ScriptedRelay, **options: Any) -> AsyncIterator[Served]:
    """Serve `relay` on loopback. On leaving, whatever is still under way is cut off."""
    readiness = ScriptedReadiness()
    front = HttpFront(relay, "127.0.0.1:0", CollectorRegistry(), readiness=readiness, **options)
    address = await front.start()
    try:
        yield Served(front, f"http://{address}", address, readiness)
    finally:
        await front.stop(grace_s=0.0)
