"""A model directory is checked when it is opened, and the damaged file is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvrelay.errors import ModelInvalid
from kvrelay.store import manifest
from kvrelay.store.manifest import ModelFile, model_digest, read_model_dir, resolve_model
from kvrelay.store.safetensors_file import write_bfloat16, write_bytes


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """A whole directory with a manifest."""
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text('{"vocab_size": 3}')
    (path / "tokenizer.json").write_text("{}")
    write_bfloat16(path / "model.safetensors", {"a": (4,)}, [np.zeros(4, np.float32)])
    files = [
        ModelFile(file.name, file.stat().st_size, manifest.sha256_of(file))
        for file in path.iterdir()
    ]
    manifest.write_manifest(path, name="tiny", source={"kind": "test"}, files=files)
    return path


def test_a_whole_directory_is_read(model_dir: Path) -> None:
    """Name, config and weights, without reading the weights."""
    model = read_model_dir(model_dir)
    assert model.name == "tiny"
    assert model.config == {"vocab_size": 3}
    assert model.weights == (model_dir / "model.safetensors",)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_a_missing_file_is_named(model_dir: Path, name: str, has_manifest: bool) -> None:
    """With a manifest and without."""
    if not has_manifest:
        (model_dir / "manifest.json").unlink()
    (model_dir / name).unlink()
    with pytest.raises(ModelInvalid) as caught:
        read_model_dir(model_dir)
    assert caught.value.file == str(model_dir / name)
    assert "missing" in caught.value.problem


@pytest.mark.parametrize("has_manifest", [True, False])
def test_truncated_weights_are_named(model_dir: Path, has_manifest: bool) -> None:
    """The manifest, or else the file's own header, knows the length."""
    if not has_manifest:
        (model_dir / "manifest.json").unlink()
    weights = model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelInvalid) as caught:
        read_model_dir(model_dir)
    assert caught.value.file == str(weights)


def test_an_edited_config_is_noticed(model_dir: Path) -> None:
    """Small files are compared by digest, so equal length does not hide a change."""
    (model_dir / "config.json").write_text('{"vocab_size": 4}')
    with pytest.raises(ModelInvalid, match=r"config\.json: not the file of the manifest"):
        read_model_dir(model_dir)


def test_a_missing_shard_is_named(model_dir: Path) -> None:
    """A sharded checkpoint is held to its index."""
    (model_dir / "manifest.json").unlink()
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelInvalid, match=r"model-00002\.safetensors: missing"):
        read_model_dir(model_dir)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"format": 1, "name": "x", "files": {}}',
        '{"format": 3, "name": "x", "files": {"../x": {"sha256": "", "num_bytes": 1}}}',
        '{"format": 3, "name": "x", "files": {"config.json": {"num_bytes": 1}}}',
        "[" * 100_000,
    ],
)
def test_a_manifest_that_makes_no_sense_is_named(model_dir: Path, content: str) -> None:
    """Whatever stands in it, the answer is an error about that file."""
    (model_dir / "manifest.json").write_text(content)
    with pytest.raises(ModelInvalid, match=r"manifest\.json"):
        read_model_dir(model_dir)


def test_the_digest_is_the_same_with_and_without_a_manifest(model_dir: Path) -> None:
    """So a copied checkpoint still pairs with a pulled one."""
    with_manifest = model_digest(model_dir)
    (model_dir / "manifest.json").unlink()
    assert model_digest(model_dir) == with_manifest


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_digest_depends_on_every_file_that_matters(model_dir: Path, name: str) -> None:
    """Weights, config and tokenizer."""
    (model_dir / "manifest.json").unlink()
    before = model_digest(model_dir)
    content = (model_dir / name).read_bytes()
    other = content[:-1] + b"\1" if name == "model.safetensors" else content + b" "
    (model_dir / name).write_bytes(other)
    assert model_digest(model_dir) != before


def test_a_name_in_the_cache_wins_over_a_directory(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stray directory of the same name does not change what is served."""
    monkeypatch.setenv("KVRELAY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert resolve_model("tiny") == model_dir.resolve()
    cached = tmp_path / "cache" / "models" / "tiny"
    cached.mkdir(parents=True)
    assert resolve_model("tiny") == cached
    assert resolve_model(model_dir) == model_dir


@pytest.mark.parametrize("name", ["nothing-here", "./nothing/here", ""])
def test_an_unknown_model_says_what_to_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error carries the next command."""
    monkeypatch.setenv("KVRELAY_CACHE_DIR", str(tmp_path))
    with pytest.raises(ModelInvalid, match="run: kvrelay pull"):
        resolve_model(name)


def with_blocks(model_dir: Path) -> Path:
    """The same without a manifest, with a file of blocks."""
    (model_dir / "manifest.json").unlink()
    blocks = [np.zeros((1, 20), np.uint8)]
    write_bytes(model_dir / manifest.BLOCKS, {"a": (1, 20)}, blocks, metadata={"a": "Q4_1"})
    return model_dir


@pytest.mark.parametrize("has_index", [True, False])
def test_blocks_are_part_of_the_model_and_its_digest(model_dir: Path, has_index: bool) -> None:
    """Tokens depend on them; no index speaks of them."""
    before = model_digest(model_dir)
    if has_index:
        index = {"weight_map": {"a": "model.safetensors"}}
        (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    assert manifest.BLOCKS in {file.name for file in read_model_dir(with_blocks(model_dir)).files}
    assert model_digest(model_dir) != before


def test_blocks_alone_are_no_model(model_dir: Path) -> None:
    """Prompts need the whole checkpoint."""
    (with_blocks(model_dir) / "model.safetensors").unlink()
    with pytest.raises(ModelInvalid, match=r"model\.safetensors: missing"):
        read_model_dir(model_dir)


def test_an_older_format_says_what_to_do(model_dir: Path) -> None:
    """A directory of another version is told from a damaged one."""
    path = model_dir / "manifest.json"
    assert not manifest.is_outdated(model_dir)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    assert manifest.is_outdated(model_dir)
    with pytest.raises(ModelInvalid, match="format 2, this version reads 3; pull the model again"):
        read_model_dir(model_dir)
