"""Starts a decode worker: `python -m decode_svc --model NAME --coordinator HOST:PORT`.

Its life is in `kvrelay.worker.life`. Exit 0 after a drain, 2 where settings or model cannot be,
70 when the engine failed.
"""

import sys
from collections.abc import Sequence

from decode_svc.area import LandingArea
from decode_svc.config import DecodeConfig
from decode_svc.fetcher import Fetcher
from decode_svc.holder import HolderClient
from decode_svc.landing import Lander, LandingLimits
from decode_svc.service import DecodeServicer
from kvrelay import process
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.transfer.base import KvTransport
from kvrelay.transfer.faulty import with_chaos
from kvrelay.transfer.speeds import LinkSpeeds
from kvrelay.types import Role
from kvrelay.v1 import decode_pb2, decode_pb2_grpc
from kvrelay.worker import life
from kvrelay.worker.handoffs import handoff_service, keeping
from kvrelay.worker.parts import Name, WorkerParts, worker_parts

FORGET_SPEEDS_AFTER_S = 60.0
"""A transport that was slow once gets another chance then."""


def main() -> None:
    """Run until told to stop."""
    life.run(Role.DECODE, DecodeConfig, _serve, sys.argv[1:])


async def _serve(config: DecodeConfig, name: Name) -> None:
    async with worker_parts(
        config,
        name,
        landing_num_bytes=config.landing_mib << 20,
        wire_dtype=config.wire_dtype,
    ) as parts:
        channels = Channels(tls=config.tls)
        speeds = LinkSpeeds(forget_after_s=FORGET_SPEEDS_AFTER_S)
        with keeping(parts) as keeper:
            service = DecodeServicer(
                engine=parts.engine,
                lander=_lander(config, name, parts, channels, speeds),
                keeper=keeper,
                bounds=parts.model.bounds,
                max_landings=config.max_landings,
                speeds=speeds,
                clock=parts.clock,
                on_failure=process.crash,
                worker_id=name.worker_id,
                epoch=name.epoch,
            )
            parts.bridge.connect(service.take_step)
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
                    handoff_service(parts, keeper),
                ],
            )
            try:
                await life.serve(parts, service, server)
            finally:
                await channels.close()


def _lander(
    config: DecodeConfig, name: Name, parts: WorkerParts, channels: Channels, speeds: LinkSpeeds
) -> Lander:
    staging = parts.model.staging
    return Lander(
        engine=parts.engine,
        cache=parts.model.cache,
        fetcher=Fetcher(
            cache=parts.model.cache,
            area=LandingArea(offset=staging.landing_offset, num_bytes=staging.landing_num_bytes),
            speeds=speeds,
            metrics=parts.metrics,
            clock=parts.clock,
            on_lost=process.crash,
        ),
        transports=_transports(config, name, parts),
        holders=HolderClient(
            channels,
            puller_id=name.worker_id,
            epoch=name.epoch,
            fingerprint=parts.model.fingerprint,
            bounds=parts.model.bounds,
            wire_dtype=config.wire_dtype,
            release_timeout_s=config.release_timeout_s,
        ),
        limits=LandingLimits(batch_num_bytes=config.batch_mib << 20),
        metrics=parts.metrics,
        clock=parts.clock,
    )


def _transports(config: DecodeConfig, name: Name, parts: WorkerParts) -> Sequence[KvTransport]:
    """What we pull by; a developer may have it fail now and then."""
    spec = config.chaos_spec
    if spec is None:
        return parts.transports.all
    return with_chaos(
        parts.transports.all,
        spec,
        cache=parts.model.cache,
        worker_id=name.worker_id,
        on_injected=lambda fault: parts.metrics.observe_fault(fault.value),
    )


if __name__ == "__main__":
    main()
