"""`kvrelay pull`: a model, from wherever it is, into the store."""

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from kvrelay.errors import ServingError
from kvrelay.store import pull as store


class Bars:
    """Progress for a terminal: one bar per stage."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def begin(self, stage: str, *, total_bytes: int) -> None:
        self._fill()
        self._task = self._bars.add_task(stage, total=total_bytes)

    def advance(self, num_bytes: int) -> None:
        assert self._task is not None
        self._bars.advance(self._task, num_bytes)

    def note(self, message: str) -> None:
        self._bars.console.print(message, markup=False, highlight=False)

    def _fill(self) -> None:
        """The stage before is over, even where its bytes were only estimated."""
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, completed=task.total)


class Lines:
    """Progress for a log: one line per stage."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begin(self, stage: str, *, total_bytes: int) -> None:
        self.note(f"{stage} ({total_bytes / 1e6:.1f} MB)")

    def advance(self, num_bytes: int) -> None:
        pass

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, highlight=False, soft_wrap=True)


def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="A known model (smollm2-135m-instruct), a .gguf file, "
            "a Hugging Face directory, or a hub id ORG/NAME."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call the model.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Pull again even if the model is already there.")
    ] = False,
) -> None:
    """Fetch or convert a model so that `kvrelay up` can serve it."""
    console = Console(stderr=True)
    try:
        pulled = fetch(source, name=name, force=force, console=console)
    except ServingError as error:
        console.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except OSError as error:
        console.print(
            f"error: {error.filename}: {error.strerror}; make room or rights there, "
            "or set KVRELAY_CACHE_DIR to another place",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1) from error
    state = "already there" if pulled.was_present else "ready"
    typer.echo(f"{pulled.name} is {state}: {pulled.path}")


def fetch(source: str, *, name: str | None, force: bool, console: Console) -> store.Pulled:
    """Pull, showing the progress on `console` as it can show it."""
    if not console.is_terminal:
        return store.pull(source, name=name, force=force, progress=Lines(console))
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        return store.pull(source, name=name, force=force, progress=Bars(bars))
