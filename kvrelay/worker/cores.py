"""Who computes on this machine right now: one locked byte per busy worker.

    1. Each worker claims a slot of a small file by locking the slot's byte, for its life.
    2. While its engine has something to compute it locks a second byte, its mark.
    3. Before each step it asks the kernel which other marks are locked.

The kernel drops the locks of a process that ends, however it ends, so no mark is ever stale.
Workers see each other when they are of one user, use one runtime directory and may run on the
same cores; others, such as those in other containers, count the cores of their own limits.
"""

import errno
import fcntl
import os
import pathlib
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import structlog

from kvrelay.clock import Clock
from kvrelay.config import SettingsError
from kvrelay.engine.batch import Path, Rows, Runner
from kvrelay.engine.cores import ThreadChoice, fixed_threads, threads_for, usable_cores
from kvrelay.types import Role

log = structlog.get_logger(__name__)

SLOTS_PER_ROLE = 512
_FIRST_SLOT = {Role.DECODE: 0, Role.PREFILL: SLOTS_PER_ROLE}
"""Decode workers stand first, so that spare cores are theirs; see `threads_for`."""

_NUM_SLOTS = SLOTS_PER_ROLE * len(_FIRST_SLOT)
_MARKS = 4096
"""Where the marks begin; slots are below. The file itself stays empty."""

_FLOCK = struct.Struct("@hhqqi0q")  # l_type, l_whence, l_start, l_len, l_pid; as in fcntl(2)


class CoreShare:
    """One worker's share of the cores. Used by one thread, closed when that has ended."""

    def __init__(self, fd: int, role: Role, *, num_cores: int, limit: int) -> None:
        """`fd` is of the file all share, -1 for nobody; it is ours from now on.

        Raises:
            SettingsError: all slots of this role are taken.
        """
        self.num_cores = num_cores
        self._limit = limit
        self._fd = fd
        self._is_busy = False
        try:
            self._mark = _MARKS + (_claim(fd, role) if fd >= 0 else 0)
        except BaseException:
            self.close()
            raise

    @classmethod
    def join(cls, role: Role, *, limit: int, directory: pathlib.Path | None = None) -> "CoreShare":
        """Take a place among the workers that may run on the same cores as this process.

        Where they cannot be known, the share is all cores, and a log event says so.

        Args:
            role: Decides who gets cores that do not divide evenly.
            limit: Most threads, 0 for as many as there are cores.
            directory: Other than the user's runtime directory.
        """
        allowed = sorted(os.sched_getaffinity(0))
        num_cores = usable_cores(len(allowed), quotas())
        try:
            fd = _open(directory or runtime_dir(), allowed)
        except OSError as error:
            log.warning("cores.not_shared", problem=str(error), num_cores=num_cores)
            fd = -1
        return cls(fd, role, num_cores=num_cores, limit=limit)

    @property
    def most_threads(self) -> int:
        """What `threads` never exceeds."""
        return min(self.num_cores, self._limit or self.num_cores)

    @property
    def fixed_threads(self) -> int:
        """For a runner that cannot change the number of its threads."""
        return fixed_threads(num_cores=self.num_cores, limit=self._limit)

    def threads(self) -> int:
        """Threads for the step that begins now."""
        before = after = 0
        if self._fd >= 0 and self.num_cores > 1:
            for mark in self._others():
                before += mark < self._mark
                after += mark > self._mark
        return threads_for(
            num_cores=self.num_cores, limit=self._limit, busy_before=before, busy_after=after
        )

    def busy(self, is_busy: bool, /) -> None:
        """See `Presence`."""
        if is_busy == self._is_busy or self._fd < 0:
            return
        _set(self._fd, fcntl.F_WRLCK if is_busy else fcntl.F_UNLCK, self._mark)
        self._is_busy = is_busy

    def close(self) -> None:
        """Give up slot and mark. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _others(self) -> Iterator[int]:
        """Marks locked by others, in no order; no more of them than can matter.

        The kernel names any one lock of a range, so what is left and right of it is asked next.
        """
        ranges = [(_MARKS, _MARKS + _NUM_SLOTS)]
        num_found = 0
        while ranges and num_found < self.num_cores:
            start, end = ranges.pop()
            mark = _locked_by_others(self._fd, start, end)
            if mark is None:
                continue
            num_found += 1
            yield mark
            ranges += [(a, b) for a, b in ((start, mark), (mark + 1, end)) if a < b]


@runtime_checkable
class ResizableRunner(Runner, Protocol):
    """A runner whose number of threads may change between steps."""

    def set_threads(self, num_threads: int) -> None: ...


class SharingRunner:
    """A `Runner` that computes each step with its share of the cores, or less if that is faster."""

    def __init__(self, runner: ResizableRunner, cores: CoreShare, clock: Clock) -> None:
        self._runner = runner
        self._cores = cores
        self._clock = clock
        self._choice = ThreadChoice()
        self._num_threads = 0

    def step(self, batch: Sequence[Rows]) -> list[int | None]:
        share = self._cores.threads()
        if share == 1 or any(rows.path is Path.PROMPT for rows in batch):
            return self._step(batch, share)  # nothing to choose
        num_rows = sum(len(rows.token_ids) for rows in batch)
        num_threads = self._choice.choose(num_rows, most=share)
        started_s = self._clock.now()
        sampled = self._step(batch, num_threads)
        elapsed_s = self._clock.now() - started_s
        self._choice.learn(num_rows, num_threads=num_threads, elapsed_s=elapsed_s)
        return sampled

    def _step(self, batch: Sequence[Rows], num_threads: int) -> list[int | None]:
        if num_threads != self._num_threads:
            self._runner.set_threads(num_threads)
            self._num_threads = num_threads
        return self._runner.step(batch)


def yield_to_others(nice: int) -> None:
    """Let all threads there are, and those they will start, stand back by `nice` where cores are
    short; except the main thread, which answers for the process and computes nothing.

    Under Linux's autogroups niceness counts only within a session, so the session is moved as
    well if it is this process's own.
    """
    if nice == 0:
        return
    main_id = os.getpid()
    niceness = min(19, os.getpriority(os.PRIO_PROCESS, main_id) + nice)
    for thread_id in map(int, os.listdir("/proc/self/task")):
        if thread_id != main_id:
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.setpriority(os.PRIO_PROCESS, thread_id, niceness)
    if os.getsid(0) == main_id:
        try:
            pathlib.Path("/proc/self/autogroup").write_text(str(niceness))
        except OSError as error:  # there are none, or it was moved a moment ago
            log.debug("cores.no_autogroup", problem=str(error))


def runtime_dir() -> pathlib.Path:
    """Where this user's workers meet; made if need be.

    Raises:
        OSError: it cannot be made, or is not this user's alone.
    """
    parent = os.environ.get("XDG_RUNTIME_DIR")
    if parent and os.path.isdir(parent):
        path = pathlib.Path(parent) / "kvrelay"
    else:
        path = pathlib.Path(tempfile.gettempdir()) / f"kvrelay-{os.geteuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077 or not path.is_dir():
        raise PermissionError(errno.EPERM, "not a directory of this user alone", str(path))
    return path


def quotas(
    root: pathlib.Path = pathlib.Path("/sys/fs/cgroup"),
    own: pathlib.Path = pathlib.Path("/proc/self/cgroup"),
) -> list[float]:
    """CPU quotas in cores that bind this process: of its cgroup and of all above it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounts = [root / "cpu", root / "cpu,cpuacct"] if "cpu" in controllers.split(",") else []
        for mount in mounts if controllers else [root, root / "unified"]:
            inner = pathlib.PurePosixPath(path.lstrip("/"))
            found += [_quota(mount / each) for each in (inner, *inner.parents)]
    return [quota for quota in found if quota is not None]


def _quota(group: pathlib.Path) -> float | None:
    """Cores that one cgroup grants, by the files of either version; None for no limit."""
    try:
        if (group / "cpu.max").is_file():
            granted, period = (group / "cpu.max").read_text().split()
        else:
            granted = (group / "cpu.cfs_quota_us").read_text()
            period = (group / "cpu.cfs_period_us").read_text()
        return None if granted == "max" or int(granted) < 0 else int(granted) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _open(directory: pathlib.Path, allowed: Sequence[int]) -> int:
    """The file of all workers that may run on exactly these cores."""
    cores = blake2b(",".join(map(str, allowed)).encode(), digest_size=8).hexdigest()
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(directory / f"cores-{cores}", flags, 0o600)
    try:
        _locked_by_others(fd, _MARKS, _MARKS + _NUM_SLOTS)  # whether there are such locks here
    except BaseException:
        os.close(fd)
        raise
    return fd


def _claim(fd: int, role: Role) -> int:
    """The first free slot of a role, locked."""
    first = _FIRST_SLOT[role]
    for slot in range(first, first + SLOTS_PER_ROLE):
        try:
            _set(fd, fcntl.F_WRLCK, slot)
        except (BlockingIOError, PermissionError):  # EAGAIN or EACCES: somebody has it
            continue
        return slot
    raise SettingsError(f"{SLOTS_PER_ROLE} {role.value} workers share these cores already")


def _set(fd: int, kind: int, at: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, at, 1, 0))


def _locked_by_others(fd: int, start: int, end: int) -> int | None:
    """A byte of `[start, end)` that somebody else has locked."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
    kind, _, at, _, _ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(at)
