"""Safetensors files, written and measured without torch.

The format is eight bytes of header length, a JSON header, then the tensors' bytes. Writing
it here lets weights stream through one tensor at a time, hashed as they pass.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvrelay.errors import ModelInvalid

MAX_HEADER_BYTES = 100 * 1000 * 1000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class Written:
    """What was put on disk."""

    sha256: str
    num_bytes: int


def write_bfloat16(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[npt.NDArray[np.float32]],
) -> Written:
    """Write `tensors`, in the order of `shapes`, rounded to bfloat16.

    Args:
        path: the file, replaced if it is there.
        shapes: name to shape of everything that will come.
        tensors: float32, one at a time; each must have its announced shape.
    """

    def rounded() -> Iterator[bytes]:
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape, (name, tensor.shape, shape)
            yield to_bfloat16_bits(tensor).tobytes()

    return _write(path, _header("BF16", 2, shapes, {"format": "pt"}), rounded())


def write_bytes(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[npt.NDArray[np.uint8]],
    *,
    metadata: Mapping[str, str],
) -> Written:
    """Write `tensors`, in the order of `shapes`, as they are; `metadata` goes into the header."""

    def plain() -> Iterator[bytes]:
        for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
            assert tensor.shape == shape, (name, tensor.shape, shape)
            yield tensor.tobytes()

    return _write(path, _header("U8", 1, shapes, metadata), plain())


def to_bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 rounded to the nearest bfloat16, ties to even, as raw bits. Finite values only."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half_up = ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return ((bits + half_up) >> 16).astype(np.uint16)


def check_length(path: Path) -> None:
    """Compare the file's length with what its own header announces.

    Raises:
        ModelInvalid: it is cut short, has spare bytes, or is not safetensors at all.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        header_bytes = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header_bytes > min(MAX_HEADER_BYTES, num_bytes - 8):
            raise ModelInvalid(path, f"{num_bytes} bytes are too few for its header")
        try:
            header = json.loads(file.read(header_bytes))
            end = max(
                (t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"),
                default=0,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ModelInvalid(path, "its header is not that of a safetensors file") from error
    if not isinstance(end, int) or num_bytes != 8 + header_bytes + end:
        raise ModelInvalid(
            path, f"{num_bytes} bytes, its header announces {8 + header_bytes} + {end}"
        )


def _write(path: Path, header: bytes, parts: Iterable[bytes]) -> Written:
    digest = hashlib.sha256(header)
    num_bytes = len(header)
    with path.open("wb") as out:
        out.write(header)
        for part in parts:
            digest.update(part)
            out.write(part)
            num_bytes += len(part)
    return Written(digest.hexdigest(), num_bytes)


def _header(
    dtype: str,
    item_bytes: int,
    shapes: Mapping[str, tuple[int, ...]],
    metadata: Mapping[str, str],
) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, shape in shapes.items():
        end = offset + item_bytes * int(np.prod(shape, dtype=np.int64))
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on an 8-byte boundary
    return len(text).to_bytes(8, "little") + text
