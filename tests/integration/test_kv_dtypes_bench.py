"""The benchmark of KV's dtypes works, and what it finds is of the size that rounding makes."""

import json

import pytest
import torch

from kvrelay.native.library import why_not
from tests.bench import kv_dtypes
from tests.integration.test_mixed_layouts import WIRES

pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]


def test_rounded_kv_changes_logits_a_little(real_model, tmp_path):
    """Int8 less than fp8; and never so much that another answer comes of it."""
    before = torch.get_num_threads()
    try:
        assert kv_dtypes.main(["errors", "--prompts", "3", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(before)
    report = json.loads((tmp_path / "kv-dtypes.json").read_text(encoding="utf-8"))
    kl = {
        tuple(row["way"].values()): row["kl"]
        for row in report["errors"]["rows"]
        if row["where"] == "forced"
    }
    everywhere = {dtype: kl[dtype, dtype, dtype, "native"] for dtype in ("fp8", "int8")}
    assert 0 < everywhere["int8"] < everywhere["fp8"] < 0.1
    text = (tmp_path / "kv-dtypes.md").read_text(encoding="utf-8")
    assert "| bfloat16 | int8, asked for | bfloat16 |" in text
    assert all(
        f"| {prefill} | {wire} | {decode} |" in text for (prefill, decode), wire in WIRES.items()
    )
    assert "## Time" not in text
