"""Goodput and p99 TTFT against the rate, as a picture. Needs the extra `plot`."""

import importlib
from pathlib import Path
from types import ModuleType

from kvrelay.bench.plan import Run
from kvrelay.bench.report import targets_text
from kvrelay.bench.stats import Targets
from kvrelay.config import SettingsError

_DOTS_PER_INCH = 150


def require() -> ModuleType:
    """Matplotlib's figures.

    Raises:
        SettingsError: the extra is not installed.
    """
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError:
        raise SettingsError("--plot needs matplotlib: pip install 'kvrelay[plot]'") from None


def draw(runs: list[Run], targets: Targets, *, title: str, path: Path) -> None:
    """Write a picture of runs at several rates."""
    figure = require().Figure(figsize=(8, 6), layout="constrained")
    goodput, ttft = figure.subplots(2, 1, sharex=True)
    timed = sorted((run for run in runs if run.rate), key=lambda run: run.rate or 0.0)
    rates = [run.rate for run in timed]
    came = [run.totals.offered_per_s or run.rate for run in timed]
    good = [run.totals.goodput_per_s for run in timed]
    goodput.plot(rates, came, color="0.7", linestyle="--", label="requests that came")
    goodput.plot(rates, good, marker="o", clip_on=False, label="goodput")
    goodput.set_ylabel("requests/s")
    goodput.set_title(f"{title}\ngood: {targets_text(targets)}", fontsize=10)
    for number in ("p50", "p99"):
        points = [(run.rate, run.totals.measures["ttft_s"]) for run in timed]
        known = [(rate, getattr(summary, number)) for rate, summary in points if summary]
        ttft.plot(
            [rate for rate, _ in known], [s for _, s in known], marker="o", label=f"TTFT {number}"
        )
    ttft.axhline(targets.ttft_s, color="0.7", linestyle="--", label="target")
    ttft.set_ylabel("TTFT (s)")
    ttft.set_xlabel("rate (requests/s)")
    for axes in (goodput, ttft):
        axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=_DOTS_PER_INCH)
