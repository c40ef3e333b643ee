"""Which engine computes on a CPU: what is asked for, what there is, and the name of its bits."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch

from kvrelay.errors import ModelInvalid
from kvrelay.kv.cache import KvCache
from kvrelay.model import load
from kvrelay.model.load import layout_of, load_runner
from kvrelay.model.spec import read_spec
from kvrelay.native.library import why_not
from kvrelay.store import gguf_model
from kvrelay.store.progress import Silent
from tests.support import tiny_gguf

needs_native = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("model")
    kept = {"_proj": gguf.GGMLQuantizationType.Q4_1}
    source = tiny_gguf.write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", types=kept)
    gguf_model.convert(source, into, progress=Silent())
    return into


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def loaded(model_dir: Path, engine: str, weights: str = "auto", dtype: str = "bfloat16"):
    """Name of the numerics, and why it is not the compiled engine."""
    spec = read_spec(model_dir)
    cache = KvCache(layout_of(spec, dtype=dtype, block_size=16), 4, shareable=False)
    try:
        runner, reason = load_runner(
            model_dir, spec, cache, engine=engine, generation_weights=weights, num_threads=1
        )
        return runner.numerics, reason
    finally:
        cache.close()


def test_torch_computes_where_it_is_asked_to_or_must(model_dir, monkeypatch):
    """And under the same name: the bits are the same, whatever the reason."""
    assert loaded(model_dir, "torch") == ("cpu-bfloat16-v1", "torch was asked for")
    assert loaded(model_dir, "torch", "bfloat16")[0] == "cpu-bfloat16-v1"
    monkeypatch.setattr(load, "why_not_native", lambda spec, layout: "there is no compiler")
    assert loaded(model_dir, "auto") == ("cpu-bfloat16-v1", "there is no compiler")


def test_the_compiled_engine_is_refused_where_it_cannot_compute(model_dir):
    """`native` never means torch; so a pool does not change its bits with its machines."""
    with pytest.raises(ModelInvalid, match="cpu_engine is native, but it computes in bfloat16"):
        loaded(model_dir, "native", dtype="float32")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_that_torch_does_not_compute_with_are_refused(model_dir, weights):
    """Rather than generated with others than were asked for."""
    with pytest.raises(ModelInvalid, match=f"generation_weights is {weights}"):
        loaded(model_dir, "torch", weights)


@needs_native
def test_what_gives_other_bits_has_another_name(model_dir):
    """Workers are peers when names are equal: no two ways to compute may share one."""
    ways = [("torch", "auto"), *(("auto", it) for it in ("auto", "bfloat16", "int8", "int4"))]
    names = [loaded(model_dir, *way)[0] for way in ways]

    assert len(set(names)) == len(ways), names
    assert loaded(model_dir, "native") == (names[1], None)
