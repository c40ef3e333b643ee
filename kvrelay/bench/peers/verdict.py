"""What the figures say: medians, ratios, and whether each target was met.

Pure. A median of repetitions is a value that was measured, the lower one of two in the middle; a
worst case is the worst of all repetitions, never a median of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kvrelay.bench.peers.pins import KVRELAY, LLAMA_CPP, ONE_CORE, VLLM, VLLM_ALL_CORES
from kvrelay.bench.report import duration
from kvrelay.bench.stats import percentile

Figures = Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]
"""By system, work and metric: one value a repetition."""


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is written and what is made of its repetitions."""

    label: str
    text: Callable[[float], str]
    is_worst: bool = False


METRICS: Mapping[str, Metric] = {
    "start_s": Metric("start to ready", duration),
    "rss_gib": Metric("resident memory, summed", lambda v: f"{v:.2f} GiB"),
    "pss_gib": Metric("resident memory, shared pages once", lambda v: f"{v:.2f} GiB"),
    "ttft_s": Metric("TTFT p50", duration),
    "ttft_p99_s": Metric("TTFT p99", duration),
    "tpot_s": Metric("TPOT p50", duration),
    "tpot_p99_s": Metric("TPOT p99", duration),
    "output_tokens_per_s": Metric("output tokens/s", lambda v: f"{v:.0f}"),
    "prefill_tokens_per_s": Metric("prompt tokens/s", lambda v: f"{v:.0f}"),
    "offered_per_s": Metric("requests/s that came", lambda v: f"{v:.2f}"),
    "goodput_per_s": Metric("goodput, requests/s", lambda v: f"{v:.2f}"),
    "attainment": Metric("met both targets", lambda v: f"{v:.0%}"),
    "late_itl_s": Metric("ITL p50 after token 2", duration),
    "late_itl_p99_s": Metric("ITL p99 after token 2", duration),
    "max_stall_s": Metric("longest gap after token 2", duration, is_worst=True),
}


def value(figures: Figures, system: str, work: str, metric: str) -> float | None:
    """The one number of a metric; None if it was not measured."""
    values = sorted(figures.get(system, {}).get(work, {}).get(metric, ()))
    if not values:
        return None
    return values[-1] if METRICS[metric].is_worst else percentile(values, 0.5)


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Ours over theirs; infinite over nothing, None where either was not measured."""
    if ours is None or theirs is None:
        return None
    if theirs == 0:
        return float("inf") if ours else None
    return ours / theirs


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One line of what is wanted: a value of ours, or its ratio to a peer's, against a limit."""

    title: str
    work: str
    metric: str
    limit: float
    is_at_least: bool = False
    system: str = KVRELAY
    peer: str = ""
    """Empty: the value itself is held against the limit."""

    def found(self, figures: Figures) -> float | None:
        ours = value(figures, self.system, self.work, self.metric)
        if not self.peer:
            return ours
        return ratio(ours, value(figures, self.peer, self.work, self.metric))

    def is_met(self, found: float) -> bool:
        return found >= self.limit if self.is_at_least else found <= self.limit

    def text(self, number: float) -> str:
        return f"{number:.2f} ×" if self.peer else METRICS[self.metric].text(number)

    @property
    def wanted(self) -> str:
        return f"{'≥' if self.is_at_least else '≤'} {self.text(self.limit)}"


_CALLED = {LLAMA_CPP: "llama.cpp", VLLM: "vLLM-CPU", VLLM_ALL_CORES: "vLLM-CPU, all cores"}
_VLLMS = (VLLM, VLLM_ALL_CORES)


def _of_peer(
    title: str,
    work: str,
    metric: str,
    limit: float,
    peers: Sequence[str],
    *,
    is_at_least: bool = True,
    system: str = KVRELAY,
) -> tuple[Target, ...]:
    """The same ratio to each of several peers."""
    return tuple(
        Target(
            title=f"{title} / {_CALLED[peer]}",
            work=work,
            metric=metric,
            limit=limit,
            is_at_least=is_at_least,
            system=system,
            peer=peer,
        )
        for peer in peers
    )


def _prefill(num_tokens: int) -> tuple[Target, ...]:
    what, work = f"prefill of {num_tokens}, tokens/s", f"prefill-{num_tokens}"
    metric = "prefill_tokens_per_s"
    return (
        *_of_peer(what, work, metric, 1.5, _VLLMS),
        *_of_peer(f"{what} on one core", work, metric, 1.0, _VLLMS, system=ONE_CORE),
    )


def _mixed(rate: float) -> tuple[Target, ...]:
    what, work = f"mixed at {rate}/s", f"mixed-{rate}"
    gap = f"{what}: longest gap after token 2"
    return (
        *_of_peer(f"{what}: goodput", work, "goodput_per_s", 2.0, (VLLM,)),
        Target(title=gap, work=work, metric="max_stall_s", limit=0.15),
    )


_TPOT, _RATE = "1 client: TPOT", "16 clients: output tokens/s"

TARGETS = (
    *_of_peer(_TPOT, "batch-1", "tpot_s", 0.75, (LLAMA_CPP,), is_at_least=False),
    *_of_peer(_TPOT, "batch-1", "tpot_s", 0.45, _VLLMS, is_at_least=False),
    *_of_peer(_RATE, "16-clients", "output_tokens_per_s", 1.75, _VLLMS),
    *_of_peer(_RATE, "16-clients", "output_tokens_per_s", 3.0, (LLAMA_CPP,)),
    *_prefill(1024),
    *_prefill(1500),
    *_mixed(1.0),
    *_mixed(1.5),
    Target(title="start to ready", work="start", metric="start_s", limit=6.0),
    Target(title="all processes: resident memory", work="memory", metric="rss_gib", limit=2.5),
)


def best_ratio(figures: Figures, target: Target) -> float | None:
    """The largest ratio of goodput that the load allows: all of what came, over the peer's. None
    for other metrics.
    """
    if target.metric != "goodput_per_s":
        return None
    ours = value(figures, target.system, target.work, "goodput_per_s")
    share = value(figures, target.system, target.work, "attainment")
    theirs = value(figures, target.peer, target.work, "goodput_per_s")
    return ratio(ours / share if ours and share else None, theirs)


Row = tuple[str, ...]
TARGET_HEADINGS = ("target", "wanted", "measured", "")


def target_rows(figures: Figures) -> list[Row]:
    """Every target, met or not or not measured."""
    rows: list[Row] = []
    for target in TARGETS:
        found = target.found(figures)
        if found is None:
            rows.append((target.title, target.wanted, "not measured", ""))
            continue
        best = best_ratio(figures, target)
        bound = f" (at most {target.text(best)} possible)" if best is not None else ""
        met = "met" if target.is_met(found) else "missed"
        rows.append((target.title, target.wanted, target.text(found) + bound, met))
    return rows


def headings(systems: Sequence[str], titles: Mapping[str, str]) -> Row:
    """Of the table of figures."""
    ratios = tuple(f"/ {titles[peer]}" for peer in _CALLED if peer in systems)
    return ("", *(titles[system] for system in systems), *ratios)


def figure_rows(
    figures: Figures, systems: Sequence[str], works: Sequence[tuple[str, str, Sequence[str]]]
) -> list[tuple[str, list[Row]]]:
    """For each work (name, title, metrics) its title and its rows; those without a figure are left
    out.
    """
    found = []
    for name, title, metrics in works:
        rows = [row for metric in metrics if (row := _row(figures, systems, name, metric))]
        if rows:
            found.append((title, rows))
    return found


def _row(figures: Figures, systems: Sequence[str], work: str, metric: str) -> Row | None:
    values = [value(figures, system, work, metric) for system in systems]
    if all(v is None for v in values):
        return None
    how = METRICS[metric]
    cells = ["–" if v is None else how.text(v) for v in values]
    ours = value(figures, KVRELAY, work, metric)
    for peer in _CALLED:
        if peer in systems:
            share = ratio(ours, value(figures, peer, work, metric))
            cells.append("" if share is None else f"{share:.2f} ×")
    return (how.label, *cells)
