"""Kernels agree with their references, and compile for a device, where there is none.

Interpreted in a process of their own: whether Triton interprets is settled when it is loaded.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.support import kernel_code

ROOT = Path(__file__).parents[2]


def why_not() -> str | None:
    try:
        if version("triton") < "3.7" and version("numpy") >= "2.4":
            return "this triton's interpreter does not work with this numpy"
    except PackageNotFoundError:
        return "triton is not installed"
    return None


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("file", ["tests/gpu/test_kernels.py", "tests/gpu/test_wire_kernels.py"])
def test_interpreted_kernels_agree_with_their_references(file):
    """What a forward pass is made of, at small sizes and in float32; and KV on its way."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", file],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert ended.returncode == 0, ended.stdout[-4000:]
    assert " passed" in ended.stdout
    assert "skipped" not in ended.stdout


@pytest.mark.skipif(not kernel_code.CAN_COMPILE, reason="triton or its assembler is missing")
@pytest.mark.parametrize("name", kernel_code.CASES)
def test_kernels_compile_for_hopper_as_they_are_meant_to(name, tmp_path, monkeypatch):
    """No register is spilled, tiles fit into shared memory with room for what is asked for, and
    products run on the matrix units."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = kernel_code.CASES[name]
    code = kernel_code.compiled(case, capability=90)

    assert code.stack_num_bytes == 0, code
    assert code.num_spill_loads == 0, code
    assert code.shared_num_bytes <= case.max_shared_num_bytes, code
    assert code.num_matrix_instructions >= case.min_matrix_instructions, code
