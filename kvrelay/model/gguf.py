"""Weights straight from a `.gguf` file, for looking at one without converting it first.

Names and the order of rotary pairs are the converter's business (`kvrelay.store`).
"""

from functools import partial
from pathlib import Path

import torch

from kvrelay.errors import ModelInvalid
from kvrelay.model.spec import ModelSpec, spec_of
from kvrelay.model.weights import Stored, Weights, fill
from kvrelay.store import gguf_weights
from kvrelay.store.gguf_config import model_config
from kvrelay.store.gguf_file import GgufFile


def load_gguf(path: str | Path, *, dtype: torch.dtype) -> tuple[ModelSpec, Weights]:
    """Read a `.gguf` file directly, dequantized.

    Raises:
        ModelInvalid: the file is damaged, or holds what this code does not compute.
    """
    file = GgufFile(Path(path))
    spec = spec_of(model_config(file))
    return spec, fill(open_gguf(file), spec, dtype=dtype)


def open_gguf(file: GgufFile) -> Stored:
    """Every tensor under its Hugging Face name, read when asked for."""
    config = model_config(file)
    names = gguf_weights.tensor_names(file, config)
    heads = {
        ".attn_q.weight": config["num_attention_heads"],
        ".attn_k.weight": config["num_key_value_heads"],
    }

    def read(name: str) -> torch.Tensor:
        if name not in file.tensors:
            raise ModelInvalid(file.path.name, f"tensor {name} is missing")
        values = file.dequantize(name)
        part = name[name.find(".attn_") :]
        if file.arch == "llama" and part in heads:
            values = gguf_weights.unpermute(values, heads[part])
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    return {hf_name: (file.path.name, partial(read, name)) for name, hf_name in names.items()}
