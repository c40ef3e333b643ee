"""Which links between two workers there are, and which gives way to a new one.

Pure. A link is one communicator of two ranks; it costs memory on both devices and most of a
second to make, so there are few, they are made before anybody waits for them, and the one that
was not used for longest makes room. One that is in use never does.
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Generic, TypeVar


class LinkState(Enum):
    """Where a link is. The last is final."""

    ABSENT = auto()
    OPENING = auto()
    READY = auto()
    BROKEN = auto()
    CLOSED = auto()


class LinkEvent(Enum):
    """What can happen to it."""

    ASKED = auto()
    JOINED = auto()
    FAILED = auto()
    DROPPED = auto()


# Nothing leads from BROKEN to READY: after an error nothing can be known of a communicator, so
# the only way on is a new one.
TRANSITIONS: Mapping[LinkState, Mapping[LinkEvent, LinkState]] = {
    LinkState.ABSENT: {LinkEvent.ASKED: LinkState.OPENING},
    LinkState.OPENING: {
        LinkEvent.JOINED: LinkState.READY,
        LinkEvent.FAILED: LinkState.BROKEN,
        LinkEvent.DROPPED: LinkState.CLOSED,
    },
    LinkState.READY: {
        LinkEvent.FAILED: LinkState.BROKEN,
        LinkEvent.DROPPED: LinkState.CLOSED,
    },
    LinkState.BROKEN: {
        LinkEvent.ASKED: LinkState.OPENING,
        LinkEvent.DROPPED: LinkState.CLOSED,
    },
    LinkState.CLOSED: {},
}


def advance(state: LinkState, event: LinkEvent) -> LinkState:
    """The state after `event`. An event a state does not list is a bug here."""
    after = TRANSITIONS[state].get(event)
    assert after is not None, f"{event.name} in {state.name}"
    return after


K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Generic[K]):
    """What whoever wants a link is told."""

    is_ready: bool = False
    shall_open: bool = False
    """The caller makes one now, and says what became of it."""

    give_way: K | None = None
    """With `shall_open`: the caller closes this one first. It is forgotten already."""

    why_not: str = ""
    """Where there is no link to use: for how long, or because of what."""


@dataclass(slots=True)
class _Link:
    state: LinkState = LinkState.ABSENT
    num_users: int = 0
    num_failures: int = 0
    retry_at_s: float = 0.0


class LinkTable(Generic[K]):
    """At most `max_links` that are opening or ready; the least recently used first.

    A link that broke may be made again after `retry_s`, then twice that, up to `max_retry_s`.
    """

    def __init__(self, *, max_links: int, retry_s: float = 1.0, max_retry_s: float = 60.0) -> None:
        assert max_links > 0
        self._max_links = max_links
        self._max_broken = 8 * max_links
        self._retry_s = retry_s
        self._max_retry_s = max_retry_s
        self._links: OrderedDict[K, _Link] = OrderedDict()

    def ask(self, key: K, now_s: float) -> Answer[K]:
        """Somebody wants to use the link `key`."""
        link = self._links.get(key, _Link())
        if link.state is LinkState.READY:
            self._links.move_to_end(key)
            return Answer(is_ready=True)
        if link.state is LinkState.OPENING:
            return Answer(why_not="its link is being opened")
        if link.num_users > 0:
            return Answer(why_not="its link broke just now")
        if now_s < link.retry_at_s:
            return Answer(
                why_not=f"its link broke {link.num_failures} times, "
                f"next try in {link.retry_at_s - now_s:.1f} s"
            )
        give_way = None
        if self.num_links >= self._max_links:
            give_way = self._least_recent_idle()
            if give_way is None:
                return Answer(why_not=f"all {self._max_links} links are in use")
            self.drop(give_way)
        link.state = advance(link.state, LinkEvent.ASKED)
        self._links[key] = link
        self._links.move_to_end(key)
        return Answer(shall_open=True, give_way=give_way, why_not="its link is being opened")

    def joined(self, key: K) -> None:
        """It was opened."""
        self._to(key, LinkEvent.JOINED)

    def failed(self, key: K, now_s: float) -> None:
        """It could not be opened, or broke. Its users still have to give it back."""
        link = self._to(key, LinkEvent.FAILED)
        wait_s = min(self._retry_s * 2.0**link.num_failures, self._max_retry_s)
        link.num_failures += 1
        link.retry_at_s = now_s + wait_s
        self._forget_broken()

    def drop(self, key: K) -> None:
        """Forget a link that nobody uses. One that is unknown is forgotten already."""
        link = self._links.get(key)
        if link is None:
            return
        assert link.num_users == 0, link.num_users
        self._to(key, LinkEvent.DROPPED)
        del self._links[key]

    def take(self, key: K) -> None:
        """Use a link that is ready: it does not give way until it is given back."""
        link = self._links[key]
        assert link.state is LinkState.READY, link.state.name
        link.num_users += 1
        self._links.move_to_end(key)

    def give_back(self, key: K, *, worked: bool) -> None:
        """One use is over. One that worked clears the link's record of failures."""
        link = self._links[key]
        assert link.num_users > 0
        link.num_users -= 1
        if worked:
            link.num_failures = 0

    def state(self, key: K) -> LinkState:
        link = self._links.get(key)
        return LinkState.ABSENT if link is None else link.state

    @property
    def num_links(self) -> int:
        """Opening or ready. O(links known)."""
        return sum(link.state is not LinkState.BROKEN for link in self._links.values())

    def check(self) -> None:
        """Assert what must hold. O(links known)."""
        assert self.num_links <= self._max_links
        states = [link.state for link in self._links.values()]
        assert LinkState.ABSENT not in states
        assert LinkState.CLOSED not in states
        assert all(
            link.num_users == 0 or link.state is not LinkState.OPENING
            for link in self._links.values()
        )

    def _to(self, key: K, event: LinkEvent) -> _Link:
        link = self._links[key]
        link.state = advance(link.state, event)
        return link

    def _least_recent_idle(self) -> K | None:
        for key, link in self._links.items():
            if link.state is LinkState.READY and link.num_users == 0:
                return key
        return None

    def _forget_broken(self) -> None:
        broken = [
            key
            for key, link in self._links.items()
            if link.state is LinkState.BROKEN and link.num_users == 0
        ]
        for key in broken[: max(0, len(broken) - self._max_broken)]:
            self.drop(key)
