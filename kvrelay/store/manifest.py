"""What a model directory must hold, and whether it still does.

A manifest names every file with its length and digest. Starting a service compares lengths,
and digests of the small files; weights were hashed once, when they were written. A directory
without a manifest (any Hugging Face checkpoint) is held to what its own files announce.
No torch here: the coordinator reads models too.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvrelay.errors import ModelInvalid
from kvrelay.store import safetensors_file

MANIFEST = "manifest.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
BLOCKS = "blocks.safetensors"
"""Quantized matrices as their GGUF has them, beside the same ones as bfloat16."""

FORMAT = 3

MAX_JSON_BYTES = 256 * 2**20
"""Longest JSON file that is read; a tokenizer.json has some 10 MB."""

_CHUNK_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model. `sha256` is None until somebody hashed it."""

    name: str
    num_bytes: int
    sha256: str | None = None

    @property
    def is_weights(self) -> bool:
        return self.name.endswith(".safetensors")


@dataclass(frozen=True, slots=True)
class ModelDir:
    """A directory whose files are all there."""

    path: Path
    name: str
    files: tuple[ModelFile, ...]
    config: Mapping[str, Any]

    @property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files, in order of name."""
        return tuple(self.path / file.name for file in self.files if file.is_weights)

    @property
    def num_weight_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files if file.is_weights)


def cache_dir() -> Path:
    """Where kvrelay keeps things; `KVRELAY_CACHE_DIR` moves it."""
    chosen = os.environ.get("KVRELAY_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "kvrelay"


def models_dir() -> Path:
    """Where pulled models live, one directory each."""
    return cache_dir() / "models"


def resolve_model(name_or_dir: str | Path) -> Path:
    """The directory of a pulled model, or the directory itself.

    Raises:
        ModelInvalid: neither exists; says how to get it.
    """
    text = str(name_or_dir)
    is_name = os.sep not in text and text not in ("", ".", "..")
    if is_name and (models_dir() / text).is_dir():
        return models_dir() / text
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path.resolve()
    if path.is_file():
        cure = f"; run: kvrelay pull {text}" if path.suffix.lower() == ".gguf" else ""
        raise ModelInvalid(text, f"is a file, not a model directory{cure}")
    raise ModelInvalid(text, f"no such model or directory; run: kvrelay pull {text or 'NAME'}")


def read_model_dir(path: Path) -> ModelDir:
    """Check that `path` holds a whole model, without reading its weights.

    Raises:
        ModelInvalid: names the first file that is missing, cut short or changed.
    """
    if not path.is_dir():
        raise ModelInvalid(path, "no such directory")
    manifest_path = path / MANIFEST
    if manifest_path.exists():
        name, files = _read_manifest(manifest_path)
        for file in files:
            _check_file(path, file)
    else:
        name, files = path.name, _unlisted_files(path)
    for required in (CONFIG, TOKENIZER):
        if not any(file.name == required for file in files):
            raise ModelInvalid(path / required, "missing")
    if not any(file.is_weights and file.name != BLOCKS for file in files):
        raise ModelInvalid(path / "model.safetensors", "missing; no weights in the directory")
    return ModelDir(path, name, files, read_json(path / CONFIG))


def is_outdated(path: Path) -> bool:
    """Whether another version of kvrelay wrote this directory, in a format of its own."""
    manifest = path / MANIFEST
    return manifest.is_file() and read_json(manifest).get("format") != FORMAT


def model_digest(path: Path) -> str:
    """Hex digest over the names and digests of weights, config and tokenizer.

    Equal for equal files, with or without a manifest; without one the weights are read.

    Raises:
        ModelInvalid: as `read_model_dir`.
    """
    pairs = sorted(
        (file.name, file.sha256 or sha256_of(path / file.name))
        for file in read_model_dir(path).files
        if file.is_weights or file.name in (CONFIG, TOKENIZER)
    )
    digest = hashlib.sha256()
    for name, sha256 in pairs:
        digest.update(f"{name}\0{sha256}\n".encode())
    return digest.hexdigest()


def write_manifest(
    path: Path, *, name: str, source: Mapping[str, Any], files: Iterable[ModelFile]
) -> None:
    """Describe the files of the model directory `path`; each must carry its digest."""
    entries = {}
    for file in sorted(files, key=lambda file: file.name):
        assert file.sha256 is not None, file.name
        entries[file.name] = {"sha256": file.sha256, "num_bytes": file.num_bytes}
    manifest = {"format": FORMAT, "name": name, "source": dict(source), "files": entries}
    (path / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelInvalid: missing, too long, or not a JSON object.
    """
    try:
        num_bytes = path.stat().st_size
        if num_bytes > MAX_JSON_BYTES:
            raise ModelInvalid(path, f"{num_bytes} bytes, limit {MAX_JSON_BYTES}")
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelInvalid(path, "missing") from error
    except OSError as error:
        raise ModelInvalid(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(path, "not valid JSON") from error
    if not isinstance(value, dict):
        raise ModelInvalid(path, f"a JSON {type(value).__name__}, wanted an object")
    return value


def sha256_of(path: Path) -> str:
    """The file's digest, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _read_manifest(path: Path) -> tuple[str, tuple[ModelFile, ...]]:
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise ModelInvalid(
            path,
            f"format {manifest.get('format')!r}, this version reads {FORMAT}; pull the model again",
        )
    name, entries = manifest.get("name"), manifest.get("files")
    if not isinstance(name, str) or not isinstance(entries, dict):
        raise ModelInvalid(path, "wants a name and files")
    return name, tuple(_manifest_entry(path, *entry) for entry in sorted(entries.items()))


def _manifest_entry(path: Path, name: str, entry: object) -> ModelFile:
    if Path(name).name != name:
        raise ModelInvalid(path, f"file name {name!r} leaves the directory")
    match entry:
        case {"num_bytes": int(num_bytes), "sha256": str(sha256)}:
            return ModelFile(name, num_bytes, sha256)
    raise ModelInvalid(path, f"{name} wants num_bytes and sha256")


def _check_file(path: Path, file: ModelFile) -> None:
    where = path / file.name
    if not where.is_file():
        raise ModelInvalid(where, "missing; pull the model again with --force")
    num_bytes = where.stat().st_size
    if num_bytes != file.num_bytes:
        raise ModelInvalid(
            where,
            f"{num_bytes} bytes, the manifest says {file.num_bytes}; "
            "pull the model again with --force",
        )
    # Weights are long and were hashed when written; the rest costs milliseconds.
    if not file.is_weights and sha256_of(where) != file.sha256:
        raise ModelInvalid(where, "not the file of the manifest; pull the model again with --force")


def _unlisted_files(path: Path) -> tuple[ModelFile, ...]:
    weights = _weight_names(path)
    for name in weights:
        if not (path / name).is_file():
            raise ModelInvalid(path / name, "missing")
        safetensors_file.check_length(path / name)
    names = [name for name in (CONFIG, TOKENIZER) if (path / name).is_file()]
    return tuple(ModelFile(name, (path / name).stat().st_size) for name in sorted(names + weights))


def _weight_names(path: Path) -> list[str]:
    if not (path / WEIGHTS_INDEX).exists():
        return sorted(file.name for file in path.glob("*.safetensors"))
    weight_map = read_json(path / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelInvalid(path / WEIGHTS_INDEX, "wants a weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelInvalid(path / WEIGHTS_INDEX, f"shard name {name!r} leaves the directory")
    kept = {BLOCKS} if (path / BLOCKS).is_file() else set()  # no index speaks of it
    return sorted({*weight_map.values()} | kept)
