"""The promises are really what these tests test: without what keeps one of them, they fail.

The product is copied, one line of the copy is changed, and the part of the suite that should tell
is run against it.
"""

import asyncio
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]
TREES = ("kvrelay", "coordinator", "prefill_svc", "decode_svc", "tests")
FENCE = "tests/chaos/test_fence.py::test_a_hold_that_lapsed_before_the_fence_is_lost"
CORRUPTION = (
    "tests/chaos/test_corruption.py"
    "::test_every_corruption_is_caught_and_no_clean_handoff_is_refused"
)
STEP = "tests/chaos/test_protocol_matrix.py::test_whatever_happens_the_tokens_are_right"
SUITE = (f"{FENCE}[shm]", f"{FENCE}[stream]", f"{CORRUPTION}[shm]", f"{STEP}[outputs-twice]")
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


NO_FENCE_HERE = Edit(
    "decode_svc/landing.py",
    "is_same = landing.transport.still(landing.hold, blocks)",
    "is_same = landing.transport.still(landing.hold, blocks) or True",
)
NO_FENCE_THERE = Edit(
    "kvrelay/handoff/holds.py",
    "hold = self.find(handoff_id, puller_id)",
    "hold = self._holds.get(handoff_id)\n        if hold is None:\n            return None",
)
NO_DIGESTS = Edit(
    "decode_svc/intake.py",
    "self.digests[index] != self._measured.pop(index)",
    "self._measured.pop(index) < 0",
)
NO_BINDING = Edit("decode_svc/intake.py", "if digest != self.completion.digest:", "if not digest:")
NO_ORDER = Edit(
    "coordinator/inbox.py",
    "news.position == self._next and not self._early",
    "not self._early",
)
AT_ONCE = Edit("tests/conftest.py", "SETTLE_S = 5.0", "SETTLE_S = 0.1")
"""A test that failed leaves something behind; waiting for that would tell us nothing."""


async def outcome(root: Path, tests: Sequence[str]) -> tuple[int, str]:
    """Exit status and words of tests, run against the product at `root`."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests),
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
    status, said = await outcome(tmp_path, SUITE)
    assert status == 0, said


@pytest.mark.parametrize(
    ("edit", "test"),
    [
        pytest.param(NO_FENCE_HERE, f"{FENCE}[shm]", id="without-the-fence-in-shared-memory"),
        pytest.param(NO_FENCE_THERE, f"{FENCE}[stream]", id="without-the-fence-at-the-holder"),
        pytest.param(NO_DIGESTS, f"{CORRUPTION}[shm]", id="without-the-blocks-digests"),
        pytest.param(NO_BINDING, f"{CORRUPTION}[shm]", id="without-the-digest-over-all"),
        pytest.param(NO_ORDER, f"{STEP}[outputs-twice]", id="without-order-at-the-coordinator"),
    ],
)
async def test_the_suite_fails(edit, test, tmp_path):
    """
    The very test fails that is about what is missing.
    """
    copy_to(tmp_path)
    edit.make(tmp_path)
    AT_ONCE.make(tmp_path)
    status, said = await outcome(tmp_path, [test])
    assert status == 1, said
    assert f"FAILED {test}" in said, said
