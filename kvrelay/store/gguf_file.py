"""A GGUF file, opened and checked: typed metadata and named tensors, or an error by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, overload

import gguf
import numpy as np
import numpy.typing as npt

from kvrelay.errors import ModelInvalid

T = TypeVar("T")

_ABSENT = object()


class GgufFile:
    """Metadata and tensors of one file, memory-mapped.

    Raises:
        ModelInvalid: it is not GGUF, or it ends before its tensors do.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise ModelInvalid(path, f"not a complete GGUF file ({error})") from error
        self._fields = reader.fields
        self.tensors: Mapping[str, gguf.ReaderTensor] = {t.name: t for t in reader.tensors}
        self.arch = self.get("general.architecture", str)

    def keys(self) -> frozenset[str]:
        """Every metadata key."""
        return frozenset(self._fields)

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...

    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...

    def get(self, key: str, kind: type[T], default: Any = _ABSENT) -> Any:
        """One metadata value of type `kind`; without a default it must be there."""
        value = self.find(key, kind)
        if value is not None:
            return value
        if default is _ABSENT:
            raise ModelInvalid(self.path, f"metadata {key} is missing")
        return default

    def find(self, key: str, kind: type[T]) -> T | None:
        """One metadata value of type `kind`, if it is there."""
        if key not in self._fields:
            return None
        value = self._fields[key].contents()
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind):
            raise ModelInvalid(
                self.path, f"metadata {key} is {type(value).__name__}, wanted {kind.__name__}"
            )
        return value

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape, outermost dimension first (GGUF writes it the other way)."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    def type_of(self, name: str) -> str:
        """How the tensor's values are stored: `F32`, `Q4_1`, `Q8_0`, ..."""
        return str(self.tensors[name].tensor_type.name)

    def blocks(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a quantized matrix, [rows, bytes of one row's blocks]."""
        raw: npt.NDArray[np.uint8] = self.tensors[name].data
        assert raw.dtype == np.uint8, (name, raw.dtype)
        return raw.reshape(self.shape(name)[0], -1)

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values as float32, in `shape(name)`."""
        tensor = self.tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelInvalid(
                self.path,
                f"tensor {name} is quantized as {tensor.tensor_type.name}, which cannot be read",
            ) from error
        return values.reshape(self.shape(name)).astype(np.float32, copy=False)
