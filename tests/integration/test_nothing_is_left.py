"""The fixture that finds what tests leave behind, tried on tests that leave something behind."""

from pathlib import Path

import tests.conftest

LEAKS = {
    "a_thread": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "a_file": "KEPT.append(open('/dev/null'))",
    "a_socket": "KEPT.append(socket.socket())",
    "a_process": "KEPT.append(subprocess.Popen(['sleep', '60']))",
    "blocks": "engine = stuck(); KEPT.append(engine)",
}

PRELUDE = """
import asyncio, socket, subprocess, threading
import pytest
from tests.support import builders
from tests.support.clock import ManualClock
from tests.support.scripted_model import ScriptedModel
from kvrelay.engine.engine import Engine

KEPT = []


def stuck():
    scheduler = builders.scheduler()
    engine = Engine(
        runner=ScriptedModel(block_size=builders.BLOCK_SIZE),
        scheduler=scheduler,
        sink=lambda result: None,
        clock=ManualClock(),
        on_failure=lambda error: None,
    )
    scheduler.add(builders.request("a"))
    scheduler.plan()
    return engine


@pytest.fixture(scope="session", autouse=True)
def clean_up():
    yield
    for kept in KEPT:
        if isinstance(kept, subprocess.Popen):
            kept.kill()
            kept.wait()


async def test_a_task():
    asyncio.create_task(asyncio.Event().wait())
    await asyncio.sleep(0)


def test_nothing():
    pass
"""


def test_each_kind_of_leftover_fails_the_test_that_left_it(pytester, monkeypatch):
    """
    A check that cannot fail would prove nothing of all the tests it watches over.
    """
    conftest = Path(tests.conftest.__file__).read_text()
    pytester.makeconftest(conftest.replace("SETTLE_S = 5.0", "SETTLE_S = 0.2"))
    leaks = "".join(f"\ndef test_{name}():\n    {leak}\n" for name, leak in LEAKS.items())
    pytester.makepyfile(PRELUDE + leaks)
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(tests.conftest.__file__).parents[1]))

    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")

    # What is left is found after the test has passed; a task, while it still runs.
    result.assert_outcomes(passed=len(LEAKS) + 1, errors=len(LEAKS), failed=1)
    result.stdout.fnmatch_lines(["*ERROR*test_blocks*", "*FAILED*test_a_task*"], consecutive=False)
