"""Becomes another program that does not outlive its parent. Run as a script.

`launch.py PARENT_PID PROGRAM ARGUMENT...`: asks the kernel for SIGKILL at the parent's
death, then replaces itself, so the process id stays the one the parent knows. Done here and
not between fork and exec, where a process with threads may not run Python.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Tie this process to its parent, then exec."""
    parent_pid, *argv = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != int(parent_pid):
        sys.exit("the parent died first")
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main()
