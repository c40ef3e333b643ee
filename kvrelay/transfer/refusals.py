"""Which peers could not be reached by a transport lately, so that another is taken meanwhile. Pure.

The first pull that fails is the only one: afterwards it is tried now and then without anybody
waiting for it, until it works again.
"""

from collections import OrderedDict

from kvrelay.transfer.base import RemoteHold

RETRY_S = 5.0

Peer = tuple[str, str]
"""worker_id and epoch: a worker that restarted is another peer."""


class Refusals:
    """At most `max_peers`; the one that failed last is remembered for longest."""

    def __init__(self, *, retry_s: float = RETRY_S, max_peers: int = 256) -> None:
        assert max_peers > 0
        self._retry_s = retry_s
        self._max_peers = max_peers
        self._retry_at_s: OrderedDict[Peer, float] = OrderedDict()

    def refused(self, remote: RemoteHold, now_s: float) -> None:
        """It could not be reached."""
        peer = _peer(remote)
        self._retry_at_s[peer] = now_s + self._retry_s
        self._retry_at_s.move_to_end(peer)
        while len(self._retry_at_s) > self._max_peers:
            self._retry_at_s.popitem(last=False)

    def reached(self, remote: RemoteHold) -> None:
        """It could."""
        self._retry_at_s.pop(_peer(remote), None)

    def has(self, remote: RemoteHold) -> bool:
        """Whether it was refused, and not reached since."""
        return _peer(remote) in self._retry_at_s

    def shall_try(self, remote: RemoteHold, now_s: float) -> bool:
        """Whether there is reason to think that it can be reached now."""
        return now_s >= self._retry_at_s.get(_peer(remote), now_s)


def _peer(remote: RemoteHold) -> Peer:
    return remote.worker_id, remote.epoch
