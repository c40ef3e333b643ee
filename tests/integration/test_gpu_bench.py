"""The device's benchmark goes all its way where there is no device, and says when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvrelay.kernels import few_rows
from tests.bench import gpu, gpu_limits, gpu_model, gpu_sweep
from tests.bench.gpu_report import Batch, Report, as_markdown

ROOT = Path(__file__).parents[2]


def test_a_tiny_run_on_the_cpu_writes_both_files(tmp_path, monkeypatch):
    """All tables have rows; the JSON has the same figures."""
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "REQUESTS", ((2, 64, 64),))
    monkeypatch.setattr(gpu, "REPEATS", 2)
    monkeypatch.setattr(gpu_limits, "REPEATS", 3)
    arguments = ["--device", "cpu", "--tiny", "--alone", "--name", "rehearsal"]

    ended = gpu.main([*arguments, "--kinds", "plain", "--out", str(tmp_path)])

    assert ended == 0
    text = (tmp_path / "gpu-rehearsal.md").read_text()
    for words in ("## Decode", "| plain | 3 |", "| tiles |", "| library |", "not measured"):
        assert words in text
    data = json.loads((tmp_path / "gpu-rehearsal.json").read_text())
    assert {len(data[name]) > 0 for name in ("decode", "prefill", "products", "batches")} == {True}
    assert data["limits"]["copy_bytes_per_s"] > 0


def test_a_sweep_tries_tiles_and_leaves_them_as_they_were(capsys, monkeypatch):
    """The fastest come first."""
    monkeypatch.setattr(gpu_sweep, "FEW", {"BLOCK_N": (32, 128)})
    monkeypatch.setattr(gpu_sweep, "MANY", {"NUM_STAGES": (3, 4)})
    before = few_rows.BLOCK_N

    assert gpu_sweep.main(["--device", "cpu", "--shrink", "64", "--few", "3", "--many", "9"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 * 2 * 2
    assert sum("{'BLOCK_N': 128}" in line for line in lines) == 4
    assert before == few_rows.BLOCK_N


def test_the_comparison_is_of_medians():
    """One slow run of five changes nothing."""
    limits = gpu_limits.Limits(1e12, 1e15)
    report = Report(machine={}, command="x", model="y", limits=limits)
    report.batches.append(Batch(16, 512, 128, (10.0, 400.0, 420.0), (200.0, 100.0, 200.0)))

    assert "| 16 | 512 | 128 | 400 | 200 | 2.00 |" in as_markdown(report, device="z")


def test_an_8b_llama_has_8b_parameters():
    """The shape that is measured without a checkpoint is the one it claims."""
    from kvrelay.model.spec import spec_of

    spec = spec_of(gpu_model.EIGHT_B)
    embeddings = 2 * spec.vocab_size * spec.hidden_size

    assert gpu_model.matmul_params(spec) + embeddings == pytest.approx(8.03e9, rel=0.001)
    assert gpu_model.kv_num_bytes(spec, 1, 2) == 128 << 10
    assert gpu_model.prefill_flop(spec, 1024) == pytest.approx(1024 * 14.2e9, rel=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_what_is_missing():
    """One line, and an exit status that is not zero."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.bench.gpu"], cwd=ROOT, capture_output=True, text=True
    )

    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "finds no CUDA device" in ended.stderr
