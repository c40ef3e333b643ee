"""How fast KV came lately, per holder and transport, from what each pull cost.

Pure: instants are passed in, by one monotonic clock. A figure is bytes over seconds of all pulls,
older ones weighing less the more bytes came since. One that nobody renews is forgotten: a transport
that was slow once, and so is not chosen, gets another chance.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

from kvrelay.types import LinkSpeed

MIN_NUM_BYTES: Final = 256 << 10
"""Of a pull that says something about bandwidth; smaller ones are round trips."""

MIN_PULLS: Final = 4
"""Of a holder by a transport before anything is said of it: the first ones open things."""

FAILED_NUM_BYTES: Final = 1.0
"""Per second, of a way that does not work."""

MEMORY_NUM_BYTES: Final = 64 << 20
"""After so many bytes, what was seen before weighs half."""

MAX_LINKS: Final = 256


@dataclass(slots=True)
class _Seen:
    """Both sums fade alike."""

    num_bytes: float
    elapsed_s: float
    at_s: float
    num_pulls: int = 1


class LinkSpeeds:
    """What one worker measured of its own pulls. The least recently used are forgotten first."""

    def __init__(self, *, forget_after_s: float) -> None:
        self._forget_after_s = forget_after_s
        self._seen: OrderedDict[tuple[str, str], _Seen] = OrderedDict()

    def observe(
        self, holder_id: str, transport: str, *, num_bytes: int, elapsed_s: float, now_s: float
    ) -> None:
        """Note what one pull cost."""
        if num_bytes < MIN_NUM_BYTES or elapsed_s <= 0:
            return
        key = (holder_id, transport)
        before = self._seen.pop(key, None)
        seen = _Seen(num_bytes, elapsed_s, now_s)
        if before is not None and not self._is_stale(before, now_s):
            kept = 0.5 ** (num_bytes / MEMORY_NUM_BYTES)
            seen.num_bytes += kept * before.num_bytes
            seen.elapsed_s += kept * before.elapsed_s
            seen.num_pulls += before.num_pulls
        self._seen[key] = seen
        if len(self._seen) > MAX_LINKS:
            self._seen.popitem(last=False)

    def failed(self, holder_id: str, transport: str, now_s: float) -> None:
        """A pull did not work: nothing came in no time, so whatever else there is comes first until
        this is forgotten.
        """
        key = (holder_id, transport)
        self._seen.pop(key, None)
        self._seen[key] = _Seen(FAILED_NUM_BYTES, 1.0, now_s, num_pulls=MIN_PULLS)
        if len(self._seen) > MAX_LINKS:
            self._seen.popitem(last=False)

    def speeds(self, now_s: float) -> tuple[LinkSpeed, ...]:
        """Every figure that counts, by now and still."""
        for key in [key for key, seen in self._seen.items() if self._is_stale(seen, now_s)]:
            del self._seen[key]
        return tuple(
            LinkSpeed(
                holder_id=holder_id,
                transport=transport,
                bytes_per_s=seen.num_bytes / seen.elapsed_s,
            )
            for (holder_id, transport), seen in self._seen.items()
            if seen.num_pulls >= MIN_PULLS
        )

    def _is_stale(self, seen: _Seen, now_s: float) -> bool:
        return now_s - seen.at_s >= self._forget_after_s
