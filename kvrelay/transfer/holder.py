"""What a holder's refusal means to whoever pulls from it, the same for every call of its service.

Whatever the holder does not know, or knew before it was restarted, is a lost handoff; a
holder that does not answer is no use.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from kvrelay.errors import (
    Cancelled,
    DeadlinePassed,
    HandoffLost,
    Incompatible,
    NotFound,
    PeerUnavailable,
    ServingError,
)
from kvrelay.rpc.status import from_grpc
from kvrelay.transfer.base import RemoteHold


@contextmanager
def told_by(holder: RemoteHold) -> Iterator[None]:
    """Raise what ends a call of `holder`'s service as what it means here."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise _meaning(from_grpc(error), holder) from error
    except asyncio.CancelledError:
        # gRPC says the same when a call is cancelled under us because its channel was closed.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise PeerUnavailable(f"the channel to {holder.worker_id} was closed") from None


def _meaning(error: ServingError, holder: RemoteHold) -> ServingError:
    names = {"handoff_id": holder.handoff_id, "worker_id": holder.worker_id}
    is_other_epoch = isinstance(error, Incompatible) and "epoch" in error.details
    if is_other_epoch or isinstance(error, NotFound):
        return HandoffLost(f"{holder.worker_id} does not hold it: {error}", **names)
    if isinstance(error, Cancelled | DeadlinePassed):  # not ours, so the holder's silence
        return PeerUnavailable(f"{holder.worker_id}: {error}", **names)
    return error
