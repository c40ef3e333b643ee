"""`kvrelay up`: a deployment in the foreground, until it is told to stop."""

import asyncio
import os
import random
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import typer
from rich.console import Console
from rich.status import Status

from kvrelay.cli.pull import shown
from kvrelay.cli.target import INTERRUPTED, fail
from kvrelay.clock import MonotonicClock
from kvrelay.errors import ModelInvalid, ServingError
from kvrelay.store.catalog import KNOWN_MODELS
from kvrelay.store.manifest import cache_dir, models_dir
from kvrelay.store.pull import ensure
from kvrelay.supervise import logs
from kvrelay.supervise.deployment import Deployment
from kvrelay.supervise.keeper import Event, ProcessFailed
from kvrelay.supervise.ports import PortTaken
from kvrelay.supervise.topology import Topology

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(
    topology: Topology, *, grpc_port: int, http_port: int, log_dir: Path | None, is_verbose: bool
) -> None:
    """Serve in the foreground; ends the command with its exit status."""
    screen = Screen(Console(stderr=True, highlight=False), is_verbose=is_verbose)
    try:
        topology = with_model(topology, screen.console)
        run = _up(topology, grpc_port, http_port, make_log_dir(log_dir), screen)
        raise typer.Exit(asyncio.run(run))
    except (ServingError, PortTaken) as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def with_model(topology: Topology, console: Console) -> Topology:
    """The same topology, its model being a directory; fetched or converted first if need be.

    Raises:
        ModelInvalid: there is no such model, or it is damaged.
        PeerUnavailable: it could not be downloaded.
    """
    _refuse_unknown(topology.model)
    with shown(console) as progress:
        return replace(topology, model=str(ensure(topology.model, progress)))


def _refuse_unknown(model: str) -> None:
    path = Path(model).expanduser()
    if model in KNOWN_MODELS or (models_dir() / model).is_dir() or (model and path.exists()):
        return
    known = ", ".join(KNOWN_MODELS)
    raise ModelInvalid(
        model,
        f"no such model; known: {known}; or a .gguf file or a Hugging Face directory that exists",
    )


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
    is_ending: bool = False
    _states: dict[str, str] = field(default_factory=dict)
    _died_at_s: dict[str, float] = field(default_factory=dict)
    """When each process that is away died first."""

    _status: Status | None = None

    def begin(self, topology: Topology) -> None:
        """Start the live line, on a terminal."""
        names = ["coordinator", *(f"{role}-{i}" for role, i in topology.workers)]
        self._states = dict.fromkeys(names, "")
        if self.console.is_terminal:
            self._status = self.console.status("starting")
            self._status.start()

    def settle(self) -> None:
        """The live line has nothing more to say."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def say(self, line: str) -> None:
        """One line for a person, if there still is one: the terminal may be gone."""
        with suppress(OSError):
            self.console.print(line, markup=False, soft_wrap=True)

    def show(self, event: Event) -> None:
        """Take an event of a process."""
        if event.kind == "said":
            if self.is_verbose or logs.is_loud(event.text, is_ending=self.is_ending):
                self.say(f"{event.name} | {logs.for_people(event.text)}")
            return
        if event.kind == "died":
            self._died_at_s.setdefault(event.name, time.monotonic())
            self.say(f"{event.name} {event.text}")
        elif event.kind == "listening" and event.name in self._died_at_s:
            away_s = time.monotonic() - self._died_at_s.pop(event.name)
            self.say(f"{event.name} is back after {away_s:.1f} s")
        self._states[event.name] = event.kind
        if self._status is not None:
            with suppress(OSError):
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
        if screen.console.is_terminal:
            screen.say("")  # the terminal wrote ^C where it was
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
        await _serve_until(stopped, deployment, screen, log_dir)
    except ProcessFailed as error:
        failure = error
    finally:
        screen.settle()
        screen.is_ending = True
        if stopped.is_set():
            running = _requests(await deployment.active_requests())
            screen.say(f"draining{running}; Ctrl-C again stops at once")
        is_clean = await _drain(deployment, hurried)
    if failure is not None:
        explain_failure(failure, log_dir, screen)
    elif stopped.is_set():
        screen.say("stopped")
    return 0 if is_clean and failure is None else 1


def _requests(number: int | None) -> str:
    if number is None:
        return ""
    return f": {number} request{'' if number == 1 else 's'} still running"


async def _serve_until(
    stopped: asyncio.Event, deployment: Deployment, screen: Screen, log_dir: Path
) -> None:
    """Start and announce the deployment; returns when asked to stop, be it ready or not."""
    starting = asyncio.create_task(deployment.start())
    stopping = asyncio.create_task(stopped.wait())
    try:
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            ready = starting.result()
            screen.settle()
            print(ready, flush=True)
            if screen.console.is_terminal:
                screen.say(f"Ctrl-C drains and ends it; logs: {log_dir}")
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
