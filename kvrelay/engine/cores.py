"""How many threads a step computes with when several workers share a machine's cores.

Pure. A token's bits do not depend on the number of threads, so the number may change with
every step: who computes alone uses every core, whoever compute together share them out.
Cores that do not divide evenly go to the workers that stand first, which are those that
decode: a late token is felt, a late prompt less.
"""

import math
from collections.abc import Iterable
from typing import Protocol


class Presence(Protocol):
    """Lets other workers of this machine know whether an engine computes."""

    def busy(self, is_busy: bool, /) -> None:
        """Called by the engine's thread before a step and before it waits; costs nothing when
        the answer is the same as before.
        """
        ...


class Unseen:
    """A `Presence` of an engine that has no neighbours."""

    def busy(self, is_busy: bool, /) -> None: ...


def threads_for(*, num_cores: int, limit: int, busy_before: int, busy_after: int) -> int:
    """Threads of a worker, given how many busy ones stand before and after it.

    Busy workers that agree on the order use each core once; beyond one worker per core each
    uses one. `limit` is an upper bound, 0 for none.
    """
    share, rest = divmod(num_cores, busy_before + 1 + busy_after)
    mine = max(1, share + (busy_before < rest))
    return min(mine, limit) if limit else mine


def fixed_threads(*, num_cores: int, limit: int) -> int:
    """Threads of a worker that cannot change their number: room for one other like it."""
    return limit or max(1, num_cores // 2)


def usable_cores(num_allowed: int, quotas: Iterable[float]) -> int:
    """Whole cores that a process may keep busy: those it may run on, unless a quota is less.

    Rounded down: a thread beyond the quota is a thread that stands still in the middle of a
    step, and all others wait for it.
    """
    return max(1, min((num_allowed, *(math.floor(quota) for quota in quotas))))
