"""The two ways to a server: our gRPC client, and OpenAI's `/v1/completions` over HTTP.

Both send token ids. gRPC shows every token and brings the ledger. Over HTTP an event is a
piece of text, which may be of several tokens and is late where the text of a token was held
back; the number of tokens comes from the server's own `usage`.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from kvrelay.bench import http
from kvrelay.bench.base import Arrived, Ask, Ended, Failed, Handoff, Served
from kvrelay.bench.sse import SseError, SseParser
from kvrelay.client import Client, GenerateOptions, Tokens
from kvrelay.errors import PeerUnavailable, ServingError
from kvrelay.events import Delta, Finished
from kvrelay.obs.ledger import Ledger

ANSWER_WITHIN_S = 5.0
"""Limit of a call that computes nothing."""


class GrpcSource:
    """Asks by `kvrelay.v1.GenerateService`, all requests over one connection."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def served(self) -> Served:
        model = await self._client.model(timeout_s=ANSWER_WITHIN_S)
        return Served(
            model=model.name, context_tokens=model.context_tokens, vocab_size=model.vocab_size
        )

    async def ask(self, ask: Ask) -> AsyncGenerator[Arrived | Ended, None]:
        options = GenerateOptions(
            max_tokens=ask.max_tokens, temperature=ask.temperature, seed=ask.seed, ignore_eos=True
        )
        try:
            async with aclosing(self._client.generate(Tokens(ask.token_ids), options)) as events:
                async for event in events:
                    if isinstance(event, Delta) and event.token_ids:
                        yield Arrived(len(event.token_ids))
                    elif isinstance(event, Finished):
                        yield _ended(event)
        except ServingError as error:
            raise Failed(error.reason) from error


def _ended(finished: Finished) -> Ended:
    return Ended(
        output_tokens=finished.usage.completion_tokens,
        cached_prompt_tokens=finished.usage.cached_prompt_tokens,
        handoff=_handoff(finished.ledger),
        attempts=finished.ledger.attempts,
    )


def _handoff(ledger: Ledger) -> Handoff | None:
    if not ledger.transport:
        return None
    return Handoff(
        tax_s=ledger.handoff_tax_s,
        stages=ledger.gap1_stages,
        transport=ledger.transport,
        num_bytes=ledger.handoff_num_bytes,
        overlapped_num_bytes=ledger.overlapped_num_bytes,
    )


class HttpSource:
    """Asks a server that speaks OpenAI's protocol, without TLS.

    Args:
        address: HOST:PORT.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._model = ""

    async def served(self) -> Served:
        try:
            async with (
                asyncio.timeout(ANSWER_WITHIN_S),
                http.exchange(self._address, "GET", "/v1/models") as response,
            ):
                card = json.loads(await response.body())["data"][0]
                self._model = str(card["id"])
        except (OSError, http.HttpError) as error:
            raise PeerUnavailable(
                f"no OpenAI-style HTTP server answers at {self._address}"
            ) from error
        except (ValueError, LookupError, TypeError) as error:
            raise PeerUnavailable(f"{self._address} does not say what it serves") from error
        context_tokens = card.get("max_model_len")
        return Served(
            model=self._model,
            context_tokens=context_tokens if isinstance(context_tokens, int) else None,
            vocab_size=None,
        )

    async def ask(self, ask: Ask) -> AsyncGenerator[Arrived | Ended, None]:
        try:
            async with http.exchange(
                self._address, "POST", "/v1/completions", self._body(ask)
            ) as response:
                if response.status != 200:
                    raise Failed(_reason(await response.body(), response.status))
                async with aclosing(_events(response)) as events:
                    async for event in events:
                        yield event
        except (OSError, http.HttpError) as error:
            raise Failed(PeerUnavailable.reason) from error
        except SseError as error:
            raise Failed("NOT_UNDERSTOOD") from error

    def _body(self, ask: Ask) -> bytes:
        return json.dumps(
            {
                "model": self._model,
                "prompt": ask.token_ids,
                "max_tokens": ask.max_tokens,
                "temperature": ask.temperature,
                "seed": ask.seed,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            separators=(",", ":"),
        ).encode()


async def _events(response: http.Response) -> AsyncGenerator[Arrived | Ended, None]:
    parser = SseParser()
    usage: dict[str, Any] = {}
    async with aclosing(response.pieces()) as pieces:
        async for piece in pieces:
            for data in parser.feed(piece):
                if data == b"[DONE]":
                    yield _ended_by_usage(usage)
                    return
                chunk = _chunk(data)
                usage = chunk.get("usage") or usage
                if _has_text(chunk):
                    yield Arrived(1)


def _chunk(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError:
        raise SseError("an event that is not JSON") from None
    if not isinstance(chunk, dict):
        raise SseError("an event that is not a JSON object")
    if "error" in chunk:
        raise Failed(_reason(data, 200))
    return chunk


def _has_text(chunk: dict[str, Any]) -> bool:
    return any(choice.get("text") for choice in chunk.get("choices") or ())


def _ended_by_usage(usage: dict[str, Any]) -> Ended:
    details = usage.get("prompt_tokens_details") or {}
    return Ended(
        output_tokens=usage.get("completion_tokens"),
        cached_prompt_tokens=details.get("cached_tokens"),
    )


def _reason(body: bytes, status: int) -> str:
    """The server's own code for what went wrong, where it is a name."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, LookupError, TypeError):
        code = None
    return code if isinstance(code, str) and code else f"HTTP_{status}"
