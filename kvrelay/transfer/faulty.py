"""Wraps a transport and makes it fail on purpose, the same way for the same seed.

What it does to bytes, the digest must find; what it raises, the caller must survive.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import structlog

from kvrelay.errors import PeerUnavailable
from kvrelay.kv.cache import KvCache
from kvrelay.transfer.base import BlockCopy, BlockGeneration, KvTransport, PullStats, RemoteHold
from kvrelay.transfer.chaos_spec import ChaosSpec, Damage, Fault
from kvrelay.transfer.damage import Landing, damage
from kvrelay.types import TransportOffer

log = structlog.get_logger(__name__)


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


@dataclass(slots=True)
class Injected:
    """What was done so far."""

    faults: Counter[Fault] = field(default_factory=Counter)
    damages: Counter[Damage] = field(default_factory=Counter)


class FaultyTransport:
    """See `KvTransport`. Is `inner` to peers; only our own pulls go wrong.

    `injected` counts what was done; `on_injected` is called for each fault as it is chosen.
    `damages` are the kinds of damage that CORRUPT chooses from. `cache` is what `inner` has
    registered, if it has.
    """

    def __init__(
        self,
        inner: KvTransport,
        *,
        plan: FaultPlan,
        seed: int | str,
        delay_s: float = 0.05,
        stall_s: float = 5.0,
        damages: Sequence[Damage] = tuple(Damage),
        on_injected: Callable[[Fault], None] | None = None,
        cache: KvCache | None = None,
    ) -> None:
        self.injected = Injected()
        self._inner = inner
        self._plan = plan
        self._rng = random.Random(seed)
        self._seed = seed
        self._delay_s = delay_s
        self._stall_s = stall_s
        self._damages = tuple(damages)
        self._on_injected = on_injected
        self._num_pulls = 0
        self._overtaken = asyncio.Event()  # by the next pull that ends
        self._earlier = b""  # a block that an earlier pull brought
        self._cache = cache

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def lands_on(self) -> Literal["host", "device"]:
        return self._inner.lands_on

    def register(self, cache: KvCache) -> None:
        self._inner.register(cache)
        self._cache = cache

    def describe(self) -> TransportOffer:
        return self._inner.describe()

    def can_pull(self, offer: TransportOffer) -> bool:
        return self._inner.can_pull(offer)

    def prepare(self, remote: RemoteHold) -> bool:
        return self._inner.prepare(remote)

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        faults = self._plan.faults(self._num_pulls, self._rng)
        self._num_pulls += 1
        # Drawn now, so that pulls which overlap cannot change each other's faults.
        rng = random.Random(self._rng.getrandbits(64))
        self._count(faults)
        if Fault.DELAY in faults:
            await asyncio.sleep(self._delay_s)
        if Fault.DROP in faults:
            raise PeerUnavailable("pull dropped by the fault injector")
        if Fault.REORDER in faults:
            copies = rng.sample(copies, len(copies))
            await self._let_another_overtake()
        if Fault.STALL in faults:
            await self._stall(remote, copies)
        stats = await self._pull(remote, copies, faults, rng)
        self._overtaken.set()
        self._overtaken = asyncio.Event()
        return stats

    def still(self, remote: RemoteHold, blocks: Sequence[BlockGeneration]) -> bool | None:
        return self._inner.still(remote, blocks)

    async def close(self) -> None:
        await self._inner.close()

    def _count(self, faults: frozenset[Fault]) -> None:
        if not faults:
            return
        self.injected.faults.update(faults)
        names = sorted(fault.value for fault in faults)
        log.info("transfer.fault_injected", faults=names, seed=self._seed)
        if self._on_injected is not None:
            for fault in faults:
                self._on_injected(fault)

    async def _let_another_overtake(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._delay_s):
                await self._overtaken.wait()

    async def _stall(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> None:
        await self._inner.pull(remote, copies[: len(copies) // 2])
        await asyncio.sleep(self._stall_s)
        raise PeerUnavailable(f"pull stalled for {self._stall_s} s by the fault injector")

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
        landing = Landing(self._here, copies, is_on_device=self.lands_on == "device")
        before = [landing.read(i) for i in range(len(copies))] if Fault.CORRUPT in faults else []
        stats = await self._inner.pull(remote, wanted)
        if Fault.DUPLICATE in faults:
            await self._inner.pull(remote, wanted)
        if Fault.CORRUPT in faults and copies:
            kind = rng.choice(self._damages)
            self.injected.damages[kind] += 1
            damage(landing, kind, rng, before=before, earlier=self._earlier)
        if copies:
            self._earlier = landing.read(0)
        # A truncated pull says nothing of it: only the digest may find out.
        num_bytes = sum(copy.num_bytes for copy in copies)
        return replace(stats, num_bytes=num_bytes, digests=None)

    @property
    def _here(self) -> KvCache:
        assert self._cache is not None, "not registered"
        return self._cache


def with_chaos(
    transports: Sequence[KvTransport],
    spec: ChaosSpec,
    *,
    cache: KvCache,
    worker_id: str,
    on_injected: Callable[[Fault], None],
) -> tuple[KvTransport, ...]:
    """Registered transports, whose pulls go wrong as `spec` says; other workers' differently."""
    log.warning(
        "transfer.chaos",
        note="pulls go wrong on purpose",
        rates={fault.value: rate for fault, rate in spec.rates.items()},
        seed=spec.seed,
    )
    return tuple(
        FaultyTransport(
            transport,
            plan=FaultRates(spec.rates),
            seed=f"{spec.seed}/{worker_id}/{transport.name}",
            delay_s=spec.delay_s,
            stall_s=spec.stall_s,
            on_injected=on_injected,
            cache=cache,
        )
        for transport in transports
    )
