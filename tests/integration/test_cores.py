"""Workers of one machine see each other compute: real locks, real processes, real threads."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from kvrelay.config import SettingsError
from kvrelay.engine.batch import Path, Rows
from kvrelay.types import BlockId, Role
from kvrelay.worker import cores
from kvrelay.worker.cores import CoreShare, SharingRunner, quotas, runtime_dir
from tests.support.builders import prompt, request, running_engine
from tests.support.clock import ManualClock

NEIGHBOUR = """
import sys
from pathlib import Path
from kvrelay.types import Role
from kvrelay.worker.cores import CoreShare
share = CoreShare.join(Role.PREFILL, limit=0, directory=Path(sys.argv[1]))
share.busy(True)
print("busy", flush=True)
sys.stdin.readline()
"""


@contextmanager
def joined(directory, *roles, num_cores=4, limit=0):
    """Shares of workers on a machine that has `num_cores`, whatever this one has."""
    shares = [CoreShare.join(role, limit=limit, directory=directory) for role in roles]
    for share in shares:
        share.num_cores = num_cores
    try:
        yield shares
    finally:
        for share in shares:
            share.close()


def test_who_computes_alone_uses_all_cores(tmp_path):
    """Workers that wait take nothing away, and one that is done gives back."""
    with joined(tmp_path, Role.DECODE, Role.PREFILL) as (decode, prefill):
        decode.busy(True)
        assert decode.threads() == 4
        prefill.busy(True)
        assert (decode.threads(), prefill.threads()) == (2, 2)
        decode.busy(False)
        assert prefill.threads() == 4


def test_spare_cores_are_for_those_who_decode(tmp_path):
    """Whoever joined first."""
    with joined(tmp_path, Role.PREFILL, Role.DECODE, num_cores=3) as (prefill, decode):
        prefill.busy(True)
        decode.busy(True)

        assert (prefill.threads(), decode.threads()) == (1, 2)


@pytest.mark.parametrize("num_cores", [1, 2, 5, 8, 11])
def test_many_workers_use_each_core_once(tmp_path, num_cores):
    """Five that compute, among three that wait."""
    roles = [Role.PREFILL, Role.DECODE] * 4
    with joined(tmp_path, *roles, num_cores=num_cores) as shares:
        computing = [shares[i] for i in (0, 2, 3, 5, 7)]
        for share in computing:
            share.busy(True)

        assert sum(share.threads() for share in computing) == max(num_cores, 5)


def test_nothing_is_stale_after_a_worker_was_killed(tmp_path):
    """The kernel takes its mark and its slot away with it."""
    with joined(tmp_path, Role.DECODE, num_cores=2) as (share,):
        neighbour = subprocess.Popen(
            [sys.executable, "-c", NEIGHBOUR, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with neighbour:
            assert neighbour.stdout.readline() == b"busy\n"
            assert share.threads() == 1
            neighbour.send_signal(signal.SIGKILL)
            neighbour.wait()
        assert share.threads() == 2


def test_slots_are_used_again_and_bounded(tmp_path, monkeypatch):
    """A role has so many places; one that is given up is free."""
    monkeypatch.setattr(cores, "SLOTS_PER_ROLE", 2)
    with joined(tmp_path, Role.DECODE, Role.DECODE) as (first, _):
        with pytest.raises(SettingsError, match="2 decode workers"):
            CoreShare.join(Role.DECODE, limit=0, directory=tmp_path)
        first.close()
        with joined(tmp_path, Role.DECODE):
            pass


def test_where_nobody_can_be_seen_all_cores_are_ours(tmp_path):
    """A directory that is not there is no reason not to compute."""
    with joined(tmp_path / "none", Role.DECODE, Role.PREFILL, limit=3) as (decode, prefill):
        prefill.busy(True)

        assert decode.threads() == 3


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_directory_of_others_is_not_used(tmp_path, monkeypatch, mode):
    """Who could write there could make us slow."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    runtime_dir().chmod(mode)

    with pytest.raises(PermissionError):
        runtime_dir()


def test_quotas_of_all_groups_above_count(tmp_path):
    """Of both versions of cgroups; `max` and -1 are none."""
    groups = tmp_path / "cgroup"
    (groups / "a/b").mkdir(parents=True)
    (groups / "a/cpu.max").write_text("150000 100000\n")
    (groups / "a/b/cpu.max").write_text("max 100000\n")
    (groups / "cpu/c").mkdir(parents=True)
    (groups / "cpu/cpu.cfs_quota_us").write_text("-1\n")
    (groups / "cpu/cpu.cfs_period_us").write_text("100000\n")
    (groups / "cpu/c/cpu.cfs_quota_us").write_text("200000\n")
    (groups / "cpu/c/cpu.cfs_period_us").write_text("50000\n")
    (tmp_path / "own").write_text("4:cpu,cpuacct:/c\n3:memory:/x\n0::/a/b\n")

    assert sorted(quotas(groups, tmp_path / "own")) == [1.5, 4.0]
    assert quotas(groups, tmp_path / "missing") == []


class Resizable:
    """A runner that takes a second times the threads, and remembers how many it was given."""

    def __init__(self, clock):
        self.told = []
        self._clock = clock

    def set_threads(self, num_threads):
        self.told.append(num_threads)

    def step(self, batch):
        self._clock.advance(self.told[-1])
        return [None for _ in batch]


def rows(path):
    return [Rows(path=path, token_ids=(1,), start=0, block_table=[BlockId(0)], sample=None)]


def test_each_step_of_prompts_computes_with_its_share(tmp_path):
    """The runner is told when the number changes, and only then."""
    with joined(tmp_path, Role.DECODE, Role.PREFILL) as (decode, prefill):
        clock = ManualClock()
        runner = Resizable(clock)
        sharing = SharingRunner(runner, decode, clock)
        sharing.step(rows(Path.PROMPT))
        sharing.step(rows(Path.PROMPT))
        prefill.busy(True)
        sharing.step(rows(Path.PROMPT))
        prefill.busy(False)
        sharing.step(rows(Path.PROMPT))

    assert runner.told == [4, 2, 4]


def test_a_step_of_generated_rows_takes_less_than_its_share_if_that_is_faster(tmp_path):
    """Each number is tried, then the fastest is kept."""
    with joined(tmp_path, Role.DECODE) as (decode,):
        clock = ManualClock()
        runner = Resizable(clock)
        sharing = SharingRunner(runner, decode, clock)
        for _ in range(8):
            sharing.step(rows(Path.GENERATION))

    assert runner.told == [4, 2, 1]


class Presence:
    """What an engine said of itself."""

    def __init__(self):
        self.said = []
        self.is_idle = threading.Event()

    def busy(self, is_busy):
        if not self.said or self.said[-1] != is_busy:
            self.said.append(is_busy)
        if not is_busy and True in self.said:
            self.is_idle.set()


def test_an_engine_is_busy_from_the_first_step_to_the_last():
    """It says so before the first, and takes it back when it waits."""
    presence = Presence()
    with running_engine(presence=presence) as run:
        run.submit_all([request("s", prompt(9), max_tokens=5)])
        run.sink.wait_finished("s")
        assert presence.is_idle.wait(10.0)

    assert presence.said in ([False, True, False], [True, False])


YIELDING = """
import os, threading
from concurrent.futures import ThreadPoolExecutor
from kvrelay.worker.cores import yield_to_others

def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

def of_child():
    with ThreadPoolExecutor(1) as child:
        return child.submit(niceness).result()

with ThreadPoolExecutor(1) as computing:
    before = computing.submit(niceness).result()
    yield_to_others(3)
    print(niceness() - before, computing.submit(niceness).result() - before)
    print(computing.submit(of_child).result() - before, of_child() - before)
"""


def test_what_computes_stands_back_and_what_serves_does_not():
    """Threads that were there, and theirs; neither the main thread nor those it starts later."""
    done = subprocess.run([sys.executable, "-c", YIELDING], capture_output=True, text=True)

    most = min(3, 19 - os.getpriority(os.PRIO_PROCESS, 0))
    assert done.stdout == f"0 {most}\n{most} 0\n", done.stderr
