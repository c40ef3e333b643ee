"""The coordinator's gRPC faces: messages in, calls of `Relay` and `Pool`, messages out.

Nothing is decided here. Errors become statuses in `kvrelay.rpc.status`.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
from structlog.contextvars import bind_contextvars

from coordinator import convert
from coordinator.canary import Canary
from coordinator.pool import Pool, Seat
from coordinator.relay import Relay
from kvrelay.clock import Clock
from kvrelay.errors import InvalidRequest, PeerUnavailable
from kvrelay.events import Finished, Started
from kvrelay.rpc import auth
from kvrelay.rpc import convert as rpc_convert
from kvrelay.v1 import generate_pb2 as pb
from kvrelay.v1 import generate_pb2_grpc, pool_pb2, pool_pb2_grpc

LEDGER_KEY = "kvrelay-ledger-bin"

Context = grpc.aio.ServicerContext[Any, Any]


class GenerateServicer(generate_pb2_grpc.GenerateServiceServicer):
    """See protos/kvrelay/v1/generate.proto."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay

    async def Generate(
        self, request: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        spec = convert.spec_from_wire(request)
        # A caller that leaves while we stand at the `yield` must free the workers at once,
        # not when the garbage collector finds the inner iterator.
        async with contextlib.aclosing(
            self._relay.generate(spec, time_left_s=context.time_remaining())
        ) as events:
            async for event in events:
                if isinstance(event, Started):
                    bind_contextvars(request_id=event.request_id)
                if isinstance(event, Finished):
                    ledger = rpc_convert.ledger_to_wire(event.ledger)
                    context.set_trailing_metadata(((LEDGER_KEY, ledger.SerializeToString()),))
                yield convert.event_to_wire(event)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        prompt = convert.tokenize_input_from_wire(request)
        return pb.TokenizeResponse(token_ids=await self._relay.tokenize(prompt))

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        return pb.DetokenizeResponse(text=await self._relay.detokenize(request.token_ids))

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        return convert.model_to_wire(self._relay.model)

    async def Explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        ledger = self._relay.explain(request.request_id)
        return pb.ExplainResponse(ledger=rpc_convert.ledger_to_wire(ledger))


class PoolServicer(pool_pb2_grpc.PoolServiceServicer):
    """See protos/kvrelay/v1/pool.proto."""

    def __init__(
        self,
        *,
        pool: Pool,
        relay: Relay,
        canary: Canary,
        clock: Clock,
        heartbeat_interval_s: float,
    ) -> None:
        self._pool = pool
        self._relay = relay
        self._canary = canary
        self._clock = clock
        self._heartbeat_interval_s = heartbeat_interval_s

    async def Join(
        self, request_iterator: AsyncIterator[pool_pb2.JoinRequest], context: Context
    ) -> AsyncIterator[pool_pb2.JoinResponse]:
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("message") != "identity":
            raise InvalidRequest("identity", "must be the first message")
        identity = rpc_convert.identity_from_wire(first.identity)
        auth.require_claimed(context.auth_context(), auth.Peer(identity.role.value))
        seat = self._pool.join(identity)
        try:
            yield pool_pb2.JoinResponse(
                heartbeat_interval_ms=int(1000 * self._heartbeat_interval_s),
                ticket_key=seat.member.ticket_key,
            )
            await self._listen(request_iterator, seat)
        finally:
            self._pool.leave(seat.member, "join stream ended")

    async def _listen(self, requests: AsyncIterator[pool_pb2.JoinRequest], seat: Seat) -> None:
        """Take in loads until the worker ends the stream or the pool ends the membership."""
        expelled = asyncio.ensure_future(seat.expelled.wait())
        heartbeats = asyncio.ensure_future(self._hear(requests, seat))
        try:
            await asyncio.wait({expelled, heartbeats}, return_when=asyncio.FIRST_COMPLETED)
            if expelled.done():
                raise PeerUnavailable(f"{seat.member.worker_id} is no longer a member; join again")
            heartbeats.result()
        finally:
            for task in (expelled, heartbeats):
                task.cancel()
            await asyncio.gather(expelled, heartbeats, return_exceptions=True)

    async def _hear(self, requests: AsyncIterator[pool_pb2.JoinRequest], seat: Seat) -> None:
        async for request in requests:
            if request.WhichOneof("message") != "load":
                raise InvalidRequest("load", "must be every message after the first")
            self._pool.heard(seat.member, rpc_convert.load_from_wire(request.load))

    async def GetPool(
        self, request: pool_pb2.GetPoolRequest, context: Context
    ) -> pool_pb2.GetPoolResponse:
        now_s = self._clock.now()
        return pool_pb2.GetPoolResponse(
            members=[convert.member_to_wire(member, now_s) for member in self._pool.members()],
            is_ready=self._canary.is_ready,
            not_ready_reason=self._canary.not_ready_reason,
            active_requests=self._relay.num_active,
            finished_requests_total=self._relay.num_finished,
            lost_attempts_total=self._relay.num_lost_attempts,
        )
