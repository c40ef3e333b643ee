"""Safetensors written without torch are what torch would have written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import load_file

from kvrelay.errors import ModelInvalid
from kvrelay.store.manifest import sha256_of
from kvrelay.store.safetensors_file import (
    check_length,
    to_bfloat16_bits,
    write_bfloat16,
    write_bytes,
)


@given(hnp.arrays(np.float32, 16, elements=st.floats(-(2.0**126), 2.0**126, width=32)))
def test_rounding_is_that_of_torch(values: np.ndarray) -> None:
    """To the nearest bfloat16, ties to even, subnormals included."""
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    assert np.array_equal(to_bfloat16_bits(values), expected.view(np.uint16))


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    """Names, shapes and values, and the digest taken on the way is that of the file."""
    path = tmp_path / "model.safetensors"
    tensors = {"a": np.ones((2, 3), np.float32), "b.c": np.arange(5, dtype=np.float32)}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    written = write_bfloat16(path, shapes, iter(tensors.values()))
    assert (written.sha256, written.num_bytes) == (sha256_of(path), path.stat().st_size)
    check_length(path)
    loaded = load_file(path)
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name].float(), torch.from_numpy(tensor))


@pytest.mark.parametrize("spoil", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b[:5]])
def test_a_file_of_another_length_is_named(tmp_path: Path, spoil: object) -> None:
    """Cut short, grown, or too short even for a header."""
    path = tmp_path / "model.safetensors"
    write_bfloat16(path, {"a": (4,)}, [np.zeros(4, np.float32)])
    path.write_bytes(spoil(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(ModelInvalid, match=r"model\.safetensors"):
        check_length(path)


@pytest.mark.parametrize("header", [b"[1]      ", b'{"a": {}}', b"not json!"])
def test_a_header_of_another_format_is_refused(tmp_path: Path, header: bytes) -> None:
    """Whatever the bytes, the answer is an error by name."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelInvalid, match=r"model\.safetensors"):
        check_length(path)


def test_bytes_and_metadata_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Even of an array that is not contiguous."""
    path = tmp_path / "blocks.safetensors"
    tensor = np.arange(24, dtype=np.uint8).reshape(4, 6)[::2]
    written = write_bytes(path, {"a": tensor.shape}, [tensor], metadata={"a": "Q4_1"})
    assert (written.sha256, written.num_bytes) == (sha256_of(path), path.stat().st_size)
    check_length(path)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"a": "Q4_1"}
        assert np.array_equal(file.get_tensor("a"), tensor)
