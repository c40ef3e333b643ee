"""`kvrelay up`: a deployment in the foreground, until it is told to stop."""

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.status import Status

from kvrelay.cli import model as models
from kvrelay.cli import target
from kvrelay.clock import MonotonicClock
from kvrelay.errors import ServingError
from kvrelay.store.manifest import cache_dir
from kvrelay.supervise import logs
from kvrelay.supervise.deployment import Deployment, PortTaken
from kvrelay.supervise.keeper import Event, ProcessFailed
from kvrelay.supervise.topology import Topology, threads_of_each

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Transport(StrEnum):
    """How KV travels."""

    AUTO = "auto"
    SHM = "shm"
    STREAM = "stream"


class Disaggregate(StrEnum):
    """When a request's prompt goes to a prefill worker."""

    ALWAYS = "always"
    AUTO = "auto"
    NEVER = "never"


class Dtype(StrEnum):
    """What weights and KV are kept in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


def up(
    model: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="A pulled model, or a model directory.")
    ] = models.DEFAULT,
    prefill: Annotated[int, typer.Option(min=0, max=64, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode workers.")] = 1,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The coordinator's gRPC port; 0 picks one.")
    ] = 50051,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The OpenAI-style HTTP port; 0 picks one.")
    ] = 8000,
    transport: Annotated[Transport, typer.Option(help="How KV travels.")] = Transport.AUTO,
    disaggregate: Annotated[
        Disaggregate, typer.Option(help="When prompts go to prefill workers.")
    ] = Disaggregate.AUTO,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and KV. Default: the workers'.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each worker. Default: the cores, shared out.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Token slots of a KV block. Default: the workers'.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV blocks of each worker. Default: the workers'.")
    ] = None,
    drain_s: Annotated[
        float, typer.Option(min=0, help="Longest wait for running requests at the end.")
    ] = 30.0,
    log_dir: Annotated[
        Path | None, typer.Option(help="Where logs go. Default: ~/.cache/kvrelay/logs/...")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the processes' logs on stderr too.")
    ] = False,
) -> None:
    """Start a coordinator and its workers on this machine, and keep them alive."""
    console = Console(stderr=True, highlight=False)
    cores = len(os.sched_getaffinity(0))
    try:
        topology = Topology(
            model=models.ensure(model, console=console),
            num_prefill=prefill,
            num_decode=decode,
            num_threads=threads or threads_of_each(cores, prefill + decode),
            transport=transport.value,
            disaggregate=disaggregate.value,
            dtype=dtype.value if dtype else None,
            block_size=block_size,
            num_blocks=num_blocks,
            drain_s=drain_s,
        )
        screen = Screen(console, is_verbose=verbose)
        run = _up(topology, grpc_port, http_port, make_log_dir(log_dir), screen)
        raise typer.Exit(asyncio.run(run))
    except (ServingError, PortTaken) as error:
        target.fail(str(error))
    except OSError as error:
        target.fail(f"logs: {error}")


def make_log_dir(chosen: Path | None) -> Path:
    """The directory for this run's logs."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        return chosen
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    return logs.make_run_dir(cache_dir() / "logs", name)


def make_deployment(
    topology: Topology, *, grpc_port: int, http_port: int, log_dir: Path, screen: "Screen"
) -> Deployment:
    """A deployment on loopback that reports to `screen`."""
    return Deployment(
        topology,
        listen=f"127.0.0.1:{grpc_port}",
        http_listen=f"127.0.0.1:{http_port}",
        log_dir=log_dir,
        clock=MonotonicClock(),
        jitter=random.Random().random,
        on_event=screen.show,
    )


@dataclass(slots=True)
class Screen:
    """What a person sees while processes come and go. All of it on stderr."""

    console: Console
    is_verbose: bool = False
    _states: dict[str, str] = field(default_factory=dict)
    _status: Status | None = None

    def begin(self, topology: Topology) -> None:
        """Start the live line, on a terminal."""
        names = ["coordinator", *(f"{role}-{i}" for role, i in topology.workers)]
        self._states = dict.fromkeys(names, "")
        if self.console.is_terminal:
            self._status = self.console.status("starting")
            self._status.start()

    def end(self) -> None:
        """The live line has nothing more to say."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, line: str) -> None:
        """One line for a person."""
        self.console.print(line, markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        """Take an event of a process."""
        if event.kind == "said":
            if self.is_verbose or logs.is_loud(event.text):
                self.say(f"{event.name} | {logs.for_people(event.text)}")
            return
        if event.kind == "died":
            self.say(f"{event.name} {event.text}")
        self._states[event.name] = event.kind
        if self._status is not None:
            self._status.update(self._summary())

    def _summary(self) -> str:
        listening = [name for name, state in self._states.items() if state == "listening"]
        if len(listening) == len(self._states):
            return "waiting for a canary request to cross the pool"
        waiting = ", ".join(name for name in self._states if name not in listening)
        return f"{len(listening)} of {len(self._states)} listening, loading {waiting}"


async def _up(
    topology: Topology, grpc_port: int, http_port: int, log_dir: Path, screen: Screen
) -> int:
    """Run until a signal; the exit status."""
    stopped, hurried = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurried if stopped.is_set() else stopped).set()

    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    deployment = make_deployment(
        topology, grpc_port=grpc_port, http_port=http_port, log_dir=log_dir, screen=screen
    )
    screen.begin(topology)
    failure: ProcessFailed | None = None
    try:
        await _serve_until(stopped, deployment, screen)
    except ProcessFailed as error:
        failure = error
    finally:
        screen.end()
        if stopped.is_set():
            screen.say("draining; Ctrl-C again stops at once")
        is_clean = await _drain(deployment, hurried)
    if failure is not None:
        explain_failure(failure, log_dir, screen)
    return 0 if is_clean and failure is None else 1


async def _serve_until(stopped: asyncio.Event, deployment: Deployment, screen: Screen) -> None:
    """Start and announce the deployment; returns when asked to stop, be it ready or not."""
    starting = asyncio.create_task(deployment.start())
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            ready = starting.result()
            screen.end()
            print(ready, flush=True)
            await stopping
    finally:
        for task in (starting, stopping):
            task.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


async def _drain(deployment: Deployment, hurried: asyncio.Event) -> bool:
    """End every process; at once if hurried. False if one had to be killed."""
    draining = asyncio.create_task(deployment.drain())
    hurrying = asyncio.create_task(hurried.wait())
    await asyncio.wait({draining, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    if hurrying.done():
        deployment.kill()
    hurrying.cancel()
    return await draining and not hurried.is_set()


def explain_failure(failure: ProcessFailed, log_dir: Path, screen: Screen) -> None:
    """Say which process failed, and of its last words those not yet shown."""
    for line in failure.tail:
        if not (screen.is_verbose or logs.is_loud(line)):
            screen.say(f"{failure.name} | {logs.for_people(line)}")
    screen.say(f"error: {failure}; its log: {log_dir / failure.name}.log")
