"""The committed stubs are those of the protos, and the protos are clean."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos"
STUBS = Path("kvrelay/v1")


def test_committed_stubs_are_what_the_protos_give(tmp_path):
    """
    Generating again changes no byte, adds no file and leaves none behind.
    """
    env = os.environ | {"PYTHON": sys.executable}
    subprocess.run([PROTOS / "generate.sh", tmp_path], env=env, check=True, capture_output=True)

    fresh = {path.name: path.read_text() for path in (tmp_path / STUBS).iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / STUBS).glob("*.py*")}
    differing = {name for name in fresh | committed if fresh.get(name) != committed.get(name)}

    assert not differing, "run: make protos"


def test_the_protos_are_clean():
    """
    buf's standard rules hold, and everything is documented.
    """
    buf = Path(sys.executable).with_name("buf")
    done = subprocess.run([buf, "lint"], cwd=PROTOS, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
