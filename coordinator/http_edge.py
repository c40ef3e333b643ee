"""The edge of the HTTP front: what comes in is bounded here, what fails becomes an answer here.

Before an answer has begun, a failure is a status and an error body; afterwards it is the
stream's last event, without `[DONE]`.
"""

import asyncio
import json
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator import openai_reply
from coordinator.openai_reply import Json, Refusal
from kvrelay.errors import ServingError

log = structlog.get_logger(__name__)

REQUEST_ID = "kvrelay.request_id"
"""Where a request's scope holds its id, once it has one."""


class Edge:
    """Where every failure of a request becomes its answer, and unread answers end."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        tasks: set[asyncio.Task[Any]],
        counter: Counter,
        paths: frozenset[str],
        stall_s: float,
        abort: Callable[[Scope], None],
    ) -> None:
        self._app = app
        self._tasks = tasks
        self._counter = counter
        self._paths = paths
        self._stall_s = stall_s
        self._abort = abort

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        path = scope["path"] if scope["path"] in self._paths else "other"
        status = 0

        async def send_in_time(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                async with asyncio.timeout(self._stall_s):
                    await send(message)
            except TimeoutError:
                log.warning("http.stalled", stall_s=self._stall_s)
                self._abort(scope)
                raise ClientDisconnect from None

        async def answer() -> None:
            refused = await self._refusal(scope, self._app(scope, receive, send_in_time))
            if refused is not None and status:
                body = sse_event(refused.body)
                await send_in_time({"type": "http.response.body", "body": body})
            elif refused is not None:
                headers = dict(refused.headers)
                if REQUEST_ID in scope:
                    headers["x-request-id"] = scope[REQUEST_ID]
                response = json_response(refused.body, refused.status, headers)
                await response(scope, receive, send_in_time)

        try:
            await answer()
        except ClientDisconnect:
            log.debug("http.disconnected", path=path)
        finally:
            self._tasks.discard(task)
            self._counter.labels(path, str(status or "gone")).inc()

    async def _refusal(self, scope: Scope, answer: Awaitable[None]) -> Refusal | None:
        try:
            await answer
        except ClientDisconnect:
            raise
        except ServingError as error:
            return openai_reply.refusal(error)
        except Exception:
            error_id = secrets.token_hex(8)
            log.exception("http.bug", error_id=error_id, path=scope["path"])
            return Refusal(status=500, message=f"internal error {error_id}", code="INTERNAL")
        return None


async def read_body(request: Request, *, max_num_bytes: int, timeout_s: float) -> bytes:
    """Read the body, and no more of it than allowed."""
    refused = HTTPException(413, f"body: at most {max_num_bytes} bytes")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > max_num_bytes:
        raise refused
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                data += piece
                if len(data) > max_num_bytes:
                    raise refused
    except TimeoutError:
        raise HTTPException(408, f"body: not sent within {timeout_s} s") from None
    return bytes(data)


def require_json(request: Request) -> None:
    """Refuse any other body.

    Web pages may post other types across origins unasked: this keeps them from using a
    server on the reader's own machine.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise HTTPException(415, "content-type: must be application/json")


async def refuse_http(request: Request, error: Exception) -> Response:
    """Starlette's refusals (404, 405) and ours (408, 413, 415), in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    code = error.detail.upper().replace(" ", "_") if error.status_code in (404, 405) else None
    param = error.detail.partition(":")[0] if code is None else None
    refused = Refusal(
        status=error.status_code, message=error.detail, code=code or "REFUSED", param=param
    )
    return json_response(refused.body, refused.status, dict(error.headers or {}))


def _dump(value: Json) -> bytes:
    # A lone surrogate, which only a caller's own words can hold, becomes its JSON escape.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(
    value: Json, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(_dump(value), status, headers, media_type="application/json")


def sse_event(value: Json) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"
