"""A run of the device's benchmark, as tables people read and JSON programs read."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.bench.gpu_limits import Limits
from tests.bench.gpu_ours import DecodeResult, PrefillResult, ProductResult


@dataclass(frozen=True, slots=True)
class Batch:
    """The same requests, all at once, through both."""

    num_requests: int
    prompt_tokens: int
    output_tokens: int
    ours_tokens_per_s: tuple[float, ...]
    theirs_tokens_per_s: tuple[float, ...]


@dataclass(slots=True, kw_only=True)
class Report:
    machine: dict[str, object]
    command: str
    model: str
    limits: Limits
    decode: list[DecodeResult] = field(default_factory=list)
    prefill: list[PrefillResult] = field(default_factory=list)
    products: list[ProductResult] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write(report: Report, directory: Path, *, device: str) -> tuple[Path, Path]:
    """`gpu-DEVICE.md` and `.json` in `directory`, which is made if it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    markdown, data = (directory / f"gpu-{device}.{suffix}" for suffix in ("md", "json"))
    markdown.write_text(as_markdown(report, device=device), encoding="utf-8")
    data.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return markdown, data


def as_markdown(report: Report, *, device: str) -> str:
    limits = report.limits
    sections = [
        f"# GPU: {device}",
        f"{report.model}. Written by `{report.command}`.",
        _table(("machine", ""), report.machine.items()),
        "Limits measured in the same run: a copy within the device moves "
        f"{limits.copy_bytes_per_s / 1e12:.2f} TB/s (read and written), a product of "
        f"bfloat16 matrices makes {limits.matmul_flop_per_s / 1e12:.0f} TFLOP/s.",
        "## Decode",
        "Times are of whole steps as the engine sees them, medians. The limit is the time that "
        "the bytes a step must read take at the copy's rate.",
        _table(
            ("weights", "batch", "context", "sampling", "ms/step", "tokens/s", "of the limit"),
            (
                (
                    each.kind,
                    each.batch,
                    each.context_tokens,
                    each.sampling,
                    f"{each.step_s * 1e3:.2f}",
                    f"{each.batch / each.step_s:.0f}",
                    _percent(each.num_bytes / limits.copy_bytes_per_s / each.step_s),
                )
                for each in report.decode
            ),
        ),
        "## Prefill",
        "One prompt in one step, with its first token.",
        _table(
            ("products", "tokens", "ms", "tokens/s", "of the product's rate"),
            (
                (
                    each.product,
                    each.num_tokens,
                    f"{each.step_s * 1e3:.1f}",
                    f"{each.num_tokens / each.step_s:.0f}",
                    _percent(each.flop / limits.matmul_flop_per_s / each.step_s),
                )
                for each in report.prefill
            ),
        ),
        "## Beside transformers' continuous batching",
        _table(
            ("requests", "in", "out", "ours tok/s", "theirs tok/s", "ratio of medians"),
            (
                (
                    each.num_requests,
                    each.prompt_tokens,
                    each.output_tokens,
                    f"{_median(each.ours_tokens_per_s):.0f}",
                    *_beside(each),
                )
                for each in report.batches
            ),
        ),
        "## Products, matrix by matrix",
        "Every layer's in turn, so that none is found in a cache. Shares are of the copy's rate "
        "and of the product's.",
        _table(
            ("product", "by", "rows", "µs", "of copy", "of product"),
            (
                (
                    each.name,
                    each.kind,
                    each.num_rows,
                    f"{each.product_s * 1e6:.1f}",
                    _percent(each.num_bytes / limits.copy_bytes_per_s / each.product_s),
                    _percent(each.flop / limits.matmul_flop_per_s / each.product_s),
                )
                for each in report.products
            ),
        ),
        *(f"- {note}" for note in report.notes),
    ]
    return "\n\n".join(sections) + "\n"


def _beside(batch: Batch) -> tuple[str, str]:
    if not batch.theirs_tokens_per_s:
        return "not measured", "not measured"
    ours, theirs = _median(batch.ours_tokens_per_s), _median(batch.theirs_tokens_per_s)
    return f"{theirs:.0f}", f"{ours / theirs:.2f}"


def _table(head, rows) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"


def _median(values: tuple[float, ...]) -> float:
    return sorted(values)[len(values) // 2]
