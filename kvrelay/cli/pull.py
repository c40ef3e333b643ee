"""`kvrelay pull`: a model, from wherever it is, into the store."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as BarDisplay

from kvrelay.cli.target import fail
from kvrelay.errors import ServingError
from kvrelay.store import pull as store
from kvrelay.store.progress import Progress


class Bars:
    """Progress for a terminal: one bar per stage."""

    def __init__(self, bars: BarDisplay) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def begin(self, stage: str, *, total_bytes: int) -> None:
        self._bars.start()
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


def pull(source: str, *, name: str | None, force: bool) -> None:
    """Fetch or convert a model so that `kvrelay up` can serve it."""
    try:
        with shown(Console(stderr=True)) as progress:
            pulled = store.pull(source, name=name, force=force, progress=progress)
    except ServingError as error:
        fail(str(error))
    except OSError as error:
        fail(
            f"{error.filename}: {error.strerror}; make room or rights there, "
            "or set KVRELAY_CACHE_DIR to another place"
        )
    state = "already there" if pulled.was_present else "ready"
    typer.echo(f"{pulled.name} is {state}: {pulled.path}")


@contextmanager
def shown(console: Console) -> Iterator[Progress]:
    """Progress that `console` shows as it can; nothing appears where nothing is to be done."""
    if not console.is_terminal:
        yield Lines(console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    bars = BarDisplay(*columns, console=console)
    try:
        yield Bars(bars)
    finally:
        bars.stop()
