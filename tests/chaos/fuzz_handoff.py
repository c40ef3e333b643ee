"""Many more corruptions and clean handoffs than a test has time for: `make fuzz-handoff`.

    python -m tests.chaos.fuzz_handoff --corruptions 10000 --clean 100000 --processes 2

Every process has a pair of workers for each transport in turn, and tells by lines of JSON how far
it is. Ends with 1 if a corruption passed or a clean handoff was refused.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import structlog
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from kvrelay.transfer import nixl
from kvrelay.transfer.chaos_spec import Damage
from tests.support.handoffs import HARMS, Tally, handoffs

TELL_EVERY = 100
"""Handoffs between two lines of progress."""

ROUND_SIZE = 20_000
"""Handoffs of one pair of workers; the next have a fresh pair, and other tokens."""


def transports() -> list[str]:
    """Those over host memory that this machine can run."""
    return ["shm", "stream", *(["nixl"] if nixl.is_installed() else [])]


@dataclass(slots=True)
class Report:
    """What all processes found, by transport."""

    tallies: dict[str, Tally] = field(default_factory=dict)

    def add(self, transport: str, tally: Tally) -> None:
        self.tallies.setdefault(transport, Tally()).add(tally)

    @property
    def wrong(self) -> list[str]:
        return [f"{name}: {what}" for name, tally in self.tallies.items() for what in tally.wrong]


# A process that hands over


async def work(shares: dict[str, tuple[int, int]], seed: int) -> None:
    """So many corruptions and clean handoffs by each transport; tells of it on stdout."""
    for transport, (num_corruptions, num_clean) in shares.items():
        num_rounds = max(1, -(-(num_corruptions + num_clean) // ROUND_SIZE))
        for i in range(num_rounds):
            corruptions = share(num_corruptions, num_rounds)[i]
            clean = share(num_clean, num_rounds)[i]
            async with handoffs(transport, seed=seed * 1000 + i) as pair:
                tally = await pair.run(
                    num_corruptions=corruptions, num_clean=clean, on_done=teller()
                )
            tell(
                transport=transport,
                caught=dict(tally.caught),
                num_clean=tally.num_clean,
                wrong=tally.wrong,
            )


def teller() -> Callable[[], None]:
    """To be called for each handoff; now and then it says how many there were."""
    num_done = 0

    def on_done() -> None:
        nonlocal num_done
        num_done += 1
        if num_done % TELL_EVERY == 0:
            tell(num_done=TELL_EVERY)

    return on_done


def tell(**fields: object) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


def share(total: int, num: int) -> list[int]:
    """`total` in `num` parts that differ by one at most."""
    return [total // num + (i < total % num) for i in range(num)]


# The process that has them work


async def fuzz(options: argparse.Namespace, console: Console) -> Report:
    names = transports()
    report = Report()
    corruptions, clean = (
        [share(part, options.processes) for part in share(total, len(names))]
        for total in (options.corruptions, options.clean)
    )
    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("handoffs", total=options.corruptions + options.clean)
        async with asyncio.TaskGroup() as group:
            for p in range(options.processes):
                shares = {name: (corruptions[i][p], clean[i][p]) for i, name in enumerate(names)}
                seed = options.seed * options.processes + p
                group.create_task(follow(shares, seed, report, lambda n: progress.advance(bar, n)))
        progress.update(bar, completed=options.corruptions + options.clean)
    return report


async def follow(
    shares: dict[str, tuple[int, int]], seed: int, report: Report, on_done: Callable[[int], None]
) -> None:
    """Run one worker process and take in what it tells."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.chaos.fuzz_handoff", "--work", json.dumps(shares)),
        *("--seed", str(seed)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    async for line in process.stdout:
        told = json.loads(line)
        if "num_done" in told:
            on_done(told["num_done"])
            continue
        tally = Tally(num_clean=told["num_clean"], wrong=told["wrong"])
        tally.caught.update(told["caught"])
        report.add(told["transport"], tally)
    if (code := await process.wait()) != 0:
        raise RuntimeError(f"a process that handed over ended with {code}")


def table(report: Report) -> Table:
    """By transport: what was caught, what passed, and what should not have."""
    tallies = report.tallies
    shown = Table("", *tallies, title="Handoffs")
    for harm in HARMS:
        name = harm.value if isinstance(harm, Damage) else harm
        shown.add_row(f"caught: {name}", *(str(tally.caught[name]) for tally in tallies.values()))
    shown.add_row("clean", *(str(tally.num_clean) for tally in tallies.values()))
    shown.add_row("wrong", *(str(len(tally.wrong)) for tally in tallies.values()))
    return shown


def main(argv: Sequence[str]) -> int:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    parser = argparse.ArgumentParser(description="Damage handoffs, and see that it is found.")
    parser.add_argument("--corruptions", type=int, default=10_000)
    parser.add_argument("--clean", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.work is not None:
        asyncio.run(work(json.loads(options.work), options.seed))
        return 0
    console = Console()
    started_s = time.monotonic()
    report = asyncio.run(fuzz(options, console))
    console.print(table(report))
    num_caught = sum(tally.num_caught for tally in report.tallies.values())
    num_clean = sum(tally.num_clean for tally in report.tallies.values())
    console.print(
        f"{num_caught} of {options.corruptions} corruptions caught, {num_clean} of "
        f"{options.clean} clean handoffs right, in {time.monotonic() - started_s:.0f} s; "
        f"seed {options.seed}"
    )
    for what in report.wrong[:20]:
        console.print(what)
    is_right = not report.wrong and (num_caught, num_clean) == (options.corruptions, options.clean)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
