"""Starts a coordinator: `python -m coordinator --model NAME`.

1. settings, model directory and tokenizer; exit 2 where one of them cannot be
2. gRPC and HTTP listen; workers join; health says NOT_SERVING
3. the canary crosses the pool; health says SERVING
4. SIGTERM or Ctrl-C: nothing new is taken, what is under way ends within `drain_s`; exit 0
"""

import asyncio
import contextlib
import secrets
import sys

import structlog
from prometheus_client import CollectorRegistry

from coordinator.admission import Admission, AdmissionLimits
from coordinator.canary import Canary
from coordinator.config import CoordinatorConfig
from coordinator.http import HttpFront
from coordinator.lifecycle import Patience
from coordinator.mover import Mover
from coordinator.moves import MovePlanner, MoveRules
from coordinator.pool import Pool
from coordinator.prefix_map import PrefixMap
from coordinator.registry import Registry
from coordinator.relay import Relay
from coordinator.request import ModelInfo, sampling_defaults
from coordinator.router import Disaggregate, Router, RouteRules, common_offer
from coordinator.service import GenerateServicer, PoolServicer
from coordinator.tokenizer import Tokenizer
from coordinator.turns import Turns
from coordinator.workers import Workers
from kvrelay import process
from kvrelay.clock import MonotonicClock
from kvrelay.config import exit_when_refused, load_settings
from kvrelay.handoff.ticket import KEY_NUM_BYTES
from kvrelay.obs import logging
from kvrelay.obs.metrics import CoordinatorMetrics, serve_metrics
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.store.manifest import model_digest, read_model_dir, resolve_model
from kvrelay.types import Role
from kvrelay.v1 import generate_pb2, generate_pb2_grpc, pool_pb2, pool_pb2_grpc

log = structlog.get_logger(__name__)

PREFIX_BLOCKS_PER_WORKER = 65536


def main() -> None:
    """Run until told to stop."""
    config = load_settings(CoordinatorConfig, service="coordinator", argv=sys.argv[1:])
    logging.configure(level=config.log_level, fmt=config.log_format, service="coordinator")
    with exit_when_refused("coordinator"):
        asyncio.run(_serve(config))


async def _serve(config: CoordinatorConfig) -> None:
    model_dir = resolve_model(config.model)
    model_name = read_model_dir(model_dir).name
    tokenizer = Tokenizer(model_dir)
    model = ModelInfo(
        name=model_name,
        model_digest=model_digest(model_dir),
        context_tokens=tokenizer.context_length,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=tuple(tokenizer.eos_token_ids),
        default_max_tokens=min(config.default_max_tokens, tokenizer.context_length),
        disaggregate=config.disaggregate,
        sampling=sampling_defaults(tokenizer.generation_config),
    )
    clock = MonotonicClock()
    prometheus = CollectorRegistry()
    metrics = CoordinatorMetrics(prometheus)
    disaggregate = Disaggregate(config.disaggregate)
    router = Router(
        RouteRules(
            disaggregate=disaggregate, local_prefill_max_tokens=config.local_prefill_max_tokens
        ),
        PrefixMap(max_blocks_per_worker=PREFIX_BLOCKS_PER_WORKER),
    )
    pool = Pool(
        registry=Registry(model_digest=model.model_digest, suspect_after_s=config.suspect_after_s),
        router=router,
        workers=Workers(tls=config.tls, on_stale=metrics.stale_outputs.inc),
        clock=clock,
        mint_key=lambda: secrets.token_bytes(KEY_NUM_BYTES),
        on_change=lambda members: metrics.observe_pool([(m.identity, m.load) for m in members]),
    )
    relay = Relay(
        model=model,
        tokenizer=tokenizer,
        pool=pool,
        admission=Admission(
            AdmissionLimits(
                max_requests=config.max_requests, max_tokens=config.max_tokens_under_way
            )
        ),
        patience=Patience(max_attempts=config.max_attempts, queue_limit_s=config.queue_limit_s),
        books=metrics,
        clock=clock,
        mint_id=_mint_id,
        mint_seed=lambda: secrets.randbits(64),
        hash_key=secrets.token_bytes(32),
        max_remembered=config.max_ledgers,
        turns=Turns(),
    )
    metrics.num_requests_running.set_function(lambda: relay.num_active - relay.num_waiting)
    metrics.num_requests_waiting.set_function(lambda: relay.num_waiting)
    canary = Canary(
        relay=relay,
        pool=pool,
        clock=clock,
        mint_id=_mint_id,
        disaggregate=disaggregate,
        expect={
            Role.PREFILL: 0 if disaggregate is Disaggregate.NEVER else config.expect_prefill,
            Role.DECODE: config.expect_decode,
        },
        interval_s=config.canary_interval_s,
        on_change=lambda is_ready: server.set_serving(is_ready),
    )
    mover = Mover(
        planner=MovePlanner(
            MoveRules(relief=config.relief, max_under_way=config.max_moves), common_offer
        ),
        pool=pool,
        sessions=relay.sessions,
        clock=clock,
        on_end=lambda reason, outcome: metrics.observe_move(reason.value, outcome.value),
    )
    server = RpcServer(
        listen=config.listen,
        tls=config.tls,
        insecure=config.insecure,
        services=[
            Service(
                generate_pb2_grpc.add_GenerateServiceServicer_to_server,
                GenerateServicer(relay),
                generate_pb2.DESCRIPTOR.services_by_name["GenerateService"].full_name,
            ),
            Service(
                pool_pb2_grpc.add_PoolServiceServicer_to_server,
                PoolServicer(
                    pool=pool,
                    relay=relay,
                    canary=canary,
                    clock=clock,
                    heartbeat_interval_s=config.heartbeat_interval_s,
                ),
                pool_pb2.DESCRIPTOR.services_by_name["PoolService"].full_name,
            ),
        ],
    )
    http = HttpFront(
        relay,
        config.http_listen,
        prometheus,
        readiness=canary,
        tls=config.tls,
        insecure=config.insecure,
    )
    exporter = serve_metrics(config.metrics_listen, prometheus) if config.metrics_listen else None
    try:
        await _run(
            config, relay=relay, pool=pool, canary=canary, mover=mover, server=server, http=http
        )
    finally:
        if exporter is not None:
            exporter.close()


async def _run(
    config: CoordinatorConfig,
    *,
    relay: Relay,
    pool: Pool,
    canary: Canary,
    mover: Mover,
    server: RpcServer,
    http: HttpFront,
) -> None:
    stop = process.stop_signal()
    process.settle()
    grpc_address = await server.start()
    http_address = await http.start()
    expelling = asyncio.create_task(pool.run())
    probing = asyncio.create_task(canary.run())
    moving = asyncio.create_task(mover.run())
    log.info("coordinator.listening", grpc=grpc_address, http=http_address)
    process.tell_ready(
        config.ready_fd, {"grpc": config.advertised(grpc_address), "http": http_address}
    )
    try:
        await process.until(stop, (expelling, probing, moving))
        log.info("coordinator.draining", active_requests=relay.num_active)
        await _end(probing)  # and with it, what health says
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.drain_s):
                await relay.drain()
    finally:
        await _end(probing, moving, expelling)
        await http.stop(grace_s=1.0)
        await pool.close()
        await server.drain(1.0)
        log.info("coordinator.stopped")


async def _end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _mint_id() -> str:
    return secrets.token_hex(16)


if __name__ == "__main__":
    main()
