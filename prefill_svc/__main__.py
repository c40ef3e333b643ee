"""Starts a prefill worker: `python -m prefill_svc --model NAME --coordinator HOST:PORT`.

Its life is in `kvrelay.worker`. Exit 0 after a drain, 2 where settings or model cannot be,
70 when the engine failed.
"""

import asyncio
import os
import secrets
import sys

from prometheus_client import CollectorRegistry

from kvrelay import worker
from kvrelay.clock import MonotonicClock
from kvrelay.config import exit_when_refused, load_settings
from kvrelay.obs import logging
from kvrelay.obs.metrics import WorkerMetrics, serve_metrics
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.transfer.build import build_transports
from kvrelay.types import Role, WorkerIdentity
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from prefill_svc.config import PrefillConfig
from prefill_svc.handoff import HandoffService
from prefill_svc.holds import HoldLimits
from prefill_svc.keeper import HoldKeeper
from prefill_svc.service import PrefillService


def main() -> None:
    """Run until told to stop."""
    worker.die_of_signals()
    config = load_settings(PrefillConfig, service="prefill", argv=sys.argv[1:])
    epoch = secrets.token_hex(8)
    worker_id = config.worker_id or f"prefill-{epoch}"
    logging.configure(
        level=config.log_level, fmt=config.log_format, service="prefill", worker_id=worker_id
    )
    with exit_when_refused("prefill"):
        asyncio.run(_serve(config, worker_id, epoch))


async def _serve(config: PrefillConfig, worker_id: str, epoch: str) -> None:
    clock = MonotonicClock()
    registry = CollectorRegistry()
    metrics = WorkerMetrics(Role.PREFILL, registry)
    model = worker.load_model(config, clock)
    bridge = worker.StepBridge(asyncio.get_running_loop(), on_failure=worker.crash)
    engine = worker.make_engine(
        worker.TimedRunner(model.runner, metrics, clock),
        model.cache,
        limits=worker.step_limits(config),
        sink=bridge,
        on_failure=worker.crash,
        clock=clock,
    )
    transports = build_transports(
        config.transport, worker_id=worker_id, epoch=epoch, tls=config.tls
    )
    for transport in transports:
        transport.register(model.cache)
    keeper = HoldKeeper(
        engine=engine,
        cache=model.cache,
        limits=HoldLimits(
            hold_s=config.hold_s,
            unclaimed_hold_s=config.unclaimed_hold_s,
            max_expected=config.max_expected_pulls,
        ),
        metrics=metrics,
        clock=clock,
    )
    service = PrefillService(
        engine=engine, keeper=keeper, bounds=model.bounds, worker_id=worker_id, epoch=epoch
    )
    bridge.connect(service.take_step)
    server = RpcServer(
        listen=config.listen,
        tls=config.tls,
        insecure=config.insecure,
        services=[
            Service(
                prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
                service,
                prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name,
            ),
            Service(
                handoff_pb2_grpc.add_HandoffServiceServicer_to_server,
                HandoffService(
                    keeper, worker_id=worker_id, epoch=epoch, fingerprint=model.fingerprint
                ),
                handoff_pb2.DESCRIPTOR.services_by_name["HandoffService"].full_name,
            ),
        ],
    )

    def identity_at(address: str) -> WorkerIdentity:
        return WorkerIdentity(
            worker_id=worker_id,
            epoch=epoch,
            role=Role.PREFILL,
            address=address,
            pid=os.getpid(),
            fingerprint=model.fingerprint,
            num_blocks=model.cache.num_blocks,
            max_sequences=config.max_sequences,
            offers=tuple(transport.describe() for transport in transports),
        )

    exporter = serve_metrics(config.metrics_listen, registry) if config.metrics_listen else None
    engine.start()
    try:
        await worker.serve(
            config, service=service, server=server, identity_at=identity_at, metrics=metrics
        )
    finally:
        keeper.close()
        await worker.close(engine, transports, model.cache)
        if exporter is not None:
            exporter.close()


if __name__ == "__main__":
    main()
