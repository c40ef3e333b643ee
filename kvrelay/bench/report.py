"""A benchmark in words and in JSON.

Pure. Words are rows of text for any kind of table; JSON holds every number that was measured,
and no prompt.
"""

import textwrap
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from kvrelay.bench.base import Record, Served
from kvrelay.bench.plan import Plan, Run
from kvrelay.bench.stats import Handoffs, Summary, Targets, Totals

FACT_CHARS = 96
"""Most of a line that has no table's width."""

FORMAT = 1
"""Grows when a reader of older JSON would misunderstand newer."""

LAG_P99_LIMIT_S = 0.010
"""A generator later than this was not the load it was asked to be."""

CPU_SHARE_LIMIT = 0.8
RATE_LIMIT = 0.2
"""Poisson arrivals of fifty requests or more seldom miss their rate by this share."""

HEADINGS = ("", "p50", "p90", "p99", "max")

_LABELS = {
    "ttft_s": "TTFT",
    "gap1_s": "gap 1",
    "handoff_tax_s": "handoff tax",
    "handoff_tax_of_ttft": "  of TTFT",
    "handoff_tax_steps": "  in steps",
    "itl_s": "ITL",
    "tpot_s": "TPOT",
    "max_stall_s": "max stall",
    "e2e_s": "E2E",
}

Row = tuple[str, ...]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _number(value: float) -> str:
    return f"{value:.2f}"


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    size = abs(seconds)
    if size >= 0.9995:
        return f"{seconds:.2f} s" if size < 10 else f"{seconds:.1f} s"
    ms = seconds * 1e3
    if abs(ms) >= 99.95:
        return f"{ms:.0f} ms"
    return f"{ms:.1f} ms" if abs(ms) >= 9.995 else f"{ms:.2f} ms"


_SHOWN_AS = {"handoff_tax_of_ttft": _percent, "handoff_tax_steps": _number}
"""Measures that are no durations."""


def rows(totals: Totals) -> list[Row]:
    """The distributions of one run, a measure each, under `HEADINGS`."""
    return [
        (label, *_numbers(summary, _SHOWN_AS.get(name, duration)))
        for name, label in _LABELS.items()
        if (summary := totals.measures[name]) is not None
    ]


def _numbers(summary: Summary, shown: Callable[[float], str]) -> Row:
    return tuple(shown(v) for v in (summary.p50, summary.p90, summary.p99, summary.max))


def title(run: Run, plan: Plan) -> str:
    """What was done in this run and how it ended."""
    totals = run.totals
    if not plan.is_open_loop:
        what = f"closed loop, {_count(plan.num_clients, 'client')}"
    elif run.rate is None:
        what = "open loop, the trace's own times"
    else:
        what = f"open loop, {run.rate:g} requests/s"
    if totals.offered_per_s is not None:
        what += f" ({totals.offered_per_s:.2f} came)"
    ended = f"{totals.num_finished} of {_count(totals.num_requests, 'request')} finished"
    return f"{what}: {ended} in {duration(totals.wall_s)}"


def facts(run: Run, targets: Targets) -> list[str]:
    """The totals of one run, a line each."""
    totals = run.totals
    cached = "" if totals.cached_share is None else f" ({totals.cached_share:.0%} of them cached)"
    return [
        f"{totals.output_tokens_per_s:.1f} output tokens/s, "
        f"{totals.prompt_tokens_per_s:.1f} prompt tokens/s{cached}",
        f"goodput {totals.goodput_per_s:.2f} requests/s: {totals.attainment:.0%} met "
        f"{targets_text(targets)}",
        *_handoff_facts(totals.handoffs),
        _generator(run),
    ]


def _handoff_facts(handoffs: Handoffs | None) -> list[str]:
    if handoffs is None:
        return []
    ways = ", ".join(f"{name} {count}" for name, count in handoffs.by_transport.items())
    share = handoffs.overlapped_share
    early = "" if share is None else f", {share:.0%} of it while prefilling"
    stages = ", ".join(f"{name} {duration(s.p50)}" for name, s in handoffs.stages.items())
    moved = f"handoffs by transport: {ways}; {handoffs.num_bytes / 1e6:.1f} MB of KV moved{early}"
    told = textwrap.wrap(f"gap 1 by stage, p50: {stages}", FACT_CHARS, subsequent_indent="  ")
    return [moved, *told] if stages else [moved]


def targets_text(targets: Targets) -> str:
    """Without these a goodput says nothing."""
    return f"TTFT ≤ {duration(targets.ttft_s)} and TPOT ≤ {duration(targets.tpot_s)}"


def _generator(run: Run) -> str:
    lag = run.totals.measures["lag_s"]
    late = "" if lag is None else f"lag p99 {duration(lag.p99)}, max {duration(lag.max)}; "
    return f"generator: {late}CPU {run.generator_cpu_share:.0%} of a core"


def warnings(run: Run) -> list[str]:
    """What a reader must know before believing the rest."""
    totals, found = run.totals, []
    if totals.errors:
        told = ", ".join(f"{reason} {count}" for reason, count in totals.errors.items())
        failed = totals.num_requests - totals.num_finished
        found.append(f"{_count(failed, 'request')} failed: {told}")
    if totals.num_short:
        found.append(
            f"{_count(totals.num_short, 'answer')} shorter than asked for: "
            "the server ended by itself"
        )
    came = totals.offered_per_s
    if run.rate and came and abs(came / run.rate - 1) > RATE_LIMIT:
        found.append(
            f"{came:.2f} requests/s came where {run.rate:g} were asked for: "
            "a longer run comes closer"
        )
    lag = totals.measures["lag_s"]
    if lag is not None and lag.p99 > LAG_P99_LIMIT_S:
        found.append(
            f"the generator fell behind: lag p99 {duration(lag.p99)} is over "
            f"{duration(LAG_P99_LIMIT_S)}; latencies include it"
        )
    if run.generator_cpu_share > CPU_SHARE_LIMIT:
        found.append(
            f"the generator used {run.generator_cpu_share:.0%} of a core: "
            "part of these latencies is its own"
        )
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


SWEEP_HEADINGS = (
    *("rate", "failed", "TTFT p50", "TTFT p99", "ITL p99", "TPOT p99", "max stall"),
    *("output tok/s", "goodput /s", "met"),
)


def sweep(runs: list[Run]) -> list[Row]:
    """All runs against their rates, under `SWEEP_HEADINGS`."""
    return [_sweep_row(run) for run in runs]


def _sweep_row(run: Run) -> Row:
    totals = run.totals

    def of(name: str, number: str) -> str:
        summary = totals.measures[name]
        return "–" if summary is None else duration(getattr(summary, number))

    return (
        "trace" if run.rate is None else f"{run.rate:g} /s",
        str(totals.num_requests - totals.num_finished),
        of("ttft_s", "p50"),
        of("ttft_s", "p99"),
        of("itl_s", "p99"),
        of("tpot_s", "p99"),
        of("max_stall_s", "max"),
        f"{totals.output_tokens_per_s:.1f}",
        f"{totals.goodput_per_s:.2f}",
        f"{totals.attainment:.0%}",
    )


def to_json(
    runs: list[Run],
    plan: Plan,
    served: Served,
    *,
    protocol: str,
    address: str,
    vocab_size: int,
    command: list[str],
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything, for machines. Instants of a request count from the start of its run."""
    return {
        "format": FORMAT,
        "command": command,
        "machine": dict(machine),
        "server": {"protocol": protocol, "address": address, "model": served.model},
        "mode": "open" if plan.is_open_loop else "closed",
        "clients": None if plan.is_open_loop else plan.num_clients,
        "workload": f"trace of {len(plan.trace)} requests" if plan.trace else str(plan.mix),
        "seed": plan.seed,
        "temperature": plan.temperature,
        "vocab_size": vocab_size,
        "warm_up_requests": plan.num_warm_up,
        "timeout_s": plan.timeout_s,
        "targets": asdict(plan.targets),
        "runs": [_run_json(run) for run in runs],
    }


def _run_json(run: Run) -> dict[str, Any]:
    return {
        "rate_per_s": run.rate,
        "generator_cpu_share": run.generator_cpu_share,
        "totals": asdict(run.totals),
        "requests": [_record_json(record) for record in run.records],
    }


def _record_json(record: Record) -> dict[str, Any]:
    return asdict(record) | {name: getattr(record, name) for name in _DERIVED}


_DERIVED = (
    *("ttft_s", "gap1_s", "tpot_s", "max_stall_s", "e2e_s"),
    *("handoff_tax_s", "handoff_tax_of_ttft", "handoff_tax_steps"),
)
