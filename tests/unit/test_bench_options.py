"""What `kvrelay bench` refuses before anything is dialled."""

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvrelay.cli import bench
from kvrelay.cli.app import app
from tests.unit.test_bench_report import record, run

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


def test_no_seed_is_a_new_one_and_a_seed_is_kept(monkeypatch):
    """
    So that a second run does not meet the prefixes of the first, unless it is asked to.
    """
    plans = []

    async def carry_out(target, options, plan):
        plans.append(plan)

    monkeypatch.setattr(bench, "_bench", carry_out)
    for flags in ((), (), ("--seed", "7")):
        assert CliRunner().invoke(app, ["bench", *flags]).exit_code == 0

    assert plans[0].seed != plans[1].seed
    assert plans[2].seed == 7


def test_the_table_of_rates_is_whole_in_80_columns():
    """
    With numbers as long as they come.
    """
    long = run(*[record(i, scheduled_s=0.0) for i in range(3)], rate=1000.5)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(bench._sweep([long, long]))
    lines = capture.get().splitlines()

    assert len(lines) == 4
    assert "…" not in capture.get()
    assert lines[-1].split()[-1].endswith("%")
