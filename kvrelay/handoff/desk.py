"""Where a holder looks at tickets: who it is, and the keys that it was given.

A key comes with each membership. The one before is kept as well: when a worker joins again, calls
of handoffs from before may still be on their way, and their answer is that the hold has lapsed, not
that somebody forged a ticket. That opens nothing, since the coordinator ends all it had on a worker
before it welcomes it again, and no new hold goes by an old name.
"""

from kvrelay.errors import PeerUnavailable, PermissionDenied
from kvrelay.handoff.ticket import KEY_NUM_BYTES, Ticket, is_genuine


class TicketDesk:
    """One worker's, for as long as its process lives. Used from one thread."""

    def __init__(self, *, worker_id: str, epoch: str) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._keys: tuple[bytes, ...] = ()

    def take_key(self, key: bytes) -> None:
        """Start with a new membership's key; the one before the last is forgotten."""
        assert len(key) == KEY_NUM_BYTES
        self._keys = (key, *self._keys[:1])

    def check(self, handoff_id: str, puller_id: str, puller_epoch: str, ticket: bytes) -> None:
        """Return if the coordinator wants this worker to hand that handoff to that puller.

        Raises:
            PeerUnavailable: we are in no pool yet, and cannot tell.
            PermissionDenied: it is not genuine.
        """
        if not self._keys:
            raise PeerUnavailable(
                f"{self._worker_id} is not in a pool yet, so it has no ticket key"
            )
        expected = Ticket(
            handoff_id=handoff_id,
            holder_id=self._worker_id,
            holder_epoch=self._epoch,
            puller_id=puller_id,
            puller_epoch=puller_epoch,
        )
        if not any(is_genuine(expected, ticket, key) for key in self._keys):
            raise PermissionDenied("the ticket is not for this handoff, holder and puller")
