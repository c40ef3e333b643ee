"""Compiles the C++ sources, when the package is installed and when a developer asks.

Run by the build backend. Without a compiler, or for another processor, nothing is built and
the package works all the same, on torch. Standard library only: the build runs without ours.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARY = Path(__file__).parent / "_native.so"

FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=x86-64-v4",
    "-mavx512bf16",
    # What is fused is written fused: another compiler must not give other bits.
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wall",
    # GCC's own headers leave vectors undefined on purpose.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
)


def sources_digest() -> str:
    """Names what a library is built from, so that an old one is not mistaken for this one."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def build(to: Path = LIBRARY) -> str | None:
    """Compile into `to`. Returns None, or why there is nothing to load."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"no code for {sys.platform} on {platform.machine()}"
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler; install g++ and run python -m kvrelay.native.build"
    unfinished = to.with_suffix(f".{os.getpid()}")
    sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
    named = f'-DKVRELAY_SOURCES="{sources_digest()}"'
    command = [*compiler.split(), *FLAGS, named, *sources, "-o", str(unfinished)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{compiler} cannot be run: {error}"
    if done.returncode != 0:
        unfinished.unlink(missing_ok=True)
        return f"{compiler} failed:\n{done.stderr.strip()[-2000:]}"
    unfinished.replace(to)
    return None


if __name__ == "__main__":
    sys.exit(build())
