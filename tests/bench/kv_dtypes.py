"""What KV in fewer bytes costs and gains: `python -m tests.bench.kv_dtypes --out docs/results`.

Two parts, `errors` and `speed`; each keeps the other's figures of before. Needs the compiled
CPU engine and the model of the demo.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from kvrelay.bench import machine
from kvrelay.native.library import why_not
from kvrelay.store.manifest import resolve_model
from tests.bench import kv_dtype_errors, kv_dtype_speed
from tests.bench.kv_dtype_errors import NUM_FORCED
from tests.support.prompts import prompts

MODEL = "smollm2-135m-instruct"
PARTS = ("errors", "speed")


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    if (reason := why_not()) is not None:
        sys.stderr.write(f"error: nothing to measure: {reason}\n")
        return 2
    model_dir = resolve_model(MODEL)
    data = args.out / "kv-dtypes.json"
    report = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    for part in args.parts or PARTS:
        report[part] = {
            "machine": machine.describe(),
            "command": shlex.join(["python", "-m", "tests.bench.kv_dtypes", *argv]),
            "threads": args.threads,
            **(_errors(model_dir, args) if part == "errors" else _speed(model_dir, args)),
        }
    args.out.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "kv-dtypes.md").write_text(as_markdown(report), encoding="utf-8")
    return 0


def as_markdown(report: dict) -> str:
    sections = [
        "# KV in fewer bytes",
        f"What `kv_dtype` fp8 and int8 do to the logits of {MODEL}, and to the time of a step. "
        "fp8 is e4m3 without scales; int8 has one bfloat16 scale per layer, K or V, slot and "
        "head. Weights are the same in all rows, the compiled engine's own (4-bit blocks for "
        "generated tokens).",
    ]
    if errors := report.get("errors"):
        sections += _error_sections(errors)
    if speed := report.get("speed"):
        sections += _speed_sections(speed)
    return "\n\n".join(sections) + "\n"


def _errors(model_dir: Path, args: argparse.Namespace) -> dict[str, object]:
    asked = prompts(model_dir)[: args.prompts]
    found = kv_dtype_errors.measured(model_dir, asked, num_threads=args.threads)
    return {"prompts": [len(prompt) for prompt in asked], "rows": [asdict(it) for it in found]}


def _speed(model_dir: Path, args: argparse.Namespace) -> dict[str, object]:
    found = kv_dtype_speed.measured(model_dir, num_threads=args.threads)
    return {"rows": [asdict(it) for it in found]}


def _error_sections(part: dict) -> list[str]:
    lengths = part["prompts"]
    first = [it for it in part["rows"] if it["where"] == "first"]
    forced = [it for it in part["rows"] if it["where"] == "forced"]
    by_prefill = {(it["way"]["engine"], it["way"]["prefill"]): it for it in first}
    by_prefill.pop(("native", "bfloat16"), None)
    head = ("mean abs", "rms", "largest", "KL, nats", "same top 1", "largest gap lost")
    return [
        "## Logits",
        f"{len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens of English text; "
        f"after each, {NUM_FORCED} forced tokens, those that bfloat16 KV chooses greedily. Each "
        "row is compared with the same row of bfloat16 KV on both sides. KL is from bfloat16's "
        "distribution at temperature 1, mean of all rows. The last column: by how much bfloat16 "
        "had preferred its own token where another one became likeliest. "
        "The line of the torch engine, which sums in another order and has bfloat16 weights for "
        "generated tokens too, tells what is noise anyway.",
        _machine(part),
        "After the prompt, by what KV the prompt was computed with:",
        _table(
            ("KV", *head),
            [
                (dtype if engine == "native" else f"{dtype}, torch engine", *_figures(it))
                for (engine, dtype), it in by_prefill.items()
            ],
        ),
        "After the forced tokens, by what KV the prefill worker has, what travels, and what the "
        "decode worker has; what travels is what `wire_dtype = auto` comes to, unless it was asked "
        "for:",
        _table(
            ("prefill", "wire", "decode", *head),
            [
                (
                    it["way"]["prefill"],
                    it["way"]["wire"] + (", asked for" if _is_asked_for(it["way"]) else ""),
                    it["way"]["decode"]
                    + ("" if it["way"]["engine"] == "native" else ", torch engine"),
                    *_figures(it),
                )
                for it in forced
            ],
        ),
        "A decode worker that asks for bfloat16 rounds what lands instead of what leaves, to the "
        "same bits. Block sizes may differ as well, and change no bit either, so they have no line "
        "here: `tests/integration/test_mixed_layouts.py` holds workers to that in all nine pairs "
        "of 16, 32 and 64 slots, for each of these lines.",
    ]


def _is_asked_for(way: dict) -> bool:
    """Neither side keeps KV in what travels."""
    return way["wire"] not in (way["prefill"], way["decode"])


def _figures(it: dict) -> tuple[str, ...]:
    return (
        f"{it['mean']:.4f}",
        f"{it['rms']:.4f}",
        f"{it['largest']:.2f}",
        f"{it['kl']:.2e}",
        f"{100 * it['top1']:.1f} %",
        f"{it['largest_gap']:.3f}",
    )


def _speed_sections(part: dict) -> list[str]:
    rows = part["rows"]
    plain = {
        (it["batch"], it["context_tokens"]): it["step_s"]
        for it in rows
        if it["kv_dtype"] == "bfloat16"
    }
    return [
        "## Time",
        f"Medians of whole steps, all dtypes in turn, {part['threads']} thread(s).",
        _machine(part),
        _table(
            ("batch", "context", "KV", "ms/step", "/ bfloat16"),
            [
                (
                    it["batch"] or "a prompt",
                    it["context_tokens"],
                    it["kv_dtype"],
                    f"{it['step_s'] * 1e3:.2f}",
                    f"{it['step_s'] / plain[it['batch'], it['context_tokens']]:.2f} ×",
                )
                for it in rows
            ],
        ),
    ]


def _machine(part: dict) -> str:
    return _table(("machine", ""), [*part["machine"].items(), ("command", f"`{part['command']}`")])


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kv_dtypes", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help="errors, speed; both if none")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), metavar="DIR")
    parser.add_argument("--prompts", type=int, default=None, help="only the shortest N")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    return args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
