"""Starts a prefill worker: `python -m prefill_svc --model NAME --coordinator HOST:PORT`.

Its life is in `kvrelay.worker.life`. Exit 0 after a drain, 2 where settings or model cannot be,
70 when the engine failed.
"""

import sys

from kvrelay.rpc.server import RpcServer, Service
from kvrelay.types import Role
from kvrelay.v1 import prefill_pb2, prefill_pb2_grpc
from kvrelay.worker import life
from kvrelay.worker.handoffs import handoff_service, keeping
from kvrelay.worker.parts import Name, worker_parts
from prefill_svc.config import PrefillConfig
from prefill_svc.service import PrefillServicer


def main() -> None:
    """Run until told to stop."""
    life.run(Role.PREFILL, PrefillConfig, _serve, sys.argv[1:])


async def _serve(config: PrefillConfig, name: Name) -> None:
    async with worker_parts(config, name) as parts:
        with keeping(parts) as keeper:
            service = PrefillServicer(
                engine=parts.engine,
                keeper=keeper,
                bounds=parts.model.bounds,
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
                        prefill_pb2_grpc.add_PrefillServiceServicer_to_server,
                        service,
                        prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name,
                    ),
                    handoff_service(parts, keeper),
                ],
            )
            await life.serve(parts, service, server)


if __name__ == "__main__":
    main()
