"""Kernels compiled for a device that is not there, by Triton and the assembler it brings."""

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvrelay.kernels import (
    digest,
    few_rows,
    generation_attention,
    many_rows,
    mlp,
    norm,
    prompt_attention,
    rope,
    sampling,
    wire,
)
from kvrelay.kernels.lang import HAS_TRITON
from kvrelay.kernels.matrix import Kind
from kvrelay.kv.layout import DTYPE_NUM_BYTES

TOOLS = Path()
if HAS_TRITON:
    import triton

    TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

CAN_COMPILE = HAS_TRITON and (TOOLS / "cuobjdump").exists() and (TOOLS / "ptxas").exists()

SHARED_OF_HOPPER = 227 << 10
HALF_OF_HOPPER = SHARED_OF_HOPPER // 2
"""Two programs on a multiprocessor."""


@dataclass(frozen=True)
class Case:
    """One kernel as it is launched for an 8B Llama; arguments not named are 32-bit integers."""

    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    floats: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    """Integers that no multiple of 16 is promised of."""

    num_warps: int = 4
    num_stages: int = 3
    max_shared_num_bytes: int = HALF_OF_HOPPER
    min_matrix_instructions: int = 0


@dataclass(frozen=True)
class Code:
    num_registers: int
    stack_num_bytes: int
    shared_num_bytes: int
    num_spill_loads: int
    num_matrix_instructions: int
    num_async_copies: int
    sass: str = field(repr=False)


def compiled(case: Case, *, capability: int) -> Code:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.pointers.get(name) or ("fp32" if name in case.floats else "i32")
        if name not in case.floats and name not in case.unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    made = triton.compile(
        ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        sass = _dump("--dump-sass", file.name)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Code(
        num_registers=int(registers),
        stack_num_bytes=int(stack),
        shared_num_bytes=made.metadata.shared,
        num_spill_loads=len(re.findall(r"\bLDL\b", sass)),
        num_matrix_instructions=len(re.findall(r"\b(?:HGMMA|QGMMA|HMMA)\b", sass)),
        num_async_copies=len(re.findall(r"\b(?:LDGSTS|UTMALDG)\b", sass)),
        sass=sass,
    )


def _dump(what: str, path: str) -> str:
    done = subprocess.run([TOOLS / "cuobjdump", what, path], capture_output=True, text=True)
    return done.stdout


def _few(kind: Kind, data: str, num_rows: int, block_k: int) -> Case:
    return Case(
        few_rows._few_rows_kernel,
        {"x": "*bf16", "data": data, "scale": "*fp32", "bias": "*bf16", "out": "*fp32"},
        {
            "KIND": few_rows.KINDS[kind],
            "HAS_BIAS": False,
            "EVEN_K": True,
            "ROWS": num_rows,
            "BLOCK_N": few_rows.BLOCK_N,
            "BLOCK_K": block_k,
        },
        unaligned=("num_rows", "scale_row_stride"),
        num_stages=few_rows.stages_of(kind, num_rows, block_k),
        min_matrix_instructions=1,
        max_shared_num_bytes=SHARED_OF_HOPPER if num_rows > 64 else HALF_OF_HOPPER,
    )


def _rewrite(source: str, target: str) -> Case:
    seen = {"bfloat16": "*i16", "float32": "*fp32", "fp8": "*u8", "int8": "*i8"}
    return Case(
        wire._rewrite_kernel,
        {
            "source": seen[source],
            "target": seen[target],
            **dict.fromkeys(("source_scales", "target_scales"), "*i16"),
            **dict.fromkeys(("source_offsets", "target_offsets"), "*i64"),
        },
        {
            "SOURCE": wire.CODES[source],
            "TARGET": wire.CODES[target],
            "SOURCE_NUM_BYTES": DTYPE_NUM_BYTES[source],
            "TARGET_NUM_BYTES": DTYPE_NUM_BYTES[target],
            "HEAD_DIM": 128,
            "DIM": 128,
            "ROWS": wire.TILE // 128,
        },
        unaligned=("first_token", "end_token", "source_first", "target_first", "num_heads"),
    )


_KV = {"q": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "block_tables": "*i32"}
_SUMS = {"tops": "*fp32", "totals": "*fp32", "positions": "*i32"}
_HEAD = {"HEAD_DIM": 128, "DIM": 128, "HAS_WINDOW": False}

CASES = {
    "norm": Case(
        norm._add_rms_norm_kernel,
        {"residual": "*fp32", "parts": "*fp32", "weight": "*fp32", "out": "*bf16"},
        {"NUM_PARTS": 4, "BLOCK": 4096},
        floats=("eps",),
        num_warps=16,
    ),
    "activation": Case(
        mlp._silu_mul_kernel,
        {"parts": "*fp32", "out": "*bf16"},
        {"NUM_PARTS": 1, "BLOCK": 2048},
    ),
    "rotation": Case(
        rope._rope_write_kernel,
        {
            **dict.fromkeys(("parts", "rope", "q_norm", "k_norm"), "*fp32"),
            **dict.fromkeys(("positions", "block_tables", "row_tables"), "*i32"),
            **dict.fromkeys(("q_out", "k_cache", "v_cache"), "*bf16"),
        },
        {"HEAD_DIM": 128, "HALF": 64, "NUM_PARTS": 4, "HAS_HEAD_NORM": True},
        floats=("eps",),
        unaligned=("num_q_heads", "num_kv_heads", "table_stride", "part_stride"),
        num_warps=1,
    ),
    "few rows, bfloat16, 16": _few("plain", "*bf16", 16, few_rows.BLOCK_K),
    "few rows, bfloat16, 128": _few("plain", "*bf16", 128, few_rows.BLOCK_K),
    "few rows, fp8, 16": _few("fp8", "*fp8e4nv", 16, few_rows.BLOCK_K),
    "few rows, int8, 16": _few("int8", "*i8", 16, 128),
    "few rows, int4, 64": _few("int4", "*u8", 64, 64),
    "many rows": Case(
        many_rows._many_rows_kernel,
        dict.fromkeys(("x", "weight", "bias", "out"), "*bf16"),
        {
            "HAS_BIAS": False,
            "EVEN_K": True,
            "BLOCK_M": many_rows.BLOCK_M,
            "BLOCK_N": many_rows.BLOCK_N,
            "BLOCK_K": many_rows.BLOCK_K,
            "GROUP_M": many_rows.GROUP_M,
        },
        unaligned=("num_rows",),
        num_warps=8,
        min_matrix_instructions=4,
        max_shared_num_bytes=SHARED_OF_HOPPER,
    ),
    "prompt attention": Case(
        prompt_attention._prompt_kernel,
        {
            **_KV,
            **dict.fromkeys(("tile_tables", "tile_rows", "tile_lengths"), "*i32"),
            "tile_positions": "*i32",
            "out": "*bf16",
        },
        {
            **_HEAD,
            "QUERY_TILE": prompt_attention.QUERY_TILE,
            "KEY_TILE": prompt_attention.KEY_TILE,
        },
        floats=("scale",),
        unaligned=("group_size", "window", "table_stride"),
        num_warps=8,
        num_stages=2,
        min_matrix_instructions=8,
    ),
    "split attention": Case(
        generation_attention._split_kernel,
        {**_KV, **_SUMS, "row_tables": "*i32", "values_out": "*fp32"},
        {
            **_HEAD,
            "GROUP": 16,
            "KEY_TILE": generation_attention.KEY_TILE,
            "SPLIT": generation_attention.SPLIT,
        },
        floats=("scale",),
        unaligned=("num_splits", "num_heads", "group_size", "window", "table_stride"),
        min_matrix_instructions=8,
    ),
    "combination": Case(
        generation_attention._combine_kernel,
        {**_SUMS, "values_in": "*fp32", "out": "*bf16"},
        {
            **_HEAD,
            "SPLIT": generation_attention.SPLIT,
            "COMBINE": generation_attention.COMBINE,
        },
        unaligned=("num_splits", "num_heads", "window"),
    ),
    "sampling": Case(
        sampling._sample_kernel,
        {
            **dict.fromkeys(("logits", "temperatures", "top_ps", "min_ps"), "*fp32"),
            "uniforms": "*fp32",
            "top_ks": "*i32",
            "chosen": "*i32",
        },
        {"BLOCK": sampling.MAX_BLOCK, "WAYS": sampling.WAYS},
        num_warps=16,
    ),
    "packing to int8": _rewrite("bfloat16", "int8"),
    "packing to fp8": _rewrite("bfloat16", "fp8"),
    "unpacking of int8": _rewrite("int8", "bfloat16"),
    "unpacking of fp8": _rewrite("fp8", "bfloat16"),
    "unpacking as it is": _rewrite("bfloat16", "bfloat16"),
    "digest": Case(
        digest._sum_kernel,
        dict.fromkeys(("words", "offsets", "sums"), "*i64"),
        {"TILE": digest.TILE, "NUM_TILES": digest.TILES_PER_PROGRAM},
    ),
    "end of a digest": Case(
        digest._finish_kernel,
        dict.fromkeys(("sums", "out"), "*i64"),
        {"NUM_PARTS": 128, "PARTS": 128},
    ),
}
