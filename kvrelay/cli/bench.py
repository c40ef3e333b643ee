"""`kvrelay bench`: measure a running deployment, or any server that speaks OpenAI's protocol."""

import json
import random
import secrets
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from kvrelay import process
from kvrelay.bench import machine, plot, report, workload
from kvrelay.bench.base import Record, Source
from kvrelay.bench.driver import RealTime
from kvrelay.bench.plan import DEFAULT_VOCAB_SIZE, Plan, Run
from kvrelay.bench.runs import carry_out
from kvrelay.bench.sources import GrpcSource, HttpSource
from kvrelay.bench.stats import Targets
from kvrelay.bench.workload import Item
from kvrelay.cli.target import Target, fail
from kvrelay.clock import MonotonicClock
from kvrelay.errors import InvalidRequest

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was typed."""

    http: str | None
    is_open_loop: bool
    clients: int
    rates: tuple[float, ...]
    requests: int | None
    duration_s: float | None
    mix: str
    trace: Path | None
    seed: int | None
    """None mints one: a prompt that was sent before would be met in the prefix index."""

    temperature: float
    vocab_size: int | None
    ttft_slo_s: float
    tpot_slo_s: float
    warm_up: int
    timeout_s: float
    json_path: Path | None
    plot_path: Path | None


def bench(target: Target, options: Options) -> None:
    """Measure what answers at the target, or at `options.http`, and print a report."""
    plan = _plan(options)
    where = target if options.http is None else Target(options.http)
    where.run(_bench(target, options, plan))


def _plan(options: Options) -> Plan:
    """The plan; ends the command with a usage error if the options make none."""
    if options.rates and not options.is_open_loop:
        raise typer.BadParameter("--rate goes with --mode open")
    if options.is_open_loop and not options.rates and options.trace is None:
        raise typer.BadParameter("--mode open needs a --rate, or a --trace")
    if options.plot_path is not None and not options.rates:
        raise typer.BadParameter("--plot draws rates: it needs --mode open and --rate")
    rates: tuple[float | None, ...] = options.rates
    return Plan(
        rates=rates or ((None,) if options.is_open_loop else ()),
        num_clients=options.clients,
        num_requests=options.requests,
        duration_s=options.duration_s,
        mix=_understood("--mix", lambda: workload.parse_mix(options.mix)),
        trace=_trace(options.trace),
        seed=secrets.randbits(32) if options.seed is None else options.seed,
        temperature=options.temperature,
        targets=Targets(ttft_s=options.ttft_slo_s, tpot_s=options.tpot_slo_s),
        num_warm_up=options.warm_up,
        timeout_s=options.timeout_s,
    )


def _trace(path: Path | None) -> tuple[Item, ...]:
    if path is None:
        return ()
    try:
        with path.open(encoding="utf-8") as lines:
            return _understood("--trace", lambda: tuple(workload.parse_trace(lines)))
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"--trace: {error}") from None


def _understood(option: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except InvalidRequest as error:
        raise typer.BadParameter(f"{option}: {error.problem}") from None


async def _bench(target: Target, options: Options, plan: Plan) -> None:
    if options.plot_path is not None:
        plot.require()  # before the work, not after it
    async with _source(target, options.http) as source:
        served = await source.served()
        plan.check(served)
        process.settle()  # a pause of ours would look like one of theirs
        vocab_size = options.vocab_size or served.vocab_size or DEFAULT_VOCAB_SIZE
        with _Bars(Console(stderr=True)) as bars:
            runs = await carry_out(
                plan,
                source,
                vocab_size=vocab_size,
                timeline=RealTime(MonotonicClock()),
                cpu_clock=machine.ProcessCpuClock(),
                make_rng=random.Random,
                watcher=bars,
            )
    protocol = "gRPC" if options.http is None else "HTTP"
    address = options.http or target.address
    _console().print(_drawn(runs, plan, f"{served.model} over {protocol} at {address}"))
    if options.json_path is not None:
        everything = report.to_json(
            runs,
            plan,
            served,
            protocol=protocol,
            address=address,
            vocab_size=vocab_size,
            command=["kvrelay", *sys.argv[1:]],
            machine=machine.describe(),
        )
        _write(options.json_path, lambda path: path.write_text(json.dumps(everything) + "\n"))
    if options.plot_path is not None:
        title = f"{served.model} over {protocol}, {_work(plan)}"
        _write(
            options.plot_path, lambda path: plot.draw(runs, plan.targets, title=title, path=path)
        )
    if not any(run.totals.num_finished for run in runs):
        raise typer.Exit(1)


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    typer.echo(f"wrote {path}")


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=200)  # a pipe has no width


@asynccontextmanager
async def _source(target: Target, http: str | None) -> AsyncIterator[Source]:
    if http is not None:
        yield HttpSource(http)
        return
    async with target.connect() as client:
        yield GrpcSource(client)


@dataclass(slots=True)
class _Bars:
    """A bar for each run on a terminal; nothing elsewhere."""

    console: Console
    _progress: Progress | None = None
    _task: TaskID | None = None
    _num_failed: int = 0
    _screen: AbstractContextManager[object] = field(default_factory=nullcontext)

    def __enter__(self) -> "_Bars":
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[failed]}", style="red"),
                console=self.console,
                transient=True,
                refresh_per_second=4,  # drawing must not take the time that is measured
            )
            self._screen = self._progress
        self._screen.__enter__()
        return self

    def __exit__(self, *exit_: object) -> None:
        self._screen.__exit__(None, None, None)

    def begin(self, title: str, num_requests: int | None) -> None:
        self._num_failed = 0
        if self._progress is not None:
            self._task = self._progress.add_task(title, total=num_requests, failed="")

    def took(self, record: Record) -> None:
        self._num_failed += bool(record.error)
        if self._progress is not None and self._task is not None:
            failed = f"{self._num_failed} failed" if self._num_failed else ""
            self._progress.update(self._task, advance=1, failed=failed)


def _work(plan: Plan) -> str:
    return f"trace of {len(plan.trace)} requests" if plan.trace else f"mix {plan.mix}"


def _drawn(runs: list[Run], plan: Plan, what: str) -> RenderableType:
    """The report. Fits 80 columns."""
    work = f"{_work(plan)}, seed {plan.seed}, {plan.num_warm_up} more to warm up"
    parts: list[RenderableType] = [Text(what, style="bold"), Text(work, style="dim")]
    for run in runs:
        parts += [Text(), Text(report.title(run, plan), style="bold")]
        parts += [_table(report.HEADINGS, report.rows(run.totals))]
        parts += [Text(line) for line in report.facts(run, plan.targets)]
        parts += [Text(f"warning: {line}", style="yellow") for line in report.warnings(run)]
    if len(runs) > 1:
        parts += [Text(), _sweep(runs)]
    return Group(*parts)


def _sweep(runs: list[Run]) -> Table:
    """Ten columns: their headings are stacked so that 80 of a terminal hold them."""
    headings = tuple(heading.replace(" ", "\n", 1) for heading in report.SWEEP_HEADINGS)
    return _table(headings, report.sweep(runs), gap=1)


def _table(headings: tuple[str, ...], rows: list[report.Row], *, gap: int = 2) -> Table:
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim")
    for number, heading in enumerate(headings):
        # What is too wide even so is folded: a number that lost its end would be a wrong one.
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
