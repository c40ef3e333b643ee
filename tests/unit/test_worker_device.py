"""Where a worker computes: what is asked for, what there is, and what is refused by name."""

import subprocess
import sys

import pytest
import torch

from kvrelay.config import SettingsError, read_settings
from kvrelay.worker import device
from prefill_svc.config import PrefillConfig

NO_DEVICE = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def settings(*argv: str) -> PrefillConfig:
    return read_settings(PrefillConfig, service="prefill", argv=["--model", "m", *argv], environ={})


@NO_DEVICE
@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_without_a_device_a_worker_computes_on_the_cpu(asked):
    """Unless it was told to do otherwise."""
    assert device.chosen_device(settings("--device", asked)) == "cpu"


@NO_DEVICE
def test_a_device_that_is_not_there_is_refused_by_name():
    """Rather than served from the CPU at a hundredth of the speed."""
    with pytest.raises(SettingsError, match=r"device = cuda: torch .* finds no CUDA device"):
        device.chosen_device(settings("--device", "cuda"))


@pytest.mark.parametrize("asked", ["auto", "cpu"])
def test_weights_that_only_a_device_computes_with_are_refused_on_the_cpu(asked, monkeypatch):
    """The CPU has no products of fp8."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = settings("--device", asked, "--generation-weights", "fp8")
    with pytest.raises(SettingsError, match="generation_weights = fp8 needs a CUDA device"):
        device.chosen_device(chosen)


def test_a_device_computes_in_bfloat16_alone(monkeypatch):
    """`auto` goes to the CPU for float32; `cuda` is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device.chosen_device(settings("--dtype", "float32")) == "cpu"
    with pytest.raises(SettingsError, match="dtype float32"):
        device.chosen_device(settings("--dtype", "float32", "--device", "cuda"))


def test_an_old_device_is_not_enough(monkeypatch):
    """Matrix units for bfloat16 came with capability 8.0, those for fp8 with 8.9."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert device.chosen_device(settings()) == "cpu"
    with pytest.raises(SettingsError, match="Old has no bfloat16"):
        device.chosen_device(settings("--device", "cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(SettingsError, match="generation_weights = fp8: Old"):
        device.chosen_device(settings("--generation-weights", "fp8", "--device", "cuda"))


@NO_DEVICE
@pytest.mark.realmodel
def test_a_worker_that_cannot_have_its_device_says_so_in_one_line(real_model):
    """And exits 2, as for any other setting."""
    command = [sys.executable, "-m", "prefill_svc", "--model", str(real_model), "--device", "cuda"]
    ended = subprocess.run(command, capture_output=True, text=True)

    assert ended.returncode == 2
    assert "device = cuda: torch" in ended.stderr.splitlines()[-1]
