"""Taking a Hugging Face directory into the store: known files only, and never a pickle."""

import hashlib
import os
import shutil
from pathlib import Path

from kvrelay.errors import ModelInvalid
from kvrelay.store.manifest import (
    CONFIG,
    MANIFEST,
    TOKENIZER,
    WEIGHTS_INDEX,
    ModelFile,
    read_json,
    read_model_dir,
)
from kvrelay.store.progress import Progress

SMALL_FILES = (
    CONFIG,
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    WEIGHTS_INDEX,
)
"""All that is taken besides weights. Code (`*.py`) and other formats stay behind."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CHUNK_BYTES = 2**20


def import_dir(source: Path, into: Path, *, progress: Progress) -> list[ModelFile]:
    """Bring the model in `source` into the empty directory `into`.

    Small files are copied; weights are hard links where the file system allows, so both
    names must be left unchanged afterwards, as checkpoints are.

    Raises:
        ModelInvalid: a file is missing, cut short, or only there as a pickle.
    """
    check_dir(source)
    weights = read_model_dir(source).weights
    small = [source / name for name in SMALL_FILES if (source / name).is_file()]
    total_bytes = sum(path.stat().st_size for path in (*small, *weights))
    progress.begin("copying and hashing", total_bytes=total_bytes)
    for path in small:
        shutil.copyfile(path, into / path.name)
    for path in weights:
        _link_or_copy(path.resolve(), into / path.name)
    return [_hashed(into / path.name, progress=progress) for path in (*small, *weights)]


def check_dir(source: Path) -> None:
    """Refuse by name what cannot become a model directory.

    Raises:
        ModelInvalid: no config.json, no tokenizer.json, or no safetensors.
    """
    read_json(source / CONFIG)
    if not (source / TOKENIZER).is_file():
        raise ModelInvalid(
            source / TOKENIZER,
            "missing; save it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
        )
    if (source / MANIFEST).is_file() or any(source.glob("*.safetensors")):
        return
    for pattern in _PICKLES:
        for pickle in sorted(source.glob(pattern)):
            raise ModelInvalid(
                pickle,
                "is a pickle, which can run code, so it is never read; "
                "save the weights as safetensors (model.save_pretrained does)",
            )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _hashed(path: Path, *, progress: Progress) -> ModelFile:
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
            progress.advance(len(chunk))
    return ModelFile(path.name, num_bytes, digest.hexdigest())
