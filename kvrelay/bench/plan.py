"""What a benchmark is to measure, and what one measurement is.

Pure.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from kvrelay.bench import workload
from kvrelay.bench.base import Record, Served
from kvrelay.bench.stats import Targets, Totals
from kvrelay.bench.workload import Item, MakeRng, Mix
from kvrelay.errors import InvalidRequest

DEFAULT_REQUESTS = 64
DEFAULT_VOCAB_SIZE = 16384
"""Where a server does not say its own: below that of the models in use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure."""

    rates: tuple[float | None, ...]
    """One run each, in requests per second; None is a trace at its own pace. Empty: one run in a
    closed loop."""

    num_clients: int
    """Of a closed loop and of the warm-up."""

    num_requests: int | None
    duration_s: float | None
    """Nothing starts afterwards. None is no limit, as for `num_requests`."""

    mix: Mix
    trace: tuple[Item, ...]
    """Instead of the mix, unless empty."""

    seed: int
    temperature: float
    targets: Targets
    num_warm_up: int
    timeout_s: float

    @property
    def is_open_loop(self) -> bool:
        return bool(self.rates)

    def items(self, rate: float | None, make_rng: MakeRng) -> Iterator[Item]:
        """The requests of one run; without end if only `duration_s` of a closed loop ends it."""
        if self.trace:
            trace = list(self.trace)
            items = iter(workload.stretched(trace, rate) if rate else trace)
        else:
            items = workload.mixed(self.mix, make_rng, seed=self.seed)
            if rate:
                items = workload.poisson(items, rate, make_rng, seed=self.seed)
        if self.duration_s is not None and self.is_open_loop:
            items = workload.until(items, self.duration_s)
        return itertools.islice(items, self.limit)

    @property
    def limit(self) -> int | None:
        """Most requests of one run."""
        if self.num_requests is not None:
            return self.num_requests
        if self.trace:
            return len(self.trace)
        return DEFAULT_REQUESTS if self.duration_s is None else None

    def check(self, served: Served) -> None:
        """Refuse a mix that cannot be served. What a trace has too long fails, and is counted.

        Raises:
            InvalidRequest: a prompt and its output exceed the context.
        """
        longest, context = self.mix.longest_tokens, served.context_tokens
        if not self.trace and context is not None and longest > context:
            raise InvalidRequest(
                "mix", f"{longest} tokens of prompt and output, the context has {context}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measurement."""

    rate: float | None
    records: tuple[Record, ...]
    totals: Totals
    generator_cpu_share: float
    """CPU time of this process over wall time: near 1, it measures itself."""
