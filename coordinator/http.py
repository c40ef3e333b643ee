"""The HTTP front: OpenAI's routes over the same relay that gRPC callers use. Decides nothing.

Runs inside the coordinator's event loop and leaves signals to it. Failures become answers in
`http_edge`; a caller who leaves, or stops reading, cancels the request at once.
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import uvicorn
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from coordinator import openai_reply
from coordinator.http_answer import Answer, Serving
from coordinator.http_edge import Edge, json_response, read_body, refuse_http, require_json
from coordinator.openai_reply import Reply
from coordinator.openai_schema import ChatBody, CompletionBody, parse
from kvrelay.config import SettingsError, TlsFiles, is_loopback, split_address
from kvrelay.errors import Draining, InvalidRequest, NotFound
from kvrelay.events import Started

MAX_BODY_NUM_BYTES = 4 << 20
BODY_S = 30.0
"""How long a caller may take to send a body."""

STALL_S = 30.0
"""How long a caller may leave an answer unread before it counts as gone."""

MAX_CONNECTIONS = 1024
FLUSH_S = 1.0
"""On stopping: how long last words may take to reach callers."""


class Readiness(Protocol):
    """Whoever knows whether requests can be served."""

    @property
    def not_ready_reason(self) -> str:
        """Empty when ready."""


class HttpFront:
    """Serves `relay` at `listen`, from `start` until `stop`.

    With `tls`, callers need a certificate that its `ca` vouches for.

    Raises:
        SettingsError: `listen` can be reached from elsewhere, and there is neither `tls` nor
            `insecure`.
    """

    def __init__(
        self,
        relay: Serving,
        listen: str,
        registry: CollectorRegistry,
        *,
        readiness: Readiness,
        tls: TlsFiles | None = None,
        insecure: bool = False,
        max_body_num_bytes: int = MAX_BODY_NUM_BYTES,
        body_s: float = BODY_S,
        stall_s: float = STALL_S,
        max_connections: int = MAX_CONNECTIONS,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if not (tls or insecure or is_loopback(split_address(listen)[0])):
            raise SettingsError(
                f"http_listen = {listen} can be reached from other machines: set the three tls "
                "files, or insecure (--insecure) to serve it without TLS"
            )
        self._relay = relay
        self._readiness = readiness
        self._listen = listen
        self._registry = registry
        self._max_body_num_bytes = max_body_num_bytes
        self._body_s = body_s
        self._wall_clock = wall_clock
        self._started_at_s = int(wall_clock())
        self._edge_tasks: set[asyncio.Task[Any]] = set()
        self._is_stopping = False
        app = self._app(stall_s=stall_s)
        self._server = _Server(_config(app, tls=tls, max_connections=max_connections))
        self._serving: asyncio.Task[None] | None = None
        self._cut: asyncio.Future[None] | None = None

    def _app(self, *, stall_s: float) -> Starlette:
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._model),
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat_completions, methods=["POST"]),
        ]
        counter = Counter(
            "kvrelay_http_requests",
            "HTTP requests answered, by path and status.",
            ["path", "status"],
            registry=self._registry,
        )
        edge = Middleware(
            Edge,
            tasks=self._edge_tasks,
            counter=counter,
            paths=frozenset(route.path for route in routes),
            stall_s=stall_s,
            abort=self._abort,
        )
        return Starlette(
            routes=routes, middleware=[edge], exception_handlers={HTTPException: refuse_http}
        )

    async def start(self) -> str:
        """Listen. Returns the real HOST:PORT.

        Raises:
            SettingsError: the address cannot be bound.
        """
        assert self._serving is None
        loop = asyncio.get_running_loop()
        listener = await _bind(self._listen)
        host, port = listener.getsockname()[:2]
        serving = loop.create_task(self._server.serve(sockets=[listener]), name="http")
        listening = loop.create_task(self._server.is_listening.wait())
        await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            listening.cancel()
            listener.close()
            await serving
        self._cut = loop.create_future()
        self._serving = serving
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def stop(self, grace_s: float = 10.0) -> None:
        """Take nothing new, let answers under way end within `grace_s`, then cut them off."""
        if self._serving is None or self._cut is None:
            return
        self._is_stopping = True
        self._server.should_exit = True
        await self._idle(grace_s)
        if not self._cut.done():
            self._cut.set_result(None)
        await self._idle(FLUSH_S)
        await asyncio.wait({self._serving}, timeout=FLUSH_S)
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()
        await self._serving
        await self._idle(FLUSH_S)

    async def _idle(self, timeout_s: float) -> None:
        if self._edge_tasks:
            await asyncio.wait(set(self._edge_tasks), timeout=timeout_s)

    def _abort(self, scope: Scope) -> None:
        for connection in list(self._server.server_state.connections):
            if isinstance(connection, H11Protocol) and connection.scope is scope:
                connection.transport.abort()

    async def _health(self, request: Request) -> Response:
        reason = "stopping" if self._is_stopping else self._readiness.not_ready_reason
        if not reason:
            return json_response({"status": "ready"})
        return json_response({"status": "not ready", "reason": reason}, 503, {"retry-after": "1"})

    async def _metrics(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._registry), headers={"content-type": content_type})

    async def _models(self, request: Request) -> Response:
        card = openai_reply.model_card(self._relay.model, self._started_at_s)
        return json_response({"object": "list", "data": [card]})

    async def _model(self, request: Request) -> Response:
        model = self._relay.model
        if request.path_params["name"] != model.name:
            raise NotFound(f"no such model; the model is {model.name!r}")
        return json_response(openai_reply.model_card(model, self._started_at_s))

    async def _completions(self, request: Request) -> "Answer":
        return await self._generate(request, parse_as=CompletionBody)

    async def _chat_completions(self, request: Request) -> "Answer":
        return await self._generate(request, parse_as=ChatBody)

    async def _generate(
        self, request: Request, *, parse_as: type[CompletionBody] | type[ChatBody]
    ) -> "Answer":
        if self._is_stopping:
            raise Draining("the HTTP front is stopping")
        assert self._cut is not None
        with_ledger = _ledger_is_asked_for(request)
        require_json(request)
        data = await read_body(
            request, max_num_bytes=self._max_body_num_bytes, timeout_s=self._body_s
        )
        call = parse(parse_as, data)

        def reply_to(started: Started) -> Reply:
            return Reply(
                request_id=started.request_id,
                created_s=int(self._wall_clock()),
                model=self._relay.model,
                is_chat=parse_as is ChatBody,
                with_usage=call.with_usage,
                with_ledger=with_ledger,
            )

        return Answer(self._relay, call, reply_to, self._cut)


class _Server(uvicorn.Server):
    """Leaves signals to the process that it lives in, and says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()


def _ledger_is_asked_for(request: Request) -> bool:
    asked = request.query_params.get("ledger", "0")
    if asked not in ("0", "1"):
        raise InvalidRequest("ledger", "must be 0 or 1")
    return asked == "1"


def _config(app: ASGIApp, *, tls: TlsFiles | None, max_connections: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        interface="asgi3",
        lifespan="off",
        log_config=None,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=max_connections,
        ssl_certfile=tls.cert if tls else None,
        ssl_keyfile=tls.key if tls else None,
        ssl_ca_certs=str(tls.ca) if tls else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if tls else ssl.CERT_NONE,
    )


async def _bind(listen: str) -> socket.socket:
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(*split_address(listen), type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family)
    except OSError as error:
        raise SettingsError(f"http_listen = {listen} cannot be bound: {error.strerror}") from error
