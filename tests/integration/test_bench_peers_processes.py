"""Foreign programs under measurement: they start, are weighed, and are gone afterwards."""

import os
import sys

import pytest

from kvrelay.bench.peers import processes
from kvrelay.bench.peers.install import PeerFailed

PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
child.wait()
"""
DYING = "import sys; print('no such model', file=sys.stderr); sys.exit(3)"


async def test_no_process_of_a_system_is_left(tmp_path):
    """
    Children are found, weighed and ended with their parent, though nobody tells them to.
    """
    log = tmp_path / "log"
    argv = (sys.executable, "-c", PARENT)
    async with processes.running(argv, env={}, log=log, has_word=True) as process:
        child = int(await processes.line_of(process, within_s=60.0, log=log))
        tree = processes.tree_of(process.pid)
        memory = processes.memory_of(tree)

    assert [pid.number for pid in tree] == [process.pid, child]
    assert memory.rss_num_bytes >= memory.pss_num_bytes > 0
    assert not [pid for pid in tree if pid in processes.tree_of(pid.number)]


async def test_a_system_that_dies_tells_its_last_words(tmp_path):
    """
    The reason is in the error, not only in a log.
    """
    log = tmp_path / "log"
    argv = (sys.executable, "-c", DYING)
    async with processes.running(argv, env={}, log=log, has_word=True) as process:
        with pytest.raises(PeerFailed, match=r"status 3 .* no such model"):
            await processes.line_of(process, within_s=60.0, log=log)


async def test_a_foreign_server_that_dies_is_not_waited_for(tmp_path):
    """
    Its end is noticed long before the limit for its start.
    """
    log = tmp_path / "log"
    argv = (sys.executable, "-c", DYING)
    async with processes.running(argv, env={}, log=log, has_word=False) as process:
        with pytest.raises(PeerFailed, match="no such model"):
            await processes.answers(process, "127.0.0.1:1", within_s=60.0, log=log)


async def test_all_threads_of_a_named_process_go_to_one_core(tmp_path):
    """
    Only of that one; its parent may go on everywhere.
    """
    core = max(os.sched_getaffinity(0))
    log = tmp_path / "log"
    script = "import signal; print('up', flush=True); signal.pause()"
    argv = (sys.executable, "-c", script, "the-one")
    async with processes.running(argv, env={}, log=log, has_word=True) as process:
        await processes.line_of(process, within_s=60.0, log=log)
        tree = processes.tree_of(process.pid)

        assert processes.confine(tree, "the-one", core) == 1
        assert processes.confine(tree, "another", core) == 0
        assert os.sched_getaffinity(process.pid) == {core}
