"""What becomes of the words of child processes."""

import json
import os

import pytest

from kvrelay.supervise import logs
from kvrelay.supervise.logs import LogFile, for_people, is_loud, make_run_dir


@pytest.mark.parametrize(
    ("line", "loud"),
    [
        (json.dumps({"event": "handoff.pulled", "level": "info"}), False),
        (json.dumps({"event": "worker.lost", "level": "warning"}), True),
        (json.dumps({"event": "rpc.bug", "level": "error"}), True),
        ("Traceback (most recent call last):", True),
        ("{not json", True),
        ("I1120 05:01:05.191388 1721 chttp2_transport.cc:1403] Got goaway", False),
        ("E1120 05:01:05.191388 1721 tcp_server.cc:12] no such thing", True),
        ("   ", False),
    ],
)
def test_warnings_errors_and_strange_lines_are_loud(line, loud):
    """
    An event below warning stays in the file; whatever is no event is shown.
    """
    assert is_loud(line) is loud


def test_warnings_are_quiet_at_the_end():
    """
    Processes that miss each other while all of them stop are no news; errors still are.
    """
    warning = json.dumps({"event": "pool.not_joined", "level": "warning"})
    error = json.dumps({"event": "rpc.bug", "level": "error"})

    assert not is_loud(warning, is_ending=True)
    assert is_loud(error, is_ending=True)


def test_an_event_reads_as_a_sentence():
    """
    Level, event and its fields; what the prefix already says is left out.
    """
    line = json.dumps(
        {"event": "worker.lost", "level": "warning", "worker_id": "decode-0", "peer": "decode-1"}
    )

    assert for_people(line) == "warning worker.lost peer=decode-1"


def test_a_full_file_makes_room(tmp_path, monkeypatch):
    """
    A log never takes more than twice its bound, and the newest lines are in it.
    """
    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 100)
    log = LogFile(tmp_path / "a.log")
    for i in range(50):
        log.write(f"line {i:04}")
    log.close()

    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert len(sizes) == 2
    assert max(sizes) <= 100
    assert (tmp_path / "a.log").read_text().endswith("line 0049\n")


def test_only_the_newest_runs_are_kept(tmp_path, monkeypatch):
    """
    A new run removes the oldest beyond the bound, but none whose process still lives.
    """
    monkeypatch.setattr(logs, "MAX_RUNS", 3)
    for name in ("1-1", "2-999999999", "3-999999999", "4-999999999"):
        make_run_dir(tmp_path, name)

    kept = {path.name for path in tmp_path.iterdir()}

    assert kept == {"1-1", "3-999999999", "4-999999999"}


def test_a_full_disk_costs_words_and_nothing_else(tmp_path):
    """
    Lines that cannot be written are dropped and counted, and the next one is tried again.
    """
    log = LogFile(tmp_path / "thing.log")
    log.write("kept")
    disk = os.dup(log._file.fileno())
    with open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), log._file.fileno())
    log.write("dropped")
    os.dup2(disk, log._file.fileno())
    os.close(disk)
    log.write("kept again")
    log.close()

    assert log.num_dropped == 1
    assert log.path.read_text() == "kept\nkept again\n"
    assert list(log.tail) == ["kept", "dropped", "kept again"]
