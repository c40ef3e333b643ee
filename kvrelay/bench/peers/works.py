"""The work that every system is given, and what is read off it.

Pure. Lengths are in tokens, some 1.3 a word. Prompts are random token ids, the same ones for
every system, and no two requests of a system share a prefix.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from kvrelay.bench.peers.pins import KVRELAY, LLAMA_CPP, ONE_CORE, VLLM, VLLM_ALL_CORES
from kvrelay.bench.plan import Plan, Run
from kvrelay.bench.stats import Targets, summarize
from kvrelay.bench.workload import Mix, parse_mix

TARGETS = Targets(ttft_s=1.0, tpot_s=0.1)
TIMEOUT_S = 120.0
VOCAB_SIZE = 16384
"""Of the prompts: below that of every model in use, so that all systems get the same ids."""

START, MEMORY = "start", "memory"
"""What is measured without a load of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One kind of load. A closed loop unless it has a rate."""

    name: str
    title: str
    mix: Mix
    systems: tuple[str, ...]
    num_clients: int = 1
    num_requests: int | None = None
    rate: float | None = None
    is_http: bool = False
    """Over HTTP also where a system has a protocol of its own."""

    metrics: tuple[str, ...] = ()
    """Those of `read` that are shown."""

    def plan(self, *, seed: int, repetition: int, segment_s: float) -> Plan:
        """One repetition. Only the first is preceded by a warm-up."""
        return Plan(
            rates=() if self.rate is None else (self.rate,),
            num_clients=self.num_clients,
            num_requests=self.num_requests,
            duration_s=None if self.rate is None else segment_s,
            mix=self.mix,
            trace=(),
            # A shorter prompt of an equal seed would be a prefix of a longer one.
            seed=zlib.crc32(f"{seed}/{self.name}/{repetition}".encode()),
            temperature=0.0,
            targets=TARGETS,
            num_warm_up=max(2, self.num_clients) if repetition == 0 else 0,
            timeout_s=TIMEOUT_S,
        )


_ALL = (KVRELAY, VLLM, VLLM_ALL_CORES, LLAMA_CPP)
_DECODE = ("ttft_s", "tpot_s", "output_tokens_per_s")
_PREFILL = ("ttft_s", "prefill_tokens_per_s")
_OPEN = (
    *("offered_per_s", "goodput_per_s", "attainment", "ttft_s", "ttft_p99_s", "tpot_p99_s"),
    *("late_itl_s", "late_itl_p99_s", "max_stall_s"),
)
_MIXED = parse_mix("130:64:0.7,1820:16:0.3")


def _clients(
    num_clients: int, mix: str, suffix: str, systems: tuple[str, ...], *, is_http: bool = False
) -> Work:
    prompt, output = mix.split(":")
    how = ", HTTP" if is_http else ""
    return Work(
        name=f"{num_clients}-clients{suffix}",
        title=f"{num_clients} clients{how}, {prompt} in {output} out",
        mix=parse_mix(mix),
        systems=systems,
        num_clients=num_clients,
        num_requests=2 * num_clients,
        is_http=is_http,
        metrics=_DECODE,
    )


def _prefill(num_tokens: int) -> Work:
    return Work(
        name=f"prefill-{num_tokens}",
        title=f"prefill of {num_tokens} tokens, 1 client",
        mix=parse_mix(f"{num_tokens}:1"),
        systems=(*_ALL, ONE_CORE),
        num_requests=2,
        metrics=_PREFILL,
    )


def _mixed(rate: float) -> Work:
    # llama.cpp is not asked: it computes half of the prompt tokens per second that come, and would
    # only show how a queue grows. vLLM is asked as it starts by itself: on two cores that serves
    # half of this work in time, and computing on the core its scheduler needs a third.
    return Work(
        name=f"mixed-{rate}",
        title=f"mixed open loop, {rate} requests/s",
        mix=_MIXED,
        systems=(KVRELAY, VLLM),
        num_clients=2,
        rate=rate,
        metrics=_OPEN,
    )


WORKS = (
    Work(
        name="batch-1",
        title="1 client, 156 in 64 out",
        mix=parse_mix("156:64"),
        systems=_ALL,
        num_requests=6,
        metrics=_DECODE[:2],
    ),
    _clients(8, "156:64", "", _ALL),
    _clients(16, "26:128", "", _ALL),
    _clients(16, "26:128", "-http", (KVRELAY,), is_http=True),
    _prefill(1024),
    _prefill(1500),
    _mixed(1.0),
    _mixed(1.5),
)


def read(run: Run) -> Mapping[str, float]:
    """What one repetition amounts to; what could not be measured is not in it."""
    totals = run.totals
    found: dict[str, float | None] = {
        "output_tokens_per_s": totals.output_tokens_per_s,
        "goodput_per_s": totals.goodput_per_s,
        "attainment": totals.attainment,
        "offered_per_s": totals.offered_per_s,
    }
    for name in ("ttft_s", "tpot_s"):
        summary = totals.measures[name]
        found[name] = summary.p50 if summary else None
        found[name.replace("_s", "_p99_s")] = summary.p99 if summary else None
    finished = [record for record in run.records if not record.error]
    found["prefill_tokens_per_s"] = _p50(
        record.prompt_tokens / record.ttft_s for record in finished if record.ttft_s
    )
    # The gap from the first token to the second has a measure of its own: a handoff is in it.
    late = summarize(chain.from_iterable(record.gaps_s[1:] for record in finished))
    if late is not None:
        found |= {
            "late_itl_s": late.p50,
            "late_itl_p99_s": late.p99,
            "max_stall_s": late.max,
        }
    return {name: value for name, value in found.items() if value is not None}


def _p50(values: Iterable[float]) -> float | None:
    summary = summarize(values)
    return summary.p50 if summary else None
