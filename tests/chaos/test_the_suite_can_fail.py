"""The fence and the digest are really what these tests test: without either, they fail.

The product is copied, one line of the copy is changed, and a part of the suite is run against it.
"""

import asyncio
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
TREES = ("kvrelay", "coordinator", "prefill_svc", "decode_svc", "tests")
SUITE = ("tests/chaos/test_fence.py", "tests/chaos/test_corruption.py", "-k", "shm or stream")
RUN_WITHIN_S = 150.0


@dataclass(frozen=True, slots=True)
class Edit:
    """A line of the product, and what it is to be instead."""

    path: str
    line: str
    instead: str

    def make(self, root: Path) -> None:
        file = root / self.path
        source = file.read_text()
        assert source.count(self.line) == 1, f"{self.path} has no longer one {self.line!r}"
        file.write_text(source.replace(self.line, self.instead))


NO_FENCE = Edit(
    "decode_svc/landing.py",
    "is_same = landing.transport.still(landing.hold, blocks)",
    "is_same = landing.transport.still(landing.hold, blocks) or True",
)
NO_DIGEST = Edit(
    "decode_svc/intake.py",
    "self.digests[index] != self._measured.pop(index)",
    "self._measured.pop(index) < 0",
)


async def outcome(root: Path) -> tuple[int, str]:
    """Exit status and words of the suite, run against the product at `root`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *SUITE),
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "FUZZ_SHARE": "8"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(RUN_WITHIN_S):
        said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


def copy_to(root: Path) -> None:
    for tree in TREES:
        shutil.copytree(ROOT / tree, root / tree, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)


async def test_the_suite_passes_as_it_is(tmp_path):
    """
    The copy is what was copied, so the suite has nothing to say.
    """
    copy_to(tmp_path)
    status, said = await outcome(tmp_path)
    assert status == 0, said


@pytest.mark.parametrize(
    ("edit", "failing"),
    [
        (NO_FENCE, "test_a_hold_that_lapsed_before_the_fence_is_lost"),
        (NO_DIGEST, "test_every_corruption_is_caught_and_no_clean_handoff_is_refused"),
    ],
    ids=["without-the-fence", "without-the-digest"],
)
async def test_the_suite_fails(edit, failing, tmp_path):
    """
    It names the very test that is about what is missing.
    """
    copy_to(tmp_path)
    edit.make(tmp_path)
    status, said = await outcome(tmp_path)
    assert status == 1, said
    assert f"FAILED {SUITE[0]}::{failing}" in said or f"FAILED {SUITE[1]}::{failing}" in said, said
