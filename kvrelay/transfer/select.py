"""Which of the ways two workers share KV is taken: the fastest that both can do.

Pure, and free of every transport: the coordinator decides with it and loads no tensor library.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from kvrelay.errors import Incompatible
from kvrelay.types import TransportOffer

NOMINAL_BYTES_PER_S: Mapping[str, float] = MappingProxyType(
    {"cuda_ipc": 100e9, "nccl": 20e9, "shm": 6e9, "nixl": 3e9, "stream": 1e9}
)
"""What each known transport is believed to bring before it was measured between two workers.
Rough and on purpose hopeful: one that is tried and disappoints is measured, one that is never
tried is not."""

Measured = Mapping[str, float]
"""Bytes per second by transport, between two workers, in the direction of the pull."""

NOTHING_MEASURED: Measured = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One transport that both sides can do."""

    offer: TransportOffer
    """The holder's: its address is where the puller goes."""

    bytes_per_s: float
    is_measured: bool

    def __str__(self) -> str:
        figure = f"{self.offer.name} at {_speed(self.bytes_per_s)}"
        return figure if self.is_measured else f"{figure} nominal"


def choose(
    holder_offers: Sequence[TransportOffer],
    puller_offers: Sequence[TransportOffer],
    measured: Measured = NOTHING_MEASURED,
) -> Way:
    """The fastest way for the puller to pull from the holder.

    Raises:
        Incompatible: they have none in common; `details` says why for each known one.
    """
    ways, problems = _compare(holder_offers, puller_offers, measured)
    if ways:
        return ways[0]
    listed = ", ".join(f"{name}: {problem}" for name, problem in problems.items())
    raise Incompatible(f"no transport in common ({listed})", **problems)


def choose_offer(
    holder_offers: Sequence[TransportOffer],
    puller_offers: Sequence[TransportOffer],
    measured: Measured = NOTHING_MEASURED,
) -> TransportOffer:
    """The offer of `choose`.

    Raises:
        Incompatible: see `choose`.
    """
    return choose(holder_offers, puller_offers, measured).offer


def alternatives(
    holder_offers: Sequence[TransportOffer],
    puller_offers: Sequence[TransportOffer],
    measured: Measured = NOTHING_MEASURED,
    *,
    to: TransportOffer,
) -> tuple[TransportOffer, ...]:
    """What else both can do, the holder's offers, fastest first, for when `to` is not ready."""
    ways, _ = _compare(holder_offers, puller_offers, measured)
    return tuple(way.offer for way in ways if way.offer.name != to.name)


def explain(
    holder_offers: Sequence[TransportOffer],
    puller_offers: Sequence[TransportOffer],
    measured: Measured = NOTHING_MEASURED,
) -> str:
    """The choice, and why not another that should be better or is there, as one phrase."""
    ways, problems = _compare(holder_offers, puller_offers, measured)
    chosen = ways[0] if ways else None
    believed_bytes_per_s = NOMINAL_BYTES_PER_S[chosen.offer.name] if chosen is not None else 0.0
    offered = {offer.name for offer in (*holder_offers, *puller_offers)}
    why_not = {way.offer.name: f"not {way}" for way in ways[1:]}
    why_not |= {
        name: f"not {name}: {problem}"
        for name, problem in problems.items()
        if name in offered or NOMINAL_BYTES_PER_S[name] > believed_bytes_per_s
    }
    listed = [why_not[name] for name in NOMINAL_BYTES_PER_S if name in why_not]
    return "; ".join(["none" if chosen is None else str(chosen), *listed])


def _compare(
    holder_offers: Sequence[TransportOffer],
    puller_offers: Sequence[TransportOffer],
    measured: Measured,
) -> tuple[list[Way], dict[str, str]]:
    """The ways there are, fastest first, and for every other known transport why it is none."""
    ways: list[Way] = []
    problems: dict[str, str] = {}
    for name, nominal_bytes_per_s in NOMINAL_BYTES_PER_S.items():
        holder, puller = _named(name, holder_offers), _named(name, puller_offers)
        if holder is None:
            problems[name] = "the holder does not offer it"
        elif puller is None:
            problems[name] = "the puller does not offer it"
        elif holder.host != puller.host:  # both name none where it does not matter
            problems[name] = "not on one host"
        else:
            bytes_per_s = measured.get(name, nominal_bytes_per_s)
            ways.append(Way(offer=holder, bytes_per_s=bytes_per_s, is_measured=name in measured))
    # Equal ones stay in the order of what they should bring.
    ways.sort(key=lambda way: -_worth(way, is_any_measured=bool(measured)))
    return ways, problems


def _worth(way: Way, *, is_any_measured: bool) -> float:
    """Its figure; beside one that was measured, what is only believed counts for half, or a busy
    moment of a good transport would be the end of it.
    """
    return way.bytes_per_s / (2 if is_any_measured and not way.is_measured else 1)


def _named(name: str, offers: Sequence[TransportOffer]) -> TransportOffer | None:
    return next((offer for offer in offers if offer.name == name), None)


def _speed(bytes_per_s: float) -> str:
    if bytes_per_s >= 1e9:
        return f"{bytes_per_s / 1e9:.1f} GB/s"
    return f"{bytes_per_s / 1e6:.1f} MB/s"
