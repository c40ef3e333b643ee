"""A peer's software in a virtual environment of its own, outside the checkout, made once.

What stands in a peer's directory is proved by a file that is written last: an installation that
broke off is made anew, and so is one of other versions.
"""

import email.parser
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvrelay.bench.peers.pins import Pin

INSTALL_TIMEOUT_S = 3600.0
"""Longest single call of pip."""

_DONE = "installed.txt"
_LAST_LINES = 3
_NAME = re.compile(r"[A-Za-z0-9._-]+")


class PeerFailed(Exception):
    """A system could not be installed, started or measured. The others may do."""


def environment(pin: Pin, root: Path, *, note: Callable[[str], None]) -> Path:
    """The Python of a virtual environment under `root` that has `pin`; made if need be.

    Raises:
        PeerFailed: pip could not do it; says where its log is.
    """
    home = root / pin.directory
    python, done = home / "bin" / "python", home / _DONE
    if done.is_file() and done.read_text() == _recipe(pin):
        return python
    note(f"installing {pin.requirement} into {home}, about {pin.num_bytes / 1e9:.1f} GB, once")
    began_s = time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    log = home / "install.log"
    _run([sys.executable, "-m", "venv", str(home)], log, pin)
    if pin.without:
        _without_some(pin, home, python, log)
    else:
        _pip(python, ["install", "--only-binary=:all:", pin.requirement], log, pin)
    done.write_text(_recipe(pin))
    note(f"{pin.requirement} is installed, after {time.monotonic() - began_s:.0f} s")
    return python


def needs(metadata: str, pin: Pin) -> list[str]:
    """The requirements in a wheel's METADATA that are wanted, as lines for pip.

    Extras are not, nor is what `pin.without` names. A local version ("+cpu") is the index's own
    business: without it, pip takes what the machine's configuration offers.
    """
    listed = email.parser.HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    return [
        re.sub(r"(==[0-9.]+)\+[a-z0-9]+", r"\1", line)
        for line in listed
        if "extra ==" not in line and _name(line) not in pin.without
    ]


def _name(requirement: str) -> str:
    match = _NAME.match(requirement)
    return match[0].lower().replace("_", "-") if match else ""


def _without_some(pin: Pin, home: Path, python: Path, log: Path) -> None:
    """The wheel's requirements but for some, then the wheel alone."""
    wheels = home / "wheel"
    download = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
    _pip(python, [*download, pin.requirement], log, pin)
    wheel = next(wheels.glob("*.whl"))
    requirements = home / "requirements.txt"
    requirements.write_text("\n".join(needs(_metadata(wheel), pin)) + "\n")
    _pip(python, ["install", "-r", str(requirements)], log, pin)
    _pip(python, ["install", "--no-deps", str(wheel)], log, pin)
    shutil.rmtree(wheels)


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return archive.read(member).decode()


def _pip(python: Path, arguments: list[str], log: Path, pin: Pin) -> None:
    quiet = ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command, *rest = arguments
    _run([str(python), "-m", "pip", command, *quiet, *rest], log, pin)


def _run(command: list[str], log: Path, pin: Pin) -> None:
    with log.open("ab") as output:
        try:
            code = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=INSTALL_TIMEOUT_S,
            ).returncode
        except subprocess.TimeoutExpired:
            raise PeerFailed(
                f"{pin.requirement}: pip took over {INSTALL_TIMEOUT_S:g} s; its log: {log}"
            ) from None
    if code != 0:
        lines = log.read_text(errors="replace").splitlines()
        said = [line.strip() for line in lines if line.startswith("ERROR")] or lines
        raise PeerFailed(
            f"{pin.requirement} could not be installed: {' '.join(said[-_LAST_LINES:])}; "
            f"the log: {log}"
        )


def _recipe(pin: Pin) -> str:
    return f"{pin.requirement}\nwithout {sorted(pin.without)}\npython {sys.version}\n"
