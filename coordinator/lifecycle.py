"""The life of a request, as a table. Nothing else changes a request's phase.

The one idea: KV is a cache of the prompt and of the tokens already sent, never the only
copy of anything. So a lost worker at any point means the same thing: place it again.
"""

from collections.abc import Mapping, Sequence
from enum import Enum, auto

from kvrelay.errors import KvCorrupt, NoWorker, ServingError


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

FINAL = frozenset(phase for phase, after in TRANSITIONS.items() if not after)


def advance(phase: Phase, event: Event) -> Phase:
    """The phase after `event`. An event that a phase does not list is a bug here."""
    after = TRANSITIONS[phase].get(event)
    assert after is not None, f"{event.name} in {phase.name}"
    return after


def verdict(losses: Sequence[ServingError], *, max_attempts: int) -> ServingError | None:
    """What the latest of `losses`, oldest first, means for the request.

    None: place it again. Otherwise the error that ends it.
    """
    last = losses[-1]
    if not last.retryable:
        return last
    if sum(isinstance(loss, KvCorrupt) for loss in losses) > 1:
        return last
    if len(losses) >= max_attempts:
        return NoWorker(
            f"{len(losses)} attempts lost, the last to {last.reason}: {last}",
            attempts=len(losses),
            last_reason=last.reason,
        )
    return None
