"""The life of a request, as a table. Nothing else changes a request's phase.

The one idea: KV is a cache of the prompt and of the tokens already sent, never the only
copy of anything. So a lost worker at any point means the same thing: place it again.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from enum import Enum, auto

from kvrelay.errors import KvCorrupt, NoWorker, Overloaded, ServingError


class Phase(Enum):
    """Where a request is. The last three are final."""

    QUEUED = auto()
    PREFILLING = auto()
    DECODING = auto()
    FINISHED = auto()
    CANCELLED = auto()
    FAILED = auto()


class Event(Enum):
    """What can happen to it."""

    PLACED = auto()
    """Its workers were chosen and told."""

    DECODE_STARTED = auto()
    """The decode worker has its KV and has sampled from it."""

    LAST_TOKEN = auto()
    ATTEMPT_LOST = auto()
    """A worker, a handoff or the bytes of one: the tokens sent so far stay sent."""

    CALLER_GONE = auto()
    """Cancelled, or past its deadline."""

    GIVEN_UP = auto()
    """Refused by a worker, tried too often, or waited too long for one."""


TRANSITIONS: Mapping[Phase, Mapping[Event, Phase]] = {
    Phase.QUEUED: {
        Event.PLACED: Phase.PREFILLING,
        Event.CALLER_GONE: Phase.CANCELLED,
        Event.GIVEN_UP: Phase.FAILED,
    },
    Phase.PREFILLING: {
        Event.DECODE_STARTED: Phase.DECODING,
        Event.LAST_TOKEN: Phase.FINISHED,
        Event.ATTEMPT_LOST: Phase.QUEUED,
        Event.CALLER_GONE: Phase.CANCELLED,
        Event.GIVEN_UP: Phase.FAILED,
    },
    Phase.DECODING: {
        Event.LAST_TOKEN: Phase.FINISHED,
        Event.ATTEMPT_LOST: Phase.QUEUED,
        Event.CALLER_GONE: Phase.CANCELLED,
        Event.GIVEN_UP: Phase.FAILED,
    },
    Phase.FINISHED: {},
    Phase.CANCELLED: {},
    Phase.FAILED: {},
}


def advance(phase: Phase, event: Event) -> Phase:
    """The phase after `event`. An event that a phase does not list is a bug here."""
    after = TRANSITIONS[phase].get(event)
    assert after is not None, f"{event.name} in {phase.name}"
    return after


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long and how often a request is tried."""

    max_attempts: int
    """Attempts that may be lost to workers, handoffs or bytes."""

    queue_limit_s: float
    """Longest wait for a worker that is there and has room."""


def verdict(
    losses: Sequence[ServingError], patience: Patience, *, refused_s: float
) -> ServingError | None:
    """What the latest of `losses`, oldest first, means for the request.

    None: place it again. Otherwise the error that ends it. Workers without room have lost
    nothing: they cost the request time, `refused_s` since the first refusal, and no attempt.
    """
    last = losses[-1]
    assert last.retryable, last
    if isinstance(last, Overloaded):
        return last if refused_s >= patience.queue_limit_s else None
    if sum(isinstance(loss, KvCorrupt) for loss in losses) > 1:
        return last
    num_lost = sum(not isinstance(loss, Overloaded) for loss in losses)
    if num_lost >= patience.max_attempts:
        return NoWorker(
            f"{num_lost} attempts lost, the last to {last.reason}: {last}",
            attempts=num_lost,
            last_reason=last.reason,
        )
    return None


@dataclass(slots=True)
class Losses:
    """What a request has lost so far, and what that means for where it goes next."""

    patience: Patience
    errors: list[ServingError] = field(default_factory=list)
    """Oldest first."""

    suspects: frozenset[str] = frozenset()
    """Workers that lost or refused it."""

    kv_dtype: str | None = None
    """Of the decode worker that had it last."""

    refused_at_s: float | None = None
    """When a worker first had no room."""

    def add(
        self, error: ServingError, suspects: Set[str], *, kv_dtype: str, now_s: float
    ) -> ServingError | None:
        """Note a loss. None: place it again. Otherwise the error that ends it."""
        self.errors.append(error)
        self.suspects |= suspects
        self.kv_dtype = kv_dtype
        if isinstance(error, Overloaded) and self.refused_at_s is None:
            self.refused_at_s = now_s
        refused_s = 0.0 if self.refused_at_s is None else now_s - self.refused_at_s
        return verdict(self.errors, self.patience, refused_s=refused_s)
