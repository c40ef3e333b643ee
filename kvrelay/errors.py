"""Everything that can go wrong while serving, as one tree.

* ServingError
  x InvalidRequest      the caller must change the request
  x Overloaded          no room now; later or elsewhere may work
    + QueueFull
    + KvPoolExhausted
  x NoWorker            nothing healthy to place the request on, or the last try was lost
  x PeerUnavailable     a peer did not answer; try another
  x Draining            this process takes no new work
  x HandoffLost         the prefilled KV is gone; prefill again
  x KvCorrupt           bytes arrived wrong; never decode from them, prefill again
  x QuiescenceLost      nobody knows whether a copy is over; the process ends
  x Incompatible        the two sides do not serve the same thing; never pair them
  x DeadlinePassed      the caller's own limit; no work follows
  x Cancelled           the caller's own choice
  x NotFound            nothing by that name is remembered
  x ModelInvalid        a model directory that cannot be served
  x Unauthenticated     the caller did not say who it is
  x PermissionDenied    the caller may not do this

A broken invariant is not here: that is a bug. An `assert` finds it, and the worker
whose engine fails one stops rather than serve from a state nobody understands.
"""

from typing import ClassVar


class ServingError(Exception):
    """Base of the failures a peer or a caller can act on.

    The message carries the values that explain it, with units, and `details`
    carries the same values for machines. Neither ever holds prompt or output.
    """

    reason: ClassVar[str]
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.details = {name: str(value) for name, value in details.items()}


class InvalidRequest(ServingError):
    """A field is outside its bounds; the same request can never succeed."""

    reason = "INVALID_REQUEST"

    def __init__(self, field: str, problem: str, **details: object) -> None:
        super().__init__(f"{field}: {problem}", field=field, **details)
        self.field = field
        self.problem = problem


class Overloaded(ServingError):
    """No room now. `retry_after_s` is when it may be worth another try."""

    retryable = True
    retry_after_s: float = 1.0


class QueueFull(Overloaded):
    """Admission refused before any work was done."""

    reason = "QUEUE_FULL"

    def __init__(self, *, what: str, queued: int, limit: int) -> None:
        super().__init__(
            f"{queued} {what} queued, limit {limit}", what=what, queued=queued, limit=limit
        )


class KvPoolExhausted(Overloaded):
    """Too few free KV blocks."""

    reason = "KV_POOL_EXHAUSTED"

    def __init__(self, *, wanted_blocks: int, free_blocks: int) -> None:
        super().__init__(
            f"{wanted_blocks} KV blocks wanted, {free_blocks} free",
            wanted_blocks=wanted_blocks,
            free_blocks=free_blocks,
        )


class NoWorker(ServingError):
    """No healthy worker could take the request in time, or every attempt lost its worker."""

    reason = "NO_WORKER"
    retryable = True
    retry_after_s: float = 1.0


class PeerUnavailable(ServingError):
    """A peer did not answer, or went away."""

    reason = "PEER_UNAVAILABLE"
    retryable = True


class Draining(ServingError):
    """The process finishes what it has and takes nothing new."""

    reason = "DRAINING"
    retryable = True


class HandoffLost(ServingError):
    """The holder no longer has the KV, or its hold lapsed while it was read."""

    reason = "HANDOFF_LOST"
    retryable = True


class KvCorrupt(ServingError):
    """What landed is not what the holder announced."""

    reason = "KV_CORRUPT"
    retryable = True


class QuiescenceLost(ServingError):
    """A copy may still be writing, and nobody can tell; the process must end."""

    reason = "QUIESCENCE_LOST"
    retryable = True


class Incompatible(ServingError):
    """Fingerprints differ; `details` names each difference with both values."""

    reason = "INCOMPATIBLE"


class DeadlinePassed(ServingError):
    """The caller's deadline passed; `phase` says where the request was."""

    reason = "DEADLINE_PASSED"

    def __init__(self, phase: str) -> None:
        super().__init__(f"deadline passed while {phase}", phase=phase)


class Cancelled(ServingError):
    """The caller left."""

    reason = "CANCELLED"


class NotFound(ServingError):
    """No such thing is remembered here (any more)."""

    reason = "NOT_FOUND"


class ModelInvalid(ServingError):
    """A model directory is unusable; `file` and `problem` say where and why."""

    reason = "MODEL_INVALID"

    def __init__(self, file: object, problem: str) -> None:
        super().__init__(f"{file}: {problem}", file=file, problem=problem)
        self.file = str(file)
        self.problem = problem


class Unauthenticated(ServingError):
    """No credential, or one that is not known."""

    reason = "UNAUTHENTICATED"


class PermissionDenied(ServingError):
    """A known caller asked for what its role does not allow."""

    reason = "PERMISSION_DENIED"
