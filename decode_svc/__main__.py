"""Starts a decode worker: `python -m decode_svc --model NAME --coordinator HOST:PORT`.

Its life is in `kvrelay.worker.life`. Exit 0 after a drain, 2 where settings or model cannot be,
70 when the engine failed.
"""

import sys

from decode_svc.config import DecodeConfig
from decode_svc.holder import HolderClient
from decode_svc.landing import Lander, LandingLimits
from decode_svc.service import DecodeServicer
from kvrelay import process
from kvrelay.rpc.channels import Channels
from kvrelay.rpc.server import RpcServer, Service
from kvrelay.types import Role
from kvrelay.v1 import decode_pb2, decode_pb2_grpc
from kvrelay.worker import life
from kvrelay.worker.parts import Name, worker_parts


def main() -> None:
    """Run until told to stop."""
    life.run(Role.DECODE, DecodeConfig, _serve, sys.argv[1:])


async def _serve(config: DecodeConfig, name: Name) -> None:
    async with worker_parts(config, name) as parts:
        channels = Channels(tls=config.tls)
        lander = Lander(
            engine=parts.engine,
            cache=parts.model.cache,
            transports=parts.transports,
            holders=HolderClient(
                channels,
                puller_id=name.worker_id,
                fingerprint=parts.model.fingerprint,
                bounds=parts.model.bounds,
                release_timeout_s=config.release_timeout_s,
            ),
            limits=LandingLimits(batch_num_bytes=config.batch_mib << 20),
            metrics=parts.metrics,
            clock=parts.clock,
        )
        service = DecodeServicer(
            engine=parts.engine,
            lander=lander,
            bounds=parts.model.bounds,
            max_landings=config.max_landings,
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
            ],
        )
        try:
            await life.serve(parts, service, server)
        finally:
            await channels.close()


if __name__ == "__main__":
    main()
