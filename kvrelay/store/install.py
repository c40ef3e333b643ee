"""Putting a model directory in its place: whole or not at all, one pull at a time."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvrelay.errors import ModelInvalid
from kvrelay.store.progress import Progress

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


def check_name(name: str) -> str:
    """`name`, if a model may be called that.

    Raises:
        ModelInvalid: it could not be a directory's name on every system.
    """
    if not _NAME.fullmatch(name):
        raise ModelInvalid(
            name, "a model's name is 1 to 100 of a-z 0-9 . _ - and starts with a letter or digit"
        )
    return name


def name_of(text: str) -> str:
    """A model name made of a file's or repository's name."""
    return check_name(re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:100])


@contextmanager
def locked(models_dir: Path, name: str, *, progress: Progress) -> Iterator[None]:
    """Hold the right to write model `name`; waits while another process has it.

    The kernel drops the lock of a process that dies, so the wait needs no deadline: it lasts
    as long as somebody is really pulling.
    """
    models_dir.mkdir(parents=True, exist_ok=True)
    with (models_dir / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.note(f"another pull of {name} is under way; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A new directory that becomes `target` if the block ends well, and vanishes if not.

    Only under `locked`. Leftovers of pulls that were killed are cleared first.
    """
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield fresh
        fresh.chmod(0o755)
        _sync(fresh)
        _swap(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _swap(fresh: Path, target: Path) -> None:
    if target.exists():
        # Named as a leftover, so that the next pull clears it if we die right here.
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        target.rename(old / "old")
        fresh.rename(target)
        shutil.rmtree(old)
    else:
        fresh.rename(target)
    _sync_entry(target.parent)


def _sync(directory: Path) -> None:
    for path in directory.iterdir():
        _sync_entry(path)
    _sync_entry(directory)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
