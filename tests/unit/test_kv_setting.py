"""What `kv_dtype` makes of a worker."""

from pathlib import Path

import pytest
import torch

from kvrelay.clock import MonotonicClock
from kvrelay.config import SettingsError
from kvrelay.store import gguf_model
from kvrelay.store.progress import Silent
from kvrelay.types import Role
from kvrelay.worker import model
from kvrelay.worker.cores import CoreShare
from kvrelay.worker.model import LoadedModel, load_model
from kvrelay.worker.settings import WorkerSettings
from tests.support import tiny_gguf


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("model")
    source = tiny_gguf.write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")
    gguf_model.convert(source, into, progress=Silent())
    return into


def loaded(model_dir: Path, **choices: object) -> LoadedModel:
    settings = WorkerSettings.model_validate(
        {"model": str(model_dir), "kv_memory_mib": 1, "device": "cpu"} | choices
    )
    before = torch.get_num_threads()
    cores = CoreShare(-1, Role.DECODE, num_cores=1, limit=1)
    try:
        return load_model(settings, MonotonicClock(), cores, 0)
    finally:
        torch.set_num_threads(before)
        cores.close()


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_more_blocks_of_a_smaller_dtype_fit_into_the_memory(model_dir, engine):
    """And what KV is kept in is in the fingerprint, where peers look for it."""
    found = {
        kv_dtype: loaded(model_dir, kv_dtype=kv_dtype, cpu_engine=engine)
        for kv_dtype in ("auto", "bfloat16", "fp8", "int8")
    }
    blocks = {kv_dtype: each.cache.num_blocks for kv_dtype, each in found.items()}
    numerics = {kv_dtype: each.fingerprint.numerics for kv_dtype, each in found.items()}
    for kv_dtype, each in found.items():
        is_plain = kv_dtype in ("auto", "bfloat16")
        assert each.fingerprint.layout.dtype == ("bfloat16" if is_plain else kv_dtype)
        assert (f"-kv-{kv_dtype}" in numerics[kv_dtype]) is not is_plain
        each.cache.close()

    assert blocks["auto"] == blocks["bfloat16"] < blocks["int8"] < blocks["fp8"]
    assert blocks["fp8"] == pytest.approx(2 * blocks["bfloat16"], abs=1)
    assert numerics["auto"] == numerics["bfloat16"]


def test_a_device_that_cannot_compute_with_it_is_refused(model_dir, monkeypatch):
    """Rather than given bfloat16 that nobody asked for."""
    monkeypatch.setattr(model, "chosen_device", lambda settings: "cuda")
    with pytest.raises(SettingsError, match="kv_dtype = int8: a CUDA device computes"):
        loaded(model_dir, kv_dtype="int8", device="auto")
