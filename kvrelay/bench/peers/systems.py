"""The systems that are compared: how each is started, when it is ready, and how it is asked."""

import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kvrelay.bench.base import Source
from kvrelay.bench.peers import processes
from kvrelay.bench.peers.install import PeerFailed
from kvrelay.bench.peers.processes import Memory, Pid
from kvrelay.bench.sources import GrpcSource, HttpSource
from kvrelay.client import Client

START_LIMIT_S = 300.0

_LLAMA_SERVER = Path(__file__).with_name("llama_server.py")  # imports what is not here

LLAMA_CPP_SLOTS = 16
LLAMA_CPP_SLOT_TOKENS = 2048
"""Above the longest prompt and output of the work."""

VLLM_MAX_TOKENS = 4096
VLLM_KV_GIB = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One that can be started here."""

    name: str
    title: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    """Where it serves HTTP. Empty: it is kvrelay, and says so itself."""

    prefill_core: int | None = None
    """The only core of the prefill worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """One that runs."""

    http: str
    grpc: str
    """Empty: it speaks HTTP only."""

    start_s: float
    """From its start until it was ready, by its own word."""

    tree: tuple[Pid, ...]

    def memory(self) -> Memory:
        return processes.memory_of(self.tree)

    @asynccontextmanager
    async def source(self, *, is_http: bool) -> AsyncIterator[Source]:
        """A way to it: its own protocol, or HTTP."""
        if is_http or not self.grpc:
            source = HttpSource(self.http)
            await source.served()
            yield source
            return
        async with Client(self.grpc) as client:
            yield GrpcSource(client)


def kvrelay(name: str, model: Path, log_dir: Path, *, is_one_core: bool = False) -> System:
    """`kvrelay up` with a prefill and a decode worker."""
    argv = (
        sys.executable,
        "-m",
        "kvrelay.cli.app",
        "up",
        "--model",
        str(model),
        "--log-dir",
        str(log_dir),
    )
    ports = ("--grpc-port", "0", "--http-port", "0", "--drain-s", "5")
    if not is_one_core:
        return System(name=name, title="kvrelay", argv=(*argv, *ports))
    return System(
        name=name,
        title="kvrelay, 1 core",
        argv=(*argv, *ports, "--threads", "1"),
        prefill_core=max(os.sched_getaffinity(0)),
    )


def vllm(
    name: str, python: Path, model: Path, cache: Path, *, has_all_cores: bool = False
) -> System:
    """vLLM's OpenAI-style server, started by its module: its script looks for the metadata of
    another package.
    """
    port = _free_port()
    env = {
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GIB),
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    if has_all_cores:
        env["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        env["LD_PRELOAD"] = str(python.parent.parent / "lib" / "libiomp5.so")
    return System(
        name=name,
        title="vLLM-CPU, all cores" if has_all_cores else "vLLM-CPU",
        argv=(
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--dtype", "bfloat16", "--max-model-len", str(VLLM_MAX_TOKENS)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ),
        env=env,
        address=f"127.0.0.1:{port}",
    )


def llama_cpp(name: str, python: Path, gguf: Path) -> System:
    """llama.cpp's server, with a slot for every client."""
    port, num_threads = _free_port(), len(os.sched_getaffinity(0))
    numbers = (port, LLAMA_CPP_SLOTS, LLAMA_CPP_SLOT_TOKENS, num_threads)
    return System(
        name=name,
        title="llama.cpp",
        argv=(str(python), str(_LLAMA_SERVER), str(gguf), *map(str, numbers)),
        address=f"127.0.0.1:{port}",
    )


@asynccontextmanager
async def serving(system: System, log: Path) -> AsyncIterator[Serving]:
    """`system`, ready, and ended afterwards.

    Raises:
        PeerFailed: it did not become ready.
    """
    began_s = time.monotonic()
    http, grpc = system.address, ""
    running = processes.running(system.argv, env=system.env, log=log, has_word=not http)
    async with running as process:
        if http:
            await processes.answers(process, http, within_s=START_LIMIT_S, log=log)
        else:
            line = await processes.line_of(process, within_s=START_LIMIT_S, log=log)
            said = dict(word.partition("=")[::2] for word in line.split()[1:])
            http, grpc = said["http"], said["grpc"]
        start_s = time.monotonic() - began_s
        tree = tuple(processes.tree_of(process.pid))
        if system.prefill_core is not None and not processes.confine(
            tree, "prefill_svc", system.prefill_core
        ):
            raise PeerFailed("no prefill worker to confine to one core")
        yield Serving(http=http, grpc=grpc, start_s=start_s, tree=tree)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
