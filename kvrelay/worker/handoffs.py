"""What makes a worker a holder, wired alike in both roles."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvrelay.handoff.holds import HoldLimits
from kvrelay.handoff.keeper import HoldKeeper
from kvrelay.handoff.service import SERVICE_NAME, HandoffServicer
from kvrelay.rpc.server import Service
from kvrelay.transfer import stream
from kvrelay.worker.parts import WorkerParts

MAX_REMEMBERED_HOLDS = 4096


@contextmanager
def keeping(parts: WorkerParts) -> Iterator[HoldKeeper]:
    """The holds of a worker; they are lapsed by their sessions, before the end."""
    settings = parts.settings
    keeper = HoldKeeper(
        engine=parts.engine,
        cache=parts.model.cache,
        staging=parts.model.staging,
        limits=HoldLimits(
            hold_s=settings.hold_s,
            unclaimed_hold_s=settings.unclaimed_hold_s,
            max_expected=settings.max_expected_pulls,
            max_remembered=MAX_REMEMBERED_HOLDS,
        ),
        metrics=parts.metrics,
        clock=parts.clock,
    )
    try:
        yield keeper
    finally:
        keeper.close()


def handoff_service(parts: WorkerParts, keeper: HoldKeeper) -> Service:
    """To be served beside the worker's own service."""
    servicer = HandoffServicer(
        keeper,
        desk=parts.desk,
        worker_id=parts.name.worker_id,
        epoch=parts.name.epoch,
        fingerprint=parts.model.fingerprint,
        sender=parts.transports.sender,
    )
    return Service(
        stream.add_to_server,
        servicer,
        SERVICE_NAME,
    )
