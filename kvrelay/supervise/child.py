"""One life of one process: started, heard, waited for."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

_LAUNCH = Path(__file__).with_name("launch.py")
_MAX_LINE_BYTES = 64 * 1024
_LAST_WORDS_S = 1.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a process listens, as it said itself. `http` may be empty."""

    grpc: str
    http: str = ""


class Child:
    """A process in a session of its own, so that a terminal's Ctrl-C does not reach it.

    The kernel kills it if this process dies. What it writes goes to `on_line`, line by line.
    """

    def __init__(self, process: asyncio.subprocess.Process, ready_fd: int) -> None:
        self._process = process
        self._ready_fd = ready_fd

    @classmethod
    async def spawn(cls, argv: tuple[str, ...], *, env: Mapping[str, str]) -> "Child":
        """Start `python ARGV... --ready-fd N`."""
        read_fd, write_fd = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid())),
                *(sys.executable, *argv, "--ready-fd", str(write_fd)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                pass_fds=(write_fd,),
                # A group of its own, so that a terminal's Ctrl-C is ours to pass on; no session of
                # its own: Linux shares cores by session first (autogroup), and lets threads that
                # pass tokens on wait 100 ms behind one that computes in another session.
                process_group=0,
                env=dict(env),
            )
        except BaseException:
            os.close(read_fd)
            raise
        finally:
            os.close(write_fd)
        return cls(process, read_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def live(
        self, *, on_line: Callable[[str], None], on_ready: Callable[[Address], None]
    ) -> int:
        """Wait for its end and return its exit status, negative for a signal."""
        words = asyncio.create_task(self._forward(on_line))
        ready = asyncio.create_task(self._announce(on_ready))
        try:
            status = await self._process.wait()
            await asyncio.wait({words, ready}, timeout=_LAST_WORDS_S)
            return status
        finally:
            for task in (words, ready):
                task.cancel()
            await asyncio.gather(words, ready, return_exceptions=True)

    async def _forward(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        async for line in _lines(self._process.stdout):
            on_line(line)

    async def _announce(self, on_ready: Callable[[Address], None]) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(self._ready_fd, "rb")
        )
        try:
            if line := await reader.readline():
                said = json.loads(line)
                on_ready(Address(grpc=said["grpc"], http=said.get("http", "")))
        finally:
            transport.close()


async def _lines(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """Lines without their newline; a longer one than the bound comes in pieces."""
    rest = b""
    while chunk := await reader.read(_MAX_LINE_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
        if len(rest) > _MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")
