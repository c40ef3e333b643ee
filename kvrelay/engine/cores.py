"""How many threads a step computes with when several workers share a machine's cores.

Pure. A token's bits do not depend on the number of threads, so the number may change with
every step: who computes alone may use every core, whoever compute together share them out.
Cores that do not divide evenly go to the workers that stand first, which are those that
decode: a late token is felt, a late prompt less.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
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


_TRY_EVERY = 64
"""Steps of one size between two trials of a number of threads that seemed slower before."""

_WEIGHT = 0.125
"""Of the newest step in what is remembered; more, the longer ago the one before it was."""

_LATE = 2.0
"""A step that takes so many times what is remembered was held up, and says no more than that."""


@dataclass(slots=True)
class _Seen:
    """How long steps of about one size took, by number of threads."""

    mean_s: dict[int, float] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    """By number of threads: what `num_chosen` was when it was timed last."""

    num_chosen: int = 0


class ThreadChoice:
    """How many threads pay off for steps of few rows, learned from the steps themselves.

    Threads meet hundreds of times in a step, and where they lose more by that than they gain
    depends on the model, on the machine, and on who else uses it now. Numbers are 1, doubled up
    to the most there may be; now and then one is tried that was slower.
    """

    def __init__(self) -> None:
        self._seen: dict[int, _Seen] = {}

    def choose(self, num_rows: int, *, most: int) -> int:
        """Threads for a step of `num_rows` generated rows, at most `most`."""
        if most == 1:
            return 1
        seen = self._seen.setdefault(num_rows.bit_length(), _Seen())
        seen.num_chosen += 1
        candidates = [n for n in (1 << i for i in range(most.bit_length())) if n < most] + [most]
        for num_threads in reversed(candidates):
            if num_threads not in seen.mean_s:
                return num_threads
        if seen.num_chosen % _TRY_EVERY == 0:
            return candidates[seen.num_chosen // _TRY_EVERY % len(candidates)]
        return min(candidates, key=seen.mean_s.__getitem__)

    def learn(self, num_rows: int, *, num_threads: int, elapsed_s: float) -> None:
        """A step of `num_rows` generated rows took so long."""
        seen = self._seen.setdefault(num_rows.bit_length(), _Seen())
        before_s = seen.mean_s.get(num_threads, elapsed_s)
        num_since = seen.num_chosen - seen.last.get(num_threads, seen.num_chosen)
        # One late trial must not be believed until dozens of others have outweighed it.
        weight = 1.0 - (1.0 - _WEIGHT) ** num_since
        news_s = min(elapsed_s, _LATE * before_s)
        seen.mean_s[num_threads] = before_s + weight * (news_s - before_s)
        seen.last[num_threads] = seen.num_chosen
