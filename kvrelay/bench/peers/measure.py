"""Every work on every system, one system at a time, one repetition after another.

1. A system is started, given all its works, weighed, and ended; then the next one.
2. Where a start is cheap it is started again, alone, until there are as many as repetitions.
3. What fails is noted, and the rest goes on.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from kvrelay import process
from kvrelay.bench import machine, report
from kvrelay.bench.base import Record
from kvrelay.bench.driver import RealTime
from kvrelay.bench.peers import systems
from kvrelay.bench.peers.install import PeerFailed
from kvrelay.bench.peers.systems import Serving, System
from kvrelay.bench.peers.works import MEMORY, START, VOCAB_SIZE, Work, read
from kvrelay.bench.plan import Run
from kvrelay.bench.runs import carry_out
from kvrelay.clock import MonotonicClock
from kvrelay.errors import ServingError

CHEAP_START_S = 20.0

Figures = dict[str, dict[str, list[float]]]
"""By work, then by metric: one value a repetition."""


class Watcher(Protocol):
    """Whoever wants to see it going on."""

    def now(self, system: str, what: str) -> None: ...

    def took(self) -> None:
        """A repetition is over."""

    def note(self, line: str) -> None: ...


@dataclass(slots=True)
class Measured:
    """What one system did."""

    title: str
    figures: Figures = field(default_factory=dict)
    doubts: list[str] = field(default_factory=list)
    """What a reader must know before believing the rest."""

    problem: str = ""
    """Why there is nothing more; empty if all went well."""

    def add(self, work: str, values: dict[str, float]) -> None:
        for metric, value in values.items():
            self.figures.setdefault(work, {}).setdefault(metric, []).append(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How much of it."""

    works: tuple[Work, ...]
    num_repetitions: int
    segment_s: float
    """Of an open loop, each repetition."""

    seed: int
    starts: bool
    """Whether starts are repeated."""

    def of(self, system: str) -> tuple[Work, ...]:
        return tuple(work for work in self.works if system in work.systems)


async def measure(
    names: Sequence[str],
    prepare: Callable[[str], System],
    extent: Extent,
    found: dict[str, Measured],
    *,
    logs: Path,
    watcher: Watcher,
) -> None:
    """All systems that have any work, into `found`, which is worth having at any time.

    Args:
        names: of the systems, in order.
        prepare: installs and describes one; may raise `PeerFailed` or `ServingError`.
        extent: how much is measured.
        found: is given each system before its first figure.
        logs: a directory for what the systems write.
        watcher: told of each step.
    """
    for name in names:
        if extent.of(name) or extent.starts:
            found[name] = Measured(title=name)
            try:
                await _system(name, prepare, extent, found[name], logs, watcher)
            except (PeerFailed, ServingError, OSError) as error:
                found[name].problem = str(error)
                watcher.note(f"{name}: {error}")


async def _system(
    name: str,
    prepare: Callable[[str], System],
    extent: Extent,
    measured: Measured,
    logs: Path,
    watcher: Watcher,
) -> None:
    watcher.now(name, "install")
    system = prepare(name)
    measured.title = system.title
    watcher.now(name, START)
    async with systems.serving(system, logs / f"{name}.log") as serving:
        measured.add(START, {"start_s": serving.start_s})
        for work in extent.of(name):
            await _work(name, work, serving, extent, measured, watcher)
        memory = serving.memory()
    rss_gib, pss_gib = memory.rss_num_bytes / 2**30, memory.pss_num_bytes / 2**30
    measured.add(MEMORY, {"rss_gib": rss_gib, "pss_gib": pss_gib})
    if extent.starts and system.prefill_core is None:
        await _starts(name, system, extent, measured, logs, watcher)


async def _starts(
    name: str, system: System, extent: Extent, measured: Measured, logs: Path, watcher: Watcher
) -> None:
    """More starts, if the first one was quick."""
    if measured.figures[START]["start_s"][0] > CHEAP_START_S:
        measured.doubts.append(f"{START}: 1 start, it takes too long for more")
        return
    for _ in range(extent.num_repetitions - 1):
        watcher.now(name, START)
        async with systems.serving(system, logs / f"{name}-start.log") as serving:
            measured.add(START, {"start_s": serving.start_s})


async def _work(
    name: str, work: Work, serving: Serving, extent: Extent, measured: Measured, watcher: Watcher
) -> None:
    for repetition in range(extent.num_repetitions):
        watcher.now(name, f"{work.name} {repetition + 1}/{extent.num_repetitions}")
        run = await _repetition(work, repetition, serving, extent)
        measured.add(work.name, dict(read(run)))
        for doubt in report.warnings(replace(run, rate=None)):
            measured.doubts.append(f"{work.name}, repetition {repetition + 1}: {doubt}")
        watcher.took()


async def _repetition(work: Work, repetition: int, serving: Serving, extent: Extent) -> Run:
    plan = work.plan(seed=extent.seed, repetition=repetition, segment_s=extent.segment_s)
    async with serving.source(is_http=work.is_http) as source:
        process.settle()  # a pause of ours would look like one of theirs
        runs = await carry_out(
            plan,
            source,
            vocab_size=VOCAB_SIZE,
            timeline=RealTime(MonotonicClock()),
            cpu_clock=machine.ProcessCpuClock(),
            make_rng=random.Random,
            watcher=_Nobody(),
        )
    return runs[0]


class _Nobody:
    """Single requests are of no interest here."""

    def begin(self, title: str, num_requests: int | None) -> None:
        pass

    def took(self, record: Record) -> None:
        pass
