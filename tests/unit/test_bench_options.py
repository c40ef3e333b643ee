"""What `kvrelay bench` refuses before anything is dialled."""

import pytest
from typer.testing import CliRunner

from kvrelay.cli.app import app

REFUSED = {
    "a rate in a closed loop": (("--rate", "1"), "--rate goes with --mode open"),
    "an open loop without a rate": (("--mode", "open"), "--mode open needs a --rate"),
    "a picture of one point": (("--plot", "x.png"), "--plot draws rates"),
    "no mix": (("--mix", "10"), "--mix: '10' is not PROMPT:OUTPUT"),
    "no trace": (("--trace", "/nonexistent.jsonl"), "/nonexistent.jsonl"),
    "no address": (("--http", "localhost"), "is not HOST:PORT"),
    "no clients": (("--clients", "0"), "--clients"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_benchmark_that_makes_no_sense_is_a_usage_error(case, monkeypatch):
    """
    Status 2, with the option's name.
    """
    monkeypatch.setenv("COLUMNS", "200")
    arguments, named = REFUSED[case]
    done = CliRunner().invoke(app, ["bench", *arguments])

    assert done.exit_code == 2
    assert named in done.output


def test_a_trace_that_is_none_is_refused_by_its_line(tmp_path, monkeypatch):
    """
    Not skipped.
    """
    monkeypatch.setenv("COLUMNS", "200")
    path = tmp_path / "trace.jsonl"
    path.write_text('{"timestamp": 0}\n')
    done = CliRunner().invoke(app, ["bench", "--trace", str(path)])

    assert done.exit_code == 2
    assert "--trace: line 1: input_length must be" in done.output
