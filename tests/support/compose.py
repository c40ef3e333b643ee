"""Runs services of compose.yaml as local processes, from the file's own words.

What Docker would do and this does in its place: a service's name is its address, here a port
of loopback that stands for the container's; `${NAME:-default}` is filled in; the image's
`python` and `kvrelay` are this interpreter.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

COMPOSE_DIR = Path(__file__).parents[2] / "compose"

_PROGRAMS = {
    "python": (sys.executable,),
    "kvrelay": (sys.executable, "-m", "kvrelay.cli.app"),
}
_VARIABLE = re.compile(r"\$\{(\w+):-([^}]*)\}")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9-]*|0\.0\.0\.0|127\.0\.0\.1):(\d+)\b")


def read_compose() -> dict[str, Any]:
    """The file as it stands, anchors resolved."""
    tree: dict[str, Any] = yaml.safe_load((COMPOSE_DIR / "compose.yaml").read_text())
    return tree


def started_by_up(profiles: Iterable[str] = ()) -> set[str]:
    """The services that `docker compose [--profile ...] up` starts.

    Those without a profile and those with one that is active. Given profiles replace the ones
    of COMPOSE_PROFILES, which `.env` beside the file sets.
    """
    default = dict(
        line.split("=", 1)
        for line in (COMPOSE_DIR / ".env").read_text().splitlines()
        if line and not line.startswith("#")
    )
    active = set(profiles) or set(default["COMPOSE_PROFILES"].split(","))
    services = read_compose()["services"]
    return {
        name
        for name, spec in services.items()
        if not spec.get("profiles") or active & set(spec["profiles"])
    }


@dataclass(slots=True)
class LocalCompose:
    """Each service at most once. Use as a context manager, which kills what is left."""

    services: Mapping[str, Any]
    variables: Mapping[str, str]
    _ports: dict[tuple[str, int], int] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "LocalCompose":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, service: str) -> subprocess.Popen[bytes]:
        """Start a service's command in its environment."""
        words = self._command(service)
        process = subprocess.Popen(words, env=self._environment(service), stdin=subprocess.DEVNULL)
        self._stack.callback(_kill, process)
        return process

    def run(self, service: str) -> subprocess.CompletedProcess[str]:
        """Run a one-shot service to its end."""
        return self._run(self._command(service), service)

    def is_healthy(self, service: str) -> bool:
        """What the service's own healthcheck says now."""
        kind, *test = self.services[service]["healthcheck"]["test"]
        assert kind == "CMD"
        return self._run(self._local(test, service), service).returncode == 0

    def port(self, service: str, container_port: int) -> int:
        """The local port that stands for the container's."""
        key = (service, container_port)
        if key not in self._ports:
            self._ports[key] = _free_port()
        return self._ports[key]

    def _run(self, words: list[str], service: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, env=self._environment(service), capture_output=True, text=True, timeout=120
        )

    def _command(self, service: str) -> list[str]:
        spec = self.services[service]
        return self._local([*spec.get("entrypoint", ()), *spec["command"]], service)

    def _environment(self, service: str) -> dict[str, str]:
        given = self.services[service].get("environment", {})
        return {**os.environ, **{k: self._here(v, service) for k, v in given.items()}}

    def _local(self, words: list[str], service: str) -> list[str]:
        program, *rest = words
        return [*_PROGRAMS[program], *(self._here(word, service) for word in rest)]

    def _here(self, text: str, service: str) -> str:
        filled = _VARIABLE.sub(lambda m: self.variables.get(m[1]) or m[2], text)

        def address(match: re.Match[str]) -> str:
            host, port = match[1], int(match[2])
            owner = service if host in ("0.0.0.0", "127.0.0.1") else host
            assert owner in self.services, f"{service} names an unknown host: {match[0]}"
            return f"127.0.0.1:{self.port(owner, port)}"

        return _ADDRESS.sub(address, filled)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
