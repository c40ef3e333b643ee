"""Wraps any transport and makes it fail on purpose, the same way for the same seed.

What it does to bytes, the digest must find; what it raises, the caller must survive.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import structlog

from kvrelay.errors import PeerUnavailable
from kvrelay.kv.cache import KvCache
from kvrelay.transfer.base import BlockCopy, KvTransport, PullStats, RemoteHold
from kvrelay.types import TransportOffer

log = structlog.get_logger(__name__)


class Fault(Enum):
    """One way for a pull to go wrong."""

    DROP = "drop"
    """Nothing lands: `PeerUnavailable`."""

    DELAY = "delay"
    """It starts late."""

    CORRUPT = "corrupt"
    """All land, some bits of one block flipped."""

    TRUNCATE = "truncate"
    """The last blocks, at least one, are left as they were."""

    DUPLICATE = "duplicate"
    """All land twice."""


@dataclass(frozen=True, slots=True)
class FaultRates:
    """How likely each fault is to befall a pull, each in [0, 1], independent of the others."""

    rates: Mapping[Fault, float]

    def faults(self, num_pull: int, rng: random.Random) -> frozenset[Fault]:
        # Every fault draws, likely or not: the seed alone decides, whatever the rates are.
        draws = {fault: rng.random() for fault in Fault}
        return frozenset(fault for fault in Fault if draws[fault] < self.rates.get(fault, 0.0))


@dataclass(frozen=True, slots=True)
class FaultScript:
    """Which faults befall which pull, counted from 0."""

    script: Mapping[int, frozenset[Fault]]

    def faults(self, num_pull: int, rng: random.Random) -> frozenset[Fault]:
        return self.script.get(num_pull, frozenset())


class FaultPlan(Protocol):
    """Chooses the faults of a pull: `FaultRates` by chance, `FaultScript` by number."""

    def faults(self, num_pull: int, rng: random.Random) -> frozenset[Fault]: ...


class FaultyTransport:
    """See `KvTransport`. Is `inner` to peers; only our own pulls go wrong.

    `injected` counts what was done so far.
    """

    def __init__(
        self, inner: KvTransport, *, plan: FaultPlan, seed: int, delay_s: float = 0.05
    ) -> None:
        self.injected: Counter[Fault] = Counter()
        self._inner = inner
        self._plan = plan
        self._rng = random.Random(seed)
        self._seed = seed
        self._delay_s = delay_s
        self._num_pulls = 0
        self._cache: KvCache | None = None

    @property
    def name(self) -> str:
        return self._inner.name

    def register(self, cache: KvCache) -> None:
        self._inner.register(cache)
        self._cache = cache

    def describe(self) -> TransportOffer:
        return self._inner.describe()

    def can_pull(self, offer: TransportOffer) -> bool:
        return self._inner.can_pull(offer)

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        faults = self._plan.faults(self._num_pulls, self._rng)
        self._num_pulls += 1
        # Drawn now, so that pulls which overlap cannot change each other's faults.
        rng = random.Random(self._rng.getrandbits(64))
        self.injected.update(faults)
        if faults:
            names = sorted(fault.value for fault in faults)
            log.warning("transfer.fault_injected", faults=names, seed=self._seed)
        if Fault.DELAY in faults:
            await asyncio.sleep(self._delay_s)
        if Fault.DROP in faults:
            raise PeerUnavailable("pull dropped by the fault injector")
        return await self._pull(remote, copies, faults, rng)

    async def close(self) -> None:
        await self._inner.close()

    async def _pull(
        self,
        remote: RemoteHold,
        copies: Sequence[BlockCopy],
        faults: frozenset[Fault],
        rng: random.Random,
    ) -> PullStats:
        wanted = copies
        if Fault.TRUNCATE in faults and copies:
            wanted = copies[: rng.randrange(len(copies))]
        stats = await self._inner.pull(remote, wanted)
        if Fault.DUPLICATE in faults:
            await self._inner.pull(remote, wanted)
        if Fault.CORRUPT in faults and copies:
            self._flip_bits(rng.choice(copies), rng)
        # A truncated pull says nothing of it: only the digest may find out.
        return replace(stats, num_bytes=len(copies) * self._here.layout.block_num_bytes)

    @property
    def _here(self) -> KvCache:
        assert self._cache is not None, "not registered"
        return self._cache

    def _flip_bits(self, copy: BlockCopy, rng: random.Random) -> None:
        view = self._here.block_bytes(copy.target)
        for position in {rng.randrange(len(view)) for _ in range(rng.randint(1, 8))}:
            view[position] ^= 1 << rng.randrange(8)
