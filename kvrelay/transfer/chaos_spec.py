"""What a developer writes to have pulls go wrong: `corrupt=0.05,delay=0.2:50ms,seed=7`.

Pure, so that the command can refuse a bad text before it starts anything.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal


class Fault(Enum):
    """One way for a pull to go wrong."""

    DROP = "drop"
    """Nothing lands: `PeerUnavailable`."""

    DELAY = "delay"
    """It starts late."""

    CORRUPT = "corrupt"
    """All land, but some bytes are not the holder's; see `Damage`."""

    TRUNCATE = "truncate"
    """The last blocks, at least one, are left as they were."""

    DUPLICATE = "duplicate"
    """All land twice."""

    REORDER = "reorder"
    """They land in another order, and not before the pull that was asked for next, if one is
    asked for meanwhile."""

    STALL = "stall"
    """Some land, then nothing happens until it is cancelled, or `PeerUnavailable` after long."""


class Damage(Enum):
    """What CORRUPT does. There is always at least one byte that is not the holder's."""

    BIT = "bit"
    """One bit of one block is flipped."""

    BITS = "bits"
    """Several bits of one block are."""

    RUN = "run"
    """A run of a block's bytes is overwritten with anything."""

    BLOCK = "block"
    """All of a block is."""

    STALE = "stale"
    """A block has what was at its place before."""

    SWAPPED = "swapped"
    """Two blocks of the pull have each other's bytes, or one has an earlier pull's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChaosSpec:
    """How likely each fault is to befall a pull, each in [0, 1], independent of the others."""

    rates: Mapping[Fault, float]
    delay_s: float = 0.05
    stall_s: float = 5.0
    seed: int = 0


_MAX_SEED = (1 << 64) - 1
_MAX_DURATION_S = 600.0
_MAX_CHARS = 512
_UNITS_S: Mapping[str, float] = {"ms": 1e-3, "s": 1.0}
_TIMED: Mapping[Fault, Literal["delay_s", "stall_s"]] = {
    Fault.DELAY: "delay_s",
    Fault.STALL: "stall_s",
}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]*)?)(ms|s)")

HOW = (
    f"{'|'.join(fault.value for fault in Fault)}=RATE with a rate of 0 to 1, "
    "delay and stall also as RATE:TIME with a time such as 50ms or 2s, and seed=NUMBER, "
    "with commas between them"
)
"""What a text may say, for people."""


def parse_chaos(text: str) -> ChaosSpec:
    """What `text` says.

    Raises:
        ValueError: naming the part that cannot be, and what may be given.
    """
    if len(text) > _MAX_CHARS:
        raise ValueError(f"{len(text)} characters, at most {_MAX_CHARS}")
    rates: dict[Fault, float] = {}
    durations: dict[str, float] = {}
    seed: int | None = None
    for part in text.split(","):
        name, has_value, value = (word.strip() for word in part.partition("="))
        if name == "seed" and seed is None:
            seed = _seed(part, value)
            continue
        fault = next((fault for fault in Fault if fault.value == name), None)
        if fault is None or not has_value or fault in rates:
            raise _refused(part, "given twice" if fault in rates or seed is not None else "unknown")
        rate, has_duration, duration = value.partition(":")
        rates[fault] = _rate(part, rate)
        if has_duration:
            durations[_timed(part, fault)] = _duration_s(part, duration)
    return ChaosSpec(rates=rates, seed=seed or 0, **durations)


def _rate(part: str, text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0.0 <= rate <= 1.0:  # nan as well
        raise _refused(part, "its rate is not a number of 0 to 1")
    return rate


def _timed(part: str, fault: Fault) -> Literal["delay_s", "stall_s"]:
    if fault not in _TIMED:
        raise _refused(part, f"{fault.value} takes no time")
    return _TIMED[fault]


def _duration_s(part: str, text: str) -> float:
    match = _DURATION.fullmatch(text)
    duration_s = float(match[1]) * _UNITS_S[match[2]] if match else -1.0
    if not 0.0 <= duration_s <= _MAX_DURATION_S:
        raise _refused(part, f"its time is not of 0 to {_MAX_DURATION_S:.0f} s")
    return duration_s


def _seed(part: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= _MAX_SEED):
        raise _refused(part, f"the seed is not a number of 0 to {_MAX_SEED}")
    return int(text)


def _refused(part: str, problem: str) -> ValueError:
    return ValueError(f"{part.strip()!r}: {problem}; may be {HOW}")
