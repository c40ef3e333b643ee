"""The compiled library behind typed functions. Calls give up the interpreter's lock.

ctypes over the C border, so that one build serves every version of Python and torch.
"""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvrelay.native.build import LIBRARY, sources_digest

NEEDED_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "f16c"})


HOW_TO_BUILD = "install g++ and run python -m kvrelay.native.build"


class NativePath(IntEnum):
    PROMPT = 0
    GENERATION = 1


class Product(IntEnum):
    QKV = 0
    OUT = 1
    GATE_UP = 2
    DOWN = 3


class Norm(IntEnum):
    INPUT = 0
    QUERY = 1
    KEY = 2
    POST = 3


WEIGHT_KINDS: Mapping[str, int] = {"bfloat16": 0, "q4_0": 1, "q4_1": 2, "q8_0": 3}

KV_KINDS: Mapping[str, int] = {"bfloat16": 0, "fp8": 1, "int8": 2}


class Shape(ctypes.Structure):
    """A model's sizes, as the C++ side has them."""

    _fields_ = (
        ("hidden_size", c_int32),
        ("num_layers", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("intermediate_size", c_int32),
        ("vocab_size", c_int32),
        ("num_positions", c_int32),
        ("window", c_int32),
        ("block_size", c_int32),
        ("kv_kind", c_int32),
        ("rms_norm_eps", c_float),
    )


RUN_FIELDS = ("path", "start", "num_rows", "first_token", "first_block", "logits_row")
"""Columns of the array of runs that `step` takes, all int32."""


def why_not(library: Path = LIBRARY) -> str | None:
    """Why this machine cannot use the library; None if it can."""
    try:
        cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return "this processor is unknown"
    has = next((line.split() for line in cpu.splitlines() if line.startswith("flags")), [])
    if missing := NEEDED_FLAGS - set(has):
        return f"this processor has no {', '.join(sorted(missing))}"
    if not library.exists():
        return f"it is not built: {HOW_TO_BUILD}"
    try:
        load(library)
    except OSError as error:
        return str(error)
    return None


@cache
def load(library: Path = LIBRARY) -> ctypes.CDLL:
    """The library, its functions declared.

    Raises:
        OSError: it cannot be loaded, or was built from other sources than these.
    """
    native = ctypes.CDLL(str(library))
    if not hasattr(native, "kvrelay_sources"):
        raise OSError(f"{library.name} is no library of ours: {HOW_TO_BUILD}")
    native.kvrelay_sources.restype = ctypes.c_char_p
    if native.kvrelay_sources().decode() != sources_digest():
        raise OSError(f"{library.name} was built from other sources: {HOW_TO_BUILD}")
    native.kvrelay_error.restype = ctypes.c_char_p
    native.kvrelay_model_new.restype = c_void_p
    native.kvrelay_model_new.argtypes = (POINTER(Shape), c_int)
    native.kvrelay_model_free.restype = None
    native.kvrelay_model_free.argtypes = (c_void_p,)
    native.kvrelay_set_matrix.argtypes = (
        *(c_void_p, c_int, c_int, c_int, c_int),
        *(c_void_p, c_void_p),
    )
    native.kvrelay_set_norm.argtypes = (c_void_p, c_int, c_int, c_void_p)
    native.kvrelay_set_ends.argtypes = (
        *(c_void_p, c_void_p, c_void_p),
        *(c_int, c_void_p, c_void_p),
    )
    native.kvrelay_set_cache.restype = None
    native.kvrelay_set_cache.argtypes = (c_void_p, c_void_p)
    native.kvrelay_set_threads.restype = None
    native.kvrelay_set_threads.argtypes = (c_void_p, c_int)
    native.kvrelay_num_bytes.restype = ctypes.c_size_t
    native.kvrelay_num_bytes.argtypes = (c_void_p,)
    native.kvrelay_keep.restype = None
    native.kvrelay_keep.argtypes = (c_int, c_void_p, c_int, c_int, c_void_p, c_void_p)
    native.kvrelay_step.argtypes = (
        *(c_void_p, c_void_p, c_int),
        *(c_void_p, c_void_p, c_void_p, c_void_p),
    )
    return native


def keep(kind: str, x: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], ...]:
    """What the engine keeps of one slot's K or V, [num_kv_heads, head_dim]: values and scales."""
    assert x.flags.c_contiguous
    heads, dim = x.shape
    values = np.zeros(heads * dim * (2 if kind == "bfloat16" else 1), dtype=np.uint8)
    scales = np.zeros(heads * 2, dtype=np.uint8)
    load().kvrelay_keep(
        KV_KINDS[kind], x.ctypes.data, heads, dim, values.ctypes.data, scales.ctypes.data
    )
    return values, scales


class NativeModel:
    """One model's packed weights and the threads that compute with them."""

    def __init__(self, shape: Shape, *, max_threads: int) -> None:
        self._model: int | None = None
        self._native = load()
        self._model = self._native.kvrelay_model_new(ctypes.byref(shape), max_threads)
        if not self._model:
            raise MemoryError(self._error())
        self._vocab_size = shape.vocab_size

    def close(self) -> None:
        """End the threads and free the weights. Safe to repeat."""
        if self._model:
            self._native.kvrelay_model_free(self._model)
            self._model = None

    def __del__(self) -> None:
        self.close()

    @property
    def num_bytes(self) -> int:
        """Of weights."""
        return int(self._native.kvrelay_num_bytes(self._model))

    def set_matrix(
        self, layer: int, path: NativePath, product: Product, *, kind: str, data: int, bias: int
    ) -> None:
        """Pack a matrix. `data` and `bias` (0: none) are addresses, free again on return."""
        self._check(
            self._native.kvrelay_set_matrix(
                self._model, layer, path, product, WEIGHT_KINDS[kind], data, bias or None
            )
        )

    def set_norm(self, layer: int, norm: Norm, weights: int) -> None:
        self._check(self._native.kvrelay_set_norm(self._model, layer, norm, weights))

    def set_ends(
        self, *, embedding: int, last_norm: int, head_kind: str, head: int, rope: int
    ) -> None:
        """What comes before the layers and after; everything is copied."""
        kind = WEIGHT_KINDS[head_kind]
        self._check(
            self._native.kvrelay_set_ends(self._model, embedding, last_norm, kind, head, rope)
        )

    def set_cache(self, address: int) -> None:
        """The KV's memory, which must outlive this object's last step."""
        self._native.kvrelay_set_cache(self._model, address)

    def set_threads(self, num_threads: int) -> None:
        """How many compute from now on, up to `max_threads`. Bits do not depend on it."""
        self._native.kvrelay_set_threads(self._model, num_threads)

    def step(
        self,
        runs: npt.NDArray[np.int32],
        token_ids: npt.NDArray[np.int32],
        tables: npt.NDArray[np.int32],
        logits: npt.NDArray[np.float32],
        likeliest: npt.NDArray[np.int32],
    ) -> None:
        """Compute rows, write their KV and the logits that are asked for.

        The caller answers for `tables`: whatever they name is read and written.

        Args:
            runs: [num_runs, len(RUN_FIELDS)].
            token_ids: of all runs.
            tables: block ids of all runs.
            logits: [rows that sample, vocab_size], written.
            likeliest: [rows that sample], written; -1 where a logit is not finite.

        Raises:
            RuntimeError: a token or position is none of this model's; nothing was computed.
        """
        assert logits.shape == (len(likeliest), self._vocab_size)
        arrays: Sequence[npt.NDArray[np.generic]] = (runs, token_ids, tables, logits, likeliest)
        assert all(array.flags.c_contiguous for array in arrays)
        self._check(
            self._native.kvrelay_step(
                self._model,
                runs.ctypes.data,
                len(runs),
                token_ids.ctypes.data,
                tables.ctypes.data,
                logits.ctypes.data,
                likeliest.ctypes.data,
            )
        )

    def _check(self, failed: int) -> None:
        if failed:
            raise RuntimeError(self._error())

    def _error(self) -> str:
        return str(self._native.kvrelay_error().decode(errors="replace"))
