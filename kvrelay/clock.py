"""Time is passed in: whoever measures a duration is given a clock, so tests can move it."""

import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time in seconds. Only differences mean anything."""

    def now(self) -> float: ...


class MonotonicClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()
