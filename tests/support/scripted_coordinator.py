"""A coordinator in this process: everything real but its tokenizer, and its workers."""

import asyncio
import contextlib
import itertools
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from coordinator.admission import Admission, AdmissionLimits
from coordinator.canary import Canary
from coordinator.lifecycle import Patience
from coordinator.mover import Mover
from coordinator.moves import MovePlanner, MoveRules
from coordinator.pool import Pool
from coordinator.registry import Registry
from coordinator.relay import Relay
from coordinator.request import ModelInfo
from coordinator.router import Disaggregate, PrefixMap, Router, RouteRules, common_offer
from coordinator.service import GenerateServicer, PoolServicer
from coordinator.turns import Turns
from coordinator.workers import Workers
from kvrelay.clock import MonotonicClock
from kvrelay.handoff.ticket import KEY_NUM_BYTES
from kvrelay.obs.metrics import CoordinatorMetrics
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.types import Role
from kvrelay.v1 import generate_pb2_grpc, pool_pb2_grpc
from tests.support.scripted_workers import VOCAB_SIZE

MODEL = ModelInfo(
    name="scripted",
    model_digest="m",
    context_tokens=512,
    vocab_size=VOCAB_SIZE,
    eos_token_ids=(),
    default_max_tokens=16,
    disaggregate="always",
)


class LetterTokenizer:
    """One token per character; any id has a character."""

    special_token_ids = frozenset()

    def encode(self, text, *, add_special_tokens):
        return [ord(c) % VOCAB_SIZE for c in text]

    def encode_chat(self, messages):
        return self.encode("".join(m.content for m in messages), add_special_tokens=False)

    def decode(self, token_ids, *, skip_special_tokens=True):
        return "".join(chr(0x100 + t) for t in token_ids)


@dataclass
class Deployment:
    """What tests touch."""

    relay: Relay
    pool: Pool
    canary: Canary
    mover: Mover
    address: str
    metrics: CollectorRegistry

    async def join(self, *workers) -> None:
        """Have workers join, and return when all are members."""
        want = {w.worker_id for w in workers}
        for worker in workers:
            worker.join(self.address)
        async with asyncio.timeout(10):
            while not want <= {m.worker_id for m in self.pool.members() if m.takes_work}:
                await self.pool.wait_change()

    async def until_left(self, worker_id) -> None:
        while worker_id in {m.worker_id for m in self.pool.members()}:
            await self.pool.wait_change()


@contextlib.asynccontextmanager
async def scripted_coordinator(
    *,
    disaggregate=Disaggregate.ALWAYS,
    max_requests=64,
    max_attempts=4,
    queue_limit_s=2.0,
    suspect_after_s=3.0,
    expect=None,
    max_remembered=64,
    move_rules=None,
):
    clock, ids = MonotonicClock(), itertools.count(1)

    def mint_id():
        return f"{next(ids):032x}"

    prometheus = CollectorRegistry()
    metrics = CoordinatorMetrics(prometheus)
    rules = RouteRules(disaggregate=disaggregate, local_prefill_max_tokens=0)
    pool = Pool(
        registry=Registry(model_digest="m", suspect_after_s=suspect_after_s),
        router=Router(rules, PrefixMap(max_blocks_per_worker=64)),
        workers=Workers(tls=None, on_stale=metrics.stale_outputs.inc),
        clock=clock,
        mint_key=lambda: bytes(KEY_NUM_BYTES),
        on_change=lambda members: None,
    )
    relay = Relay(
        model=MODEL,
        tokenizer=LetterTokenizer(),
        pool=pool,
        admission=Admission(AdmissionLimits(max_requests=max_requests, max_tokens=100_000)),
        patience=Patience(max_attempts=max_attempts, queue_limit_s=queue_limit_s),
        books=metrics,
        clock=clock,
        mint_id=mint_id,
        mint_seed=lambda: 7,
        hash_key=b"k",
        max_remembered=max_remembered,
        turns=Turns(),
    )
    canary = Canary(
        relay=relay,
        pool=pool,
        clock=clock,
        mint_id=mint_id,
        disaggregate=disaggregate,
        expect=expect or {Role.PREFILL: 1, Role.DECODE: 1},
        interval_s=60,
        on_change=lambda ready: server.set_serving(ready),
    )
    mover = Mover(
        planner=MovePlanner(move_rules or MoveRules(), common_offer),
        pool=pool,
        sessions=relay.sessions,
        clock=clock,
        on_end=lambda reason, outcome: metrics.observe_move(reason.value, outcome.value),
    )
    pool_servicer = PoolServicer(
        pool=pool, relay=relay, canary=canary, clock=clock, heartbeat_interval_s=0.1
    )
    server = RpcServer(
        listen="127.0.0.1:0",
        tls=None,
        insecure=False,
        services=[
            Service(
                generate_pb2_grpc.add_GenerateServiceServicer_to_server,
                GenerateServicer(relay),
                "kvrelay.v1.GenerateService",
            ),
            Service(
                pool_pb2_grpc.add_PoolServiceServicer_to_server,
                pool_servicer,
                "kvrelay.v1.PoolService",
            ),
        ],
    )
    address = await server.start()
    try:
        yield Deployment(relay, pool, canary, mover, address, prometheus)
    finally:
        await pool.close()
        await server.stop()
