"""How long to wait before a process that died is started again.

Pure. Deaths add up and uptime forgives them, so one crash costs a blink and a crash loop
costs little.
"""

from collections.abc import Callable


class Backoff:
    """Doubles from `first_s` to `most_s`, spread by jitter over its upper half."""

    def __init__(
        self,
        *,
        jitter: Callable[[], float],
        first_s: float = 0.2,
        most_s: float = 5.0,
        forgive_s: float = 10.0,
    ) -> None:
        """`jitter` gives numbers in [0, 1); each `forgive_s` of uptime forgives one death."""
        self._jitter = jitter
        self._first_s = first_s
        self._most_s = most_s
        self._forgive_s = forgive_s
        self._deaths = 0

    def died(self, *, uptime_s: float) -> float:
        """Seconds to wait after a death that followed `uptime_s` of life."""
        self._deaths = max(0, self._deaths - int(uptime_s / self._forgive_s))
        ceiling_s = min(self._most_s, self._first_s * 2.0 ** min(self._deaths, 32))
        self._deaths += 1
        return ceiling_s * (0.5 + 0.5 * self._jitter())
