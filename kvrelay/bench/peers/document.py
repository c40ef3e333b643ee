"""A comparison on paper: markdown for people, JSON for machines.

Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvrelay.bench.peers import verdict
from kvrelay.bench.peers.verdict import Figures, Row

FORMAT = 1
"""Grows when a reader of older JSON would misunderstand newer."""

HOW = (
    "Every system was started alone, given the same works one after another, and ended before the "
    "next one started; client and system share the machine's cores. Prompts are random token ids, "
    "the same for all, `temperature 0`, output lengths fixed. kvrelay is asked over gRPC unless a "
    "line says HTTP, the others over HTTP. A figure is the median of the repetitions, the longest "
    "gap the worst of all. Absolute times do not travel between machines: a claim is a ratio of "
    "one run."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """What figures do not travel without."""

    machine: Mapping[str, object]
    command: str
    settings: Mapping[str, object]


def table(headings: Row, rows: Sequence[Row]) -> list[str]:
    """Lines of a markdown table; numbers to the right."""
    bar = ["---", *("---:" for _ in headings[1:])]
    return [f"| {' | '.join(cells)} |" for cells in (headings, tuple(bar), *rows)]


def to_markdown(
    figures: Figures,
    works: Sequence[tuple[str, str, Sequence[str]]],
    titles: Mapping[str, str],
    remarks: Sequence[str],
    origin: Origin,
) -> str:
    """All there is to say, under a title."""
    systems = [system for system in titles if system in figures]
    lines = [f"# kvrelay and its peers on {origin.machine['cores']} cores", "", HOW, ""]
    facts = {**origin.machine, "command": f"`{origin.command}`", **origin.settings}
    lines += [*table(("", ""), [(name, str(fact)) for name, fact in facts.items()]), ""]
    lines += ["## Targets", "", *table(verdict.TARGET_HEADINGS, verdict.target_rows(figures)), ""]
    lines += ["## Figures", ""]
    for title, rows in verdict.figure_rows(figures, systems, works):
        headings = (title, *verdict.headings(systems, titles)[1:])
        lines += [*table(headings, rows), ""]
    if remarks:
        lines += ["## Remarks", "", *(f"- {remark}" for remark in remarks), ""]
    return "\n".join(lines)


def to_json(
    figures: Figures,
    titles: Mapping[str, str],
    remarks: Sequence[str],
    origin: Origin,
) -> dict[str, Any]:
    """Every repetition of every figure."""
    targets = [
        {"title": target.title, "wanted": target.wanted, "measured": found}
        | {"is_met": None if found is None else target.is_met(found)}
        for target in verdict.TARGETS
        for found in [target.found(figures)]
    ]
    return {
        "format": FORMAT,
        "command": origin.command,
        "machine": dict(origin.machine),
        "settings": dict(origin.settings),
        "systems": dict(titles),
        "targets": targets,
        "figures": figures,
        "remarks": list(remarks),
    }
