"""Starts a prefill worker: `python -m prefill_svc --model NAME --coordinator HOST:PORT`.

Its life is in `kvrelay.worker.life`. Exit 0 after a drain, 2 where settings or model cannot be,
70 when the engine failed.
"""

import sys

from kvrelay.rpc.server import RpcServer, Service
from kvrelay.types import Role
from kvrelay.v1 import handoff_pb2, handoff_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from kvrelay.worker import life
from kvrelay.worker.parts import Name, worker_parts
from prefill_svc.config import PrefillConfig
from prefill_svc.holds import HoldLimits
from prefill_svc.keeper import HoldKeeper
from prefill_svc.service import HandoffServicer, PrefillServicer

MAX_REMEMBERED_HOLDS = 4096


def main() -> None:
    """Run until told to stop."""
    life.run(Role.PREFILL, PrefillConfig, _serve, sys.argv[1:])


async def _serve(config: PrefillConfig, name: Name) -> None:
    names = {"worker_id": name.worker_id, "epoch": name.epoch}
    async with worker_parts(config, name) as parts:
        keeper = HoldKeeper(
            engine=parts.engine,
            cache=parts.model.cache,
            limits=HoldLimits(
                hold_s=config.hold_s,
                unclaimed_hold_s=config.unclaimed_hold_s,
                max_expected=config.max_expected_pulls,
                max_remembered=MAX_REMEMBERED_HOLDS,
            ),
            metrics=parts.metrics,
            clock=parts.clock,
        )
        service = PrefillServicer(
            engine=parts.engine, keeper=keeper, bounds=parts.model.bounds, **names
        )
        parts.bridge.connect(service.take_step)
        handoffs = HandoffServicer(keeper, fingerprint=parts.model.fingerprint, **names)
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
                    handoffs,
                    handoff_pb2.DESCRIPTOR.services_by_name["HandoffService"].full_name,
                ),
            ],
        )
        try:
            await life.serve(parts, service, server)
        finally:
            keeper.close()


if __name__ == "__main__":
    main()
