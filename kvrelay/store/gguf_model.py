"""One GGUF file in, the files of a model directory out."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from kvrelay.store import gguf_config, gguf_tokenizer, gguf_weights
from kvrelay.store.gguf_file import GgufFile
from kvrelay.store.manifest import BLOCKS, CONFIG, TOKENIZER, ModelFile, sha256_of
from kvrelay.store.progress import Progress

WEIGHTS = "model.safetensors"


def convert(
    source: Path,
    into: Path,
    *,
    progress: Progress,
    sampling: Mapping[str, float] = MappingProxyType({}),
) -> list[ModelFile]:
    """Write the model in `source` to the empty directory `into`.

    `sampling` goes into its `generation_config.json` beside what the file itself says.

    Raises:
        ModelInvalid: something in the file is missing, damaged or not supported.
    """
    file = GgufFile(source)
    config = gguf_config.model_config(file)
    # The cheap parts first, so that what cannot be served is refused before the long one.
    gguf_tokenizer.build_tokenizer(file).save(str(into / TOKENIZER), pretty=False)
    _write_json(into / "tokenizer_config.json", gguf_tokenizer.tokenizer_config(file))
    _write_json(into / CONFIG, config)
    _write_json(
        into / "generation_config.json", {**gguf_config.generation_config(file), **sampling}
    )
    template = gguf_tokenizer.chat_template(file)
    if template is not None:
        (into / "chat_template.jinja").write_text(template, encoding="utf-8")
    small = [ModelFile(path.name, path.stat().st_size, sha256_of(path)) for path in into.iterdir()]
    written = gguf_weights.write_weights(file, config, into / WEIGHTS, progress=progress)
    files = [*small, ModelFile(WEIGHTS, written.num_bytes, written.sha256)]
    kept = gguf_weights.write_blocks(file, config, into / BLOCKS, progress=progress)
    if kept is not None:
        files.append(ModelFile(BLOCKS, kept.num_bytes, kept.sha256))
    return files


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
