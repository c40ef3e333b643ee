"""`make bench-peers`: kvrelay beside the peers on the same work, and which targets are met.

A developer's tool, so no command of `kvrelay`: `python -m kvrelay.cli.bench_peers --help`.
"""

import asyncio
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvrelay.bench import machine
from kvrelay.bench.peers import document, pins, verdict
from kvrelay.bench.peers.measure import Extent, Measured, measure
from kvrelay.bench.peers.prepare import Workshop
from kvrelay.bench.peers.works import MEMORY, START, WORKS
from kvrelay.cli.target import INTERRUPTED, fail
from kvrelay.store.catalog import SMOLLM2_135M_INSTRUCT
from kvrelay.store.manifest import cache_dir

SHOWN = (
    (START, "start to ready", ("start_s",)),
    (MEMORY, "memory after the work", ("rss_gib", "pss_gib")),
    *((work.name, work.title, work.metrics) for work in WORKS),
)

DEFAULT_SEED = 9
"""With it five segments hold about as many requests, and as many long ones, as they are to."""


def bench_peers(
    systems: Annotated[
        str, typer.Option(metavar="NAME,...", help=f"Some of {', '.join(pins.SYSTEMS)}.")
    ] = ",".join(pins.SYSTEMS),
    only: Annotated[
        str,
        typer.Option(
            metavar="WORK,...",
            help=f"Some of {START}, {', '.join(work.name for work in WORKS)}. Default: all.",
        ),
    ] = "",
    repeat: Annotated[int, typer.Option(min=1, max=99, help="Repetitions of each work.")] = 5,
    segment_s: Annotated[
        float, typer.Option(min=1.0, help="Of each repetition of an open loop.")
    ] = 25.0,
    seed: Annotated[int, typer.Option(min=0, help="Lengths, arrivals and prompts.")] = DEFAULT_SEED,
    model: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="A known model, or a Hugging Face directory.")
    ] = SMOLLM2_135M_INSTRUCT.name,
    gguf: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="For llama.cpp, where the model is not a known one."
        ),
    ] = None,
    peers_dir: Annotated[
        Path | None,
        typer.Option(help="Where the peers are installed. Default: in kvrelay's cache."),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write peers-<cores>core.md and .json there."),
    ] = None,
) -> None:
    """Run every system in turn on the same work, and print figures, ratios and targets."""
    names = _chosen("--systems", systems, pins.SYSTEMS)
    works = _chosen("--only", only, (START, *(work.name for work in WORKS)))
    extent = Extent(
        works=tuple(work for work in WORKS if work.name in works),
        num_repetitions=repeat,
        segment_s=segment_s,
        seed=seed,
        starts=START in works,
    )
    root = (peers_dir or cache_dir() / "peers").expanduser()
    logs = root / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True)
    began_s = time.monotonic()
    num_repetitions = repeat * sum(len(extent.of(name)) for name in names)
    found: dict[str, Measured] = {}
    is_whole = True
    with _Screen(Console(stderr=True, highlight=False), num_repetitions) as screen:
        workshop = Workshop(root=root, logs=logs, model=model, gguf=gguf, note=screen.note)
        run = measure(names, workshop.prepare, extent, found, logs=logs, watcher=screen)
        try:
            asyncio.run(run)
        except KeyboardInterrupt:
            is_whole = False
    took_s = time.monotonic() - began_s
    settings = {
        "model": model,
        "peers": f"{pins.VLLM_PIN.requirement}, {pins.LLAMA_CPP_PIN.requirement}",
        "repetitions": repeat,
        "open-loop segments": f"{segment_s:g} s each",
        "seed": seed,
        "took": f"{took_s / 60:.0f} min",
    }
    result = _Result.of(found, settings)
    result.show(Console() if sys.stdout.isatty() else Console(width=200))
    if not is_whole:
        raise typer.Exit(INTERRUPTED)
    if write is not None:
        result.write(write)
    if all(measured.problem for measured in found.values()):
        raise typer.Exit(1)


def _chosen(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Those named, in the order of `known`; all if none is."""
    named = [name.strip() for name in text.split(",") if name.strip()]
    for name in named:
        if name not in known:
            raise typer.BadParameter(f"{option}: {name!r} is none of {', '.join(known)}")
    return tuple(name for name in known if name in named or not named)


class _Screen:
    """A bar over all repetitions on a terminal; a line for each work elsewhere."""

    def __init__(self, console: Console, num_repetitions: int) -> None:
        self._console = console
        self._began_s = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=2,  # drawing must not take the time that is measured
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=num_repetitions)

    def __enter__(self) -> "_Screen":
        self._progress.start()
        return self

    def __exit__(self, *exit_: object) -> None:
        self._progress.stop()

    def now(self, system: str, what: str) -> None:
        self._progress.update(self._task, description=f"{system}: {what}")
        if not self._console.is_terminal:
            self.note(f"{system}: {what}")

    def took(self) -> None:
        self._progress.advance(self._task)

    def note(self, line: str) -> None:
        elapsed_s = time.monotonic() - self._began_s
        self._progress.console.print(f"[{elapsed_s:6.1f} s] {line}", markup=False, soft_wrap=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Result:
    """Everything that was found, ready to be shown."""

    figures: verdict.Figures
    titles: dict[str, str]
    remarks: list[str]
    settings: dict[str, object]

    @classmethod
    def of(cls, found: dict[str, Measured], settings: dict[str, object]) -> "_Result":
        remarks = []
        for name, measured in found.items():
            if measured.problem:
                remarks.append(f"{name}: {measured.problem}")
            remarks += [f"{name}: {doubt}" for doubt in measured.doubts]
        return cls(
            figures={name: measured.figures for name, measured in found.items()},
            titles={name: measured.title for name, measured in found.items()},
            remarks=remarks,
            settings=settings,
        )

    def show(self, console: Console) -> None:
        """The figures, then the targets, then what to know about them."""
        systems = list(self.titles)
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for number, heading in enumerate(verdict.headings(systems, self.titles)):
            table.add_column(heading, justify="right" if number else "left", overflow="fold")
        for title, rows in verdict.figure_rows(self.figures, systems, SHOWN):
            table.add_row(Text(title, style="bold"))
            for label, *cells in rows:
                table.add_row(f"  {label}", *cells)
        targets = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        for number, heading in enumerate(verdict.TARGET_HEADINGS):
            targets.add_column(heading, justify="right" if number in (1, 2) else "left")
        for row in verdict.target_rows(self.figures):
            targets.add_row(*row[:-1], Text(row[-1], style="red" if row[-1] == "missed" else ""))
        console.print(table, "", targets, sep="\n")
        for remark in self.remarks:
            console.print(Text(f"note: {remark}", style="yellow"))

    def write(self, directory: Path) -> None:
        """Both files."""
        described = machine.describe()
        command = shlex.join(["python", "-m", "kvrelay.cli.bench_peers", *sys.argv[1:]])
        stem = directory / f"peers-{described['cores']}core"
        origin = document.Origin(machine=described, command=command, settings=self.settings)
        markdown = document.to_markdown(self.figures, SHOWN, self.titles, self.remarks, origin)
        whole = document.to_json(self.figures, self.titles, self.remarks, origin)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            stem.with_suffix(".md").write_text(markdown)
            stem.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
        except OSError as error:
            fail(f"{error.filename}: {error.strerror}")
        typer.echo(f"wrote {stem}.md and {stem}.json")


def main() -> None:
    """Entry point of the module."""
    typer.run(bench_peers)


if __name__ == "__main__":
    main()
