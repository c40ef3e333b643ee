"""One request's answer, generated as it is sent, and not a moment longer than it is wanted."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from coordinator.http_edge import REQUEST_ID, json_response, sse_event
from coordinator.openai_reply import Json, Reply
from coordinator.openai_schema import Call
from coordinator.request import GenerateSpec, ModelInfo
from kvrelay.errors import Draining, InvalidRequest
from kvrelay.events import Delta, Event, Finished, Started


class Serving(Protocol):
    """What the front needs of the relay."""

    @property
    def model(self) -> ModelInfo: ...

    def generate(
        self, spec: GenerateSpec, *, time_left_s: float | None = None
    ) -> AsyncGenerator[Event, None]: ...


class Answer:
    """One request's answer: an ASGI response that generates as it is sent."""

    def __init__(
        self,
        relay: Serving,
        call: Call,
        reply_to: Callable[[Started], Reply],
        cut: asyncio.Future[None],
    ) -> None:
        self._relay = relay
        self._call = call
        self._reply_to = reply_to
        self._cut = cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _while_connected(self._generate(scope, receive, send), receive, self._cut)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        with _callers_names(self._call):
            async with aclosing(self._relay.generate(self._call.spec)) as events:
                started = await anext(events)
                assert isinstance(started, Started)
                scope[REQUEST_ID] = started.request_id
                reply = self._reply_to(started)
                if self._call.is_streamed:
                    await self._stream(events, reply, send)
                else:
                    response = json_response(await self._collect(events, reply))
                    response.headers["x-request-id"] = reply.request_id
                    await response(scope, receive, send)

    async def _collect(self, events: AsyncGenerator[Event, None], reply: Reply) -> Json:
        texts = []
        finished = None
        async for event in events:
            if isinstance(event, Delta):
                texts.append(event.text)
            elif isinstance(event, Finished):
                finished = event
        assert finished is not None
        return reply.whole("".join(texts), finished)

    async def _stream(self, events: AsyncGenerator[Event, None], reply: Reply, send: Send) -> None:
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-cache",
            "x-accel-buffering": "no",  # nginx would hold tokens back
            "x-request-id": reply.request_id,
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        # What fails before the first token still gets a status of its own.
        first = await anext(events)
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        await _send_events(send, reply.opening())
        is_finished = False
        async for event in _chain(first, events):
            if isinstance(event, Delta):
                await _send_events(send, reply.delta(event))
            elif isinstance(event, Finished):
                is_finished = True
                await _send_events(send, reply.closing(event))
        assert is_finished
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _chain(first: Event, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    yield first
    async for event in events:
        yield event


async def _while_connected(
    work: Coroutine[Any, Any, None], receive: Receive, cut: asyncio.Future[None]
) -> None:
    """Run `work` to its end, unless the caller leaves or `cut` falls first.

    Either cancels it; on return nothing of it is left running.

    Raises:
        Draining: `cut` fell.
        ClientDisconnect: the caller left.
    """

    async def caller_leaves() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    leaving = asyncio.create_task(caller_leaves())
    try:
        await asyncio.wait({working, leaving, cut}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        has_left = leaving.done()
        working.cancel()
        await asyncio.wait({working})
        if not working.cancelled():
            return await working
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    raise ClientDisconnect if has_left else Draining("stopped before the answer was complete")


@contextmanager
def _callers_names(call: Call) -> Iterator[None]:
    """Name refused fields as the caller knows them."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(call.param(error.field), error.problem) from None


async def _send_events(send: Send, values: list[Json]) -> None:
    if values:
        body = b"".join(map(sse_event, values))
        await send({"type": "http.response.body", "body": body, "more_body": True})
