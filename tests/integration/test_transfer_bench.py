"""`make bench-transfer` measures every transport of this machine, and says so in a table."""

from pathlib import Path

from tests.bench import transfer


def test_every_transport_that_runs_here_is_measured(tmp_path: Path):
    """One turn of the smallest work: the figures mean nothing, the rows are there."""
    out = tmp_path / "transfer.md"
    assert transfer.main(["--repeats", "1", "--blocks", "1", "--out", str(out)]) == 0
    said = out.read_text()
    for name in transfer.TRANSPORTS:
        is_missing = transfer.why_not(name) is not None
        assert (f"{name} GB/s" in said) is not is_missing
    assert said.count("| neighbours |") == said.count("| scattered |") == 1
    assert "python -m tests.bench.transfer --repeats 1" in said
