"""Starts a decode worker: `python -m decode_svc --model NAME --coordinator HOST:PORT`.

Its life is in `kvrelay.worker`. Exit 0 after a drain, 2 where settings or model cannot be,
70 when the engine failed.
"""

import asyncio
import os
import secrets
import sys

from prometheus_client import CollectorRegistry

from decode_svc.config import DecodeConfig
from decode_svc.holder import HolderClient
from decode_svc.landing import Lander, LandingLimits
from decode_svc.service import DecodeService
from kvrelay import worker
from kvrelay.clock import MonotonicClock
from kvrelay.config import exit_when_refused, load_settings
from kvrelay.obs import logging
from kvrelay.obs.metrics import WorkerMetrics, serve_metrics
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.transfer.build import build_transports
from kvrelay.types import Role, WorkerIdentity
from kvrelay.v1 import decode_pb2, decode_pb2_grpc


def main() -> None:
    """Run until told to stop."""
    worker.die_of_signals()
    config = load_settings(DecodeConfig, service="decode", argv=sys.argv[1:])
    epoch = secrets.token_hex(8)
    worker_id = config.worker_id or f"decode-{epoch}"
    logging.configure(
        level=config.log_level, fmt=config.log_format, service="decode", worker_id=worker_id
    )
    with exit_when_refused("decode"):
        asyncio.run(_serve(config, worker_id, epoch))


async def _serve(config: DecodeConfig, worker_id: str, epoch: str) -> None:
    clock = MonotonicClock()
    registry = CollectorRegistry()
    metrics = WorkerMetrics(Role.DECODE, registry)
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
    channels = Channels(tls=config.tls)
    lander = Lander(
        engine=engine,
        cache=model.cache,
        transports=transports,
        holders=HolderClient(
            channels,
            puller_id=worker_id,
            fingerprint=model.fingerprint,
            bounds=model.bounds,
            release_timeout_s=config.release_timeout_s,
        ),
        limits=LandingLimits(batch_num_bytes=config.batch_mib << 20),
        metrics=metrics,
        clock=clock,
    )
    service = DecodeService(
        engine=engine,
        lander=lander,
        bounds=model.bounds,
        max_landings=config.max_landings,
        on_failure=worker.crash,
        worker_id=worker_id,
        epoch=epoch,
    )
    bridge.connect(service.take_step)
    server = RpcServer(
        listen=config.listen,
        tls=config.tls,
        insecure=config.insecure,
        services=[
            Service(
                decode_pb2_grpc.add_DecodeServiceServicer_to_server,
                service,
                decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name,
            ),
        ],
    )

    def identity_at(address: str) -> WorkerIdentity:
        return WorkerIdentity(
            worker_id=worker_id,
            epoch=epoch,
            role=Role.DECODE,
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
        await channels.close()
        await worker.close(engine, transports, model.cache)
        if exporter is not None:
            exporter.close()


if __name__ == "__main__":
    main()
