"""Where a measurement was taken: numbers do not travel without it."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

GIT_S = 5.0


class ProcessCpuClock:
    """CPU time of this process, all threads."""

    def now(self) -> float:
        return time.process_time()


def describe() -> dict[str, object]:
    """The machine and the software of this process. Loads nothing to learn its version."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_num_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "kvrelay": _version("kvrelay"),
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_model() -> str:
    """As the kernel calls it."""
    for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()  # ARM kernels give no name


def commit() -> str | None:
    """The commit of the checkout that this code is from, `+changes` if it is not that exactly;
    None if it is from no checkout.
    """
    here = Path(__file__).parent
    # An installed copy may lie inside of some other project's checkout.
    if _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    head, changes = _git(here, "rev-parse", "HEAD"), _git(here, "status", "--porcelain")
    return f"{head}+changes" if head and changes else head


def _git(directory: Path, *arguments: str) -> str | None:
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "--no-optional-locks", "-C", str(directory), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
