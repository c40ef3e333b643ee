"""What many requests amount to: percentiles, throughput, goodput.

Pure. A percentile is a value that was measured (nearest rank), never one between two. A
request that failed has no latencies, but it counts as one that missed its targets.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from kvrelay.bench.base import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A distribution in five numbers."""

    count: int
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a request must meet to count as good. Both are included in what is allowed."""

    ttft_s: float
    tpot_s: float

    def are_met_by(self, record: Record) -> bool:
        """Whether it finished, and in time. An output of one token has no TPOT to miss."""
        if record.error or record.ttft_s is None or record.ttft_s > self.ttft_s:
            return False
        return record.tpot_s is None or record.tpot_s <= self.tpot_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """One run as a whole."""

    wall_s: float
    """From when the first request was due to when the last one ended."""

    num_requests: int
    num_finished: int
    num_short: int
    """Finished with fewer tokens than were asked for: the work was not what it seems."""

    errors: Mapping[str, int]
    """Failed requests by reason, most frequent first."""

    offered_per_s: float | None
    """Requests as they were due; None in a closed loop."""

    output_tokens_per_s: float
    """Of finished requests, as is the next."""

    prompt_tokens_per_s: float
    cached_share: float | None
    """Of the prompt tokens, those that a prefix cache spared; None if the server does not say."""

    num_good: int
    goodput_per_s: float
    attainment: float
    """Of all requests, the share that met both targets."""

    measures: Mapping[str, Summary | None]
    """By name: `ttft_s`, `gap1_s`, `handoff_tax_s`, `handoff_tax_of_ttft`, `handoff_tax_steps`,
    `itl_s`, `tpot_s`, `max_stall_s`, `e2e_s`, and `lag_s`, the generator's own delay. None where
    nothing was measured."""

    handoffs: "Handoffs | None"
    """None if the server told of none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoffs:
    """Prompts whose KV was handed over, of finished requests."""

    by_transport: Mapping[str, int]
    """Most frequent first."""

    num_bytes: int
    overlapped_share: float | None
    """Of the bytes, those that had landed when the prefill ended; None if none moved."""

    stages: Mapping[str, Summary]
    """Parts of the gap between the first two tokens, in their order."""


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of all values does not exceed."""
    assert ascending
    assert 0 < share <= 1
    # 0.07 * 100 is a hair above 7: the rank must not be one too high for that.
    return ascending[max(0, math.ceil(share * len(ascending) - 1e-9) - 1)]


def summarize(values: Iterable[float | None]) -> Summary | None:
    """None if there are no values; those that are None do not count."""
    ascending = sorted(value for value in values if value is not None)
    if not ascending:
        return None
    return Summary(
        count=len(ascending),
        p50=percentile(ascending, 0.5),
        p90=percentile(ascending, 0.9),
        p99=percentile(ascending, 0.99),
        max=ascending[-1],
    )


_PER_REQUEST: Mapping[str, Callable[[Record], float | None]] = {
    "ttft_s": lambda record: record.ttft_s,
    "gap1_s": lambda record: record.gap1_s,
    "handoff_tax_s": lambda record: record.handoff_tax_s,
    "handoff_tax_of_ttft": lambda record: record.handoff_tax_of_ttft,
    "handoff_tax_steps": lambda record: record.handoff_tax_steps,
    "tpot_s": lambda record: record.tpot_s,
    "max_stall_s": lambda record: record.max_stall_s,
    "e2e_s": lambda record: record.e2e_s,
}


def total(records: Sequence[Record], targets: Targets, *, is_open_loop: bool) -> Totals:
    """Everything there is to say about one run of at least one request."""
    assert records
    finished = [record for record in records if not record.error]
    wall_s = max(r.ended_s for r in records) - min(r.scheduled_s for r in records)
    num_good = sum(map(targets.are_met_by, records))
    measures = {name: summarize(map(of, finished)) for name, of in _PER_REQUEST.items()}
    measures["itl_s"] = summarize(chain.from_iterable(record.gaps_s for record in finished))
    measures["lag_s"] = summarize(record.lag_s for record in records) if is_open_loop else None
    return Totals(
        wall_s=wall_s,
        num_requests=len(records),
        num_finished=len(finished),
        num_short=sum(record.output_tokens < record.max_tokens for record in finished),
        errors=dict(Counter(r.error for r in records if r.error).most_common()),
        offered_per_s=_offered_per_s(records) if is_open_loop else None,
        output_tokens_per_s=_per_s(sum(r.output_tokens for r in finished), wall_s),
        prompt_tokens_per_s=_per_s(sum(r.prompt_tokens for r in finished), wall_s),
        cached_share=_cached_share(finished),
        num_good=num_good,
        goodput_per_s=_per_s(num_good, wall_s),
        attainment=num_good / len(records),
        measures=measures,
        handoffs=_handoffs(finished),
    )


def _handoffs(finished: Sequence[Record]) -> Handoffs | None:
    found = [record.handoff for record in finished if record.handoff is not None]
    if not found:
        return None
    num_bytes = sum(handoff.num_bytes for handoff in found)
    overlapped = sum(handoff.overlapped_num_bytes for handoff in found)
    names = dict.fromkeys(chain.from_iterable(handoff.stages for handoff in found))
    told = {name: [h.stages[name] for h in found if name in h.stages] for name in names}
    return Handoffs(
        by_transport=dict(Counter(handoff.transport for handoff in found).most_common()),
        num_bytes=num_bytes,
        overlapped_share=overlapped / num_bytes if num_bytes else None,
        stages={name: s for name, values in told.items() if (s := summarize(values))},
    )


def _per_s(count: int, wall_s: float) -> float:
    return count / wall_s if wall_s > 0 else 0.0


def _offered_per_s(records: Sequence[Record]) -> float | None:
    due_s = [record.scheduled_s for record in records]
    span_s = max(due_s) - min(due_s)
    return (len(due_s) - 1) / span_s if span_s > 0 else None


def _cached_share(finished: Sequence[Record]) -> float | None:
    known = [(r.cached_prompt_tokens, r.prompt_tokens) for r in finished]
    told = [(cached, all_) for cached, all_ in known if cached is not None]
    return sum(cached for cached, _ in told) / sum(all_ for _, all_ in told) if told else None
