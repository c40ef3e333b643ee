"""Where the words of child processes go: a bounded file each, and the terminal if they matter."""

import json
import os
import re
import shutil
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

MAX_FILE_BYTES = 32 * 2**20
"""Length at which a log file becomes `.1`, over the one before it."""

MAX_RUNS = 20
"""Directories of earlier runs that are kept."""

_TAIL_LINES = 20
_LOUD = frozenset({"warning", "error", "critical"})
_LOUD_AT_THE_END = _LOUD - {"warning"}
_NATIVE = re.compile(r"([IWEF])\d{4} \d\d:\d\d:\d\d\.")
"""How gRPC's core opens its lines: severity, month and day, time."""

_NATIVE_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}
_HIDDEN = frozenset({"event", "level", "timestamp", "service", "worker_id", "role", "epoch"})


def make_run_dir(parent: Path, name: str) -> Path:
    """A new directory `name` in `parent`, of which only the newest `MAX_RUNS` stay."""
    parent.mkdir(parents=True, exist_ok=True)
    runs = sorted(path for path in parent.iterdir() if path.is_dir())
    ended = [path for path in runs if not _is_in_use(path)]
    for old in ended[: max(0, len(runs) - MAX_RUNS + 1)]:
        shutil.rmtree(old, ignore_errors=True)
    path = parent / name
    path.mkdir(exist_ok=True)
    return path


def _is_in_use(run: Path) -> bool:
    """Directories end in the process id of the run they belong to."""
    pid = run.name.rpartition("-")[2]
    return pid.isdigit() and os.path.exists(f"/proc/{pid}")


class LogFile:
    """One process's log over all its lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.num_dropped = 0
        """Lines that could not be written, because the disk is full for one."""

        self._file: BinaryIO = path.open("ab", buffering=0)
        self._num_bytes = path.stat().st_size

    def write(self, line: str) -> None:
        """Append a line, which has no newline; or drop and count it. Never raises: a process
        that nobody reads would stand still in the middle of a word.
        """
        self.tail.append(line)
        data = line.encode(errors="replace") + b"\n"
        try:
            if self._num_bytes + len(data) > MAX_FILE_BYTES:
                self._rotate()
            self._file.write(data)
        except (OSError, ValueError):  # ValueError: it could not be opened anew
            self.num_dropped += 1
        else:
            self._num_bytes += len(data)

    def close(self) -> None:
        self._file.close()

    def _rotate(self) -> None:
        self._file.close()
        self.path.replace(self.path.with_name(self.path.name + ".1"))
        self._file = self.path.open("wb", buffering=0)
        self._num_bytes = 0


def is_loud(line: str, *, is_ending: bool = False) -> bool:
    """Whether a line deserves the terminal: warnings, errors, and whatever is no event.

    While a deployment ends, its processes miss each other, and their warnings say nothing.
    """
    level = _level(line)
    if level is None:
        return bool(line.strip())
    return level in (_LOUD_AT_THE_END if is_ending else _LOUD)


def for_people(line: str) -> str:
    """A JSON event as `level event key=value`; any other line as it is."""
    event = _parse(line)
    if event is None:
        return line
    stack = event.pop("exception", None)
    fields = "".join(f" {k}={v}" for k, v in event.items() if k not in _HIDDEN)
    text = f"{event.get('level', 'info')} {event.get('event')}{fields}"
    return f"{text}\n{stack}" if stack else text


def _level(line: str) -> str | None:
    if native := _NATIVE.match(line):
        return _NATIVE_LEVELS[native[1]]
    event = _parse(line)
    return None if event is None else str(event.get("level"))


def _parse(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return dict(event) if isinstance(event, Mapping) and "event" in event else None
