"""Which of the ways two workers share KV is taken.

Pure, and free of every transport: the coordinator decides with it and loads no tensor library.
"""

from collections.abc import Sequence

from kvrelay.errors import Incompatible
from kvrelay.types import TransportOffer

PREFERENCE = ("shm", "stream")
"""Best first."""

SAME_HOST_ONLY = frozenset({"shm"})
"""These need both sides to name the same host."""


def choose_offer(
    holder_offers: Sequence[TransportOffer], puller_offers: Sequence[TransportOffer]
) -> TransportOffer:
    """The holder's offer that the puller shall pull by: the best that both can do.

    Raises:
        Incompatible: they have no transport in common; `details` says why for each known one.
    """
    problems = {}
    for name in PREFERENCE:
        holder, puller = _named(name, holder_offers), _named(name, puller_offers)
        problem = _problem(name, holder, puller)
        if holder is not None and problem is None:
            return holder
        problems[name] = problem
    listed = ", ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise Incompatible(f"no transport in common ({listed})", **problems)


def explain(
    holder_offers: Sequence[TransportOffer], puller_offers: Sequence[TransportOffer]
) -> str:
    """The choice and what was wrong with every better one, as one phrase."""
    reasons: list[str] = []
    for name in PREFERENCE:
        problem = _problem(name, _named(name, holder_offers), _named(name, puller_offers))
        if problem is None:
            return "; ".join([name, *reasons])
        reasons.append(f"not {name}: {problem}")
    return "; ".join(["none", *reasons])


def _problem(name: str, holder: TransportOffer | None, puller: TransportOffer | None) -> str | None:
    if holder is None:
        return "the holder does not offer it"
    if puller is None:
        return "the puller does not offer it"
    if name in SAME_HOST_ONLY and holder.host != puller.host:
        return "not on one host"
    return None


def _named(name: str, offers: Sequence[TransportOffer]) -> TransportOffer | None:
    return next((offer for offer in offers if offer.name == name), None)
