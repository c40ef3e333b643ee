"""Prometheus metrics of the coordinator and of a worker, on a registry that is passed in.

Names and buckets follow vLLM where it has them, under our prefix, so dashboards carry over.
Labels come from small closed sets; nothing of a request's content or identity is ever one.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvrelay.config import SettingsError, split_address
from kvrelay.obs.ledger import Ledger
from kvrelay.types import Role, WorkerIdentity, WorkerLoad

# fmt: off
TTFT_BUCKETS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)
ITL_BUCKETS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)
REQUEST_BUCKETS_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)
STAGE_BUCKETS_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10,
)
# fmt: on

_FINISHED = ("stop", "length")


class CoordinatorMetrics:
    """What the coordinator knows of requests and of its pool."""

    def __init__(self, registry: CollectorRegistry) -> None:
        new = _Maker(registry)
        self.time_to_first_token = new.histogram(
            "time_to_first_token_seconds", "Arrival to the first token.", TTFT_BUCKETS_S
        )
        self.inter_token_latency = new.histogram(
            "inter_token_latency_seconds", "Gap between two tokens of a request.", ITL_BUCKETS_S
        )
        self.e2e_request_latency = new.histogram(
            "e2e_request_latency_seconds", "Arrival to the end of a request.", REQUEST_BUCKETS_S
        )
        self.request_queue_time = new.histogram(
            "request_queue_time_seconds", "Wait at the worker for the first chunk.",
            REQUEST_BUCKETS_S,
        )  # fmt: skip
        self.request_prefill_time = new.histogram(
            "request_prefill_time_seconds", "First chunk to first token.", REQUEST_BUCKETS_S
        )
        self.handoff_tax = new.histogram(
            "handoff_tax_seconds",
            "Gap between tokens 1 and 2, less the request's time per output token.",
            STAGE_BUCKETS_S,
        )
        self.handoff_stage = new.histogram(
            "handoff_stage_seconds", "Parts of the gap between tokens 1 and 2.",
            STAGE_BUCKETS_S, "stage",
        )  # fmt: skip
        self.num_requests_running = new.gauge("num_requests_running", "Requests placed on workers.")
        self.num_requests_waiting = new.gauge(
            "num_requests_waiting", "Requests admitted and not placed."
        )
        self.prompt_tokens = new.counter("prompt_tokens", "Prompt tokens of ended requests.")
        self.generation_tokens = new.counter(
            "generation_tokens", "Tokens of ended requests that were handed to callers."
        )
        self.prefix_cache_hit_tokens = new.counter(
            "prefix_cache_hit_tokens", "Prompt tokens whose KV was found in a prefix index."
        )
        self.request_success = new.counter(
            "request_success", "Requests that ended well.", "finished_reason"
        )
        self.request_failure = new.counter(
            "request_failure", "Requests that failed or were refused.", "reason"
        )
        self.lost_attempts = new.counter(
            "lost_attempts", "Attempts given up because a worker or handoff was lost.", "reason"
        )
        self.handoffs = new.counter(
            "handoffs", "Prompts whose KV was handed over, by what moved it.", "transport"
        )
        self.handoff_bytes = new.counter(
            "handoff_bytes", "KV bytes moved by handoffs.", "transport"
        )
        self.handoff_overlapped_bytes = new.counter(
            "handoff_overlapped_bytes", "Of these, bytes that landed before the prefill ended.",
            "transport",
        )  # fmt: skip
        self.moves = new.counter(
            "moves", "Moves of running requests between decode workers.", "reason", "outcome"
        )
        self.move_gap = new.histogram(
            "move_gap_seconds", "Last token before a move to the first after.", ITL_BUCKETS_S
        )
        self.stale_outputs = new.counter(
            "stale_outputs", "Outputs of attempts that had been replaced, dropped."
        )
        self._pool = _PoolCollector()
        registry.register(self._pool)

    def observe_ended(self, ledger: Ledger) -> None:
        """Count an admitted request that ended, well or badly."""
        self.e2e_request_latency.observe(ledger.e2e_s)
        self.prompt_tokens.inc(ledger.prompt_tokens)
        self.generation_tokens.inc(ledger.completion_tokens)
        self.prefix_cache_hit_tokens.inc(ledger.cached_prompt_tokens)
        if ledger.outcome in _FINISHED:
            self.request_success.labels(finished_reason=ledger.outcome).inc()
        else:
            self.request_failure.labels(reason=ledger.outcome).inc()
        for reason in ledger.lost_attempts:
            self.lost_attempts.labels(reason=reason).inc()
        if ledger.ttft_stages:
            self.time_to_first_token.observe(ledger.ttft_s)
            self.request_queue_time.observe(ledger.ttft_stages.get("queue", 0.0))
            self.request_prefill_time.observe(ledger.ttft_stages.get("prefill", 0.0))
        for stage, duration_s in ledger.gap1_stages.items():
            self.handoff_stage.labels(stage=stage).observe(duration_s)
        if ledger.handoff_tax_s is not None:
            self.handoff_tax.observe(ledger.handoff_tax_s)
        if ledger.transport:
            label = {"transport": ledger.transport}
            self.handoffs.labels(**label).inc()
            self.handoff_bytes.labels(**label).inc(ledger.handoff_num_bytes)
            self.handoff_overlapped_bytes.labels(**label).inc(ledger.overlapped_num_bytes)
        for gap_s in ledger.move_gaps_s:
            self.move_gap.observe(gap_s)

    def observe_gap(self, gap_s: float) -> None:
        """A gap between two batches of tokens handed to one caller."""
        self.inter_token_latency.observe(gap_s)

    def observe_move(self, reason: str, outcome: str) -> None:
        """Count a move that is over."""
        self.moves.labels(reason=reason, outcome=outcome).inc()

    def observe_refused(self, reason: str) -> None:
        """Count a request that was never admitted."""
        self.request_failure.labels(reason=reason).inc()

    def observe_pool(self, members: Sequence[tuple[WorkerIdentity, WorkerLoad]]) -> None:
        """Show the pool as it is now; workers that left are no longer shown."""
        self._pool.members = tuple(members)


class WorkerMetrics:
    """What a worker knows of its engine and of its handoffs."""

    def __init__(self, role: Role, registry: CollectorRegistry) -> None:
        new = _Maker(registry)
        label = {"role": role.value}
        self._blocks = new.gauge("engine_blocks", "KV blocks by state.", "role", "state")
        self._label = label
        self.running_sequences = new.gauge(
            "engine_running_sequences", "Sequences in the current step.", "role"
        ).labels(**label)
        self.waiting_sequences = new.gauge(
            "engine_waiting_sequences", "Sequences not yet in a step.", "role"
        ).labels(**label)
        self.holds = new.gauge(
            "engine_handoff_holds", "Prefill: holds to be released. Decode: pulls.", "role"
        ).labels(**label)
        self.waiting_handoffs = new.gauge(
            "engine_waiting_handoffs",
            "Prefill: finished holds not released. Decode: handoffs that wait for blocks.",
            "role",
        ).labels(**label)
        self.grant_wait = new.histogram(
            "engine_grant_wait_seconds", "First announced block to blocks of our own for it.",
            STAGE_BUCKETS_S, "role",
        ).labels(**label)  # fmt: skip
        self.step = new.histogram(
            "engine_step_seconds", "Duration of a step.", STAGE_BUCKETS_S, "role"
        ).labels(**label)
        self._handoffs = new.counter(
            "engine_handoffs", "Prefill: released by the puller. Decode: joined.", "role"
        ).labels(**label)
        self._preemptions = new.counter(
            "engine_preemptions", "Running sequences whose KV was given up.", "role"
        ).labels(**label)
        self.hold_expirations = new.counter(
            "engine_hold_expirations", "Holds that a timer ended.", "role"
        ).labels(**label)
        self._pulled_bytes = new.counter(
            "engine_pulled_bytes", "KV bytes that landed here.", "role"
        ).labels(**label)
        self._pull = new.histogram(
            "engine_pull_seconds", "Duration of a pull of announced blocks.",
            STAGE_BUCKETS_S, "role",
        ).labels(**label)  # fmt: skip
        self.kv_corrupt = new.counter(
            "engine_kv_corrupt", "Handoffs whose bytes were not those announced.", "role"
        ).labels(**label)
        self._faults = new.counter(
            "engine_faults_injected", "What was done to pulls on purpose.", "role", "fault"
        )
        self._seen = WorkerLoad()

    def observe_fault(self, fault: str) -> None:
        """Count a fault that was put into a pull; see `kvrelay.transfer.faulty`."""
        self._faults.labels(**self._label, fault=fault).inc()

    def observe_pull(self, *, num_bytes: int, elapsed_s: float) -> None:
        """Count bytes that landed; the two sums' growth over time is the handoffs' bandwidth."""
        self._pulled_bytes.inc(num_bytes)
        self._pull.observe(elapsed_s)

    def observe_load(self, load: WorkerLoad) -> None:
        """Show what the worker tells the pool; its `_total`s become the counters' growth."""
        for state, count in _blocks_by_state(load):
            self._blocks.labels(**self._label, state=state).set(count)
        self.running_sequences.set(load.running_sequences)
        self.waiting_sequences.set(load.waiting_sequences)
        self.holds.set(load.handoff_holds)
        self.waiting_handoffs.set(load.waiting_handoffs)
        self._handoffs.inc(load.handoffs_total - self._seen.handoffs_total)
        self._preemptions.inc(load.preemptions_total - self._seen.preemptions_total)
        self._seen = load


class MetricsServer:
    """A Prometheus endpoint in a thread of its own, until `close`."""

    def __init__(self, server: WSGIServer, thread: threading.Thread, address: str) -> None:
        self._server = server
        self._thread = thread
        self.address = address
        """HOST:PORT as bound."""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(listen: str, registry: CollectorRegistry) -> MetricsServer:
    """Serve `registry` at HOST:PORT. The caller closes it.

    Raises:
        SettingsError: the address cannot be bound.
    """
    host, port = split_address(listen)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise SettingsError(f"metrics_listen = {listen}: {error.strerror}") from error
    return MetricsServer(server, thread, f"{listen.rpartition(':')[0]}:{server.server_port}")


class _PoolCollector(Collector):
    """Gauges of the pool, made afresh for each scrape, so that no worker outlives itself."""

    def __init__(self) -> None:
        self.members: tuple[tuple[WorkerIdentity, WorkerLoad], ...] = ()

    def collect(self) -> Iterator[Metric]:
        members = self.members
        pool = GaugeMetricFamily("kvrelay_pool_workers", "Members of the pool.", labels=["role"])
        for role in Role:
            pool.add_metric([role.value], sum(who.role is role for who, _ in members))
        yield pool
        blocks = GaugeMetricFamily(
            "kvrelay_worker_blocks", "KV blocks by state.", labels=["worker_id", "role", "state"]
        )
        for who, load in members:
            for state, count in _blocks_by_state(load):
                blocks.add_metric([who.worker_id, who.role.value, state], count)
        yield blocks
        for name, text, value in _WORKER_GAUGES:
            gauge = GaugeMetricFamily(f"kvrelay_{name}", text, labels=["worker_id", "role"])
            for who, load in members:
                gauge.add_metric([who.worker_id, who.role.value], value(who, load))
            yield gauge


_WORKER_GAUGES: tuple[tuple[str, str, Callable[[WorkerIdentity, WorkerLoad], float]], ...] = (
    (
        "kv_cache_usage_perc",
        "Held share of the worker's blocks, 0 to 1.",
        lambda who, load: load.held_blocks / who.num_blocks,
    ),
    (
        "worker_running_sequences",
        "Sequences in the worker's current step.",
        lambda _, load: load.running_sequences,
    ),
    (
        "worker_waiting_sequences",
        "Sequences not yet in a step.",
        lambda _, load: load.waiting_sequences,
    ),
    (
        "worker_handoff_holds",
        "Prefill: holds to be released. Decode: pulls.",
        lambda _, load: load.handoff_holds,
    ),
    (
        "worker_waiting_handoffs",
        "Prefill: finished holds not released. Decode: handoffs that wait for blocks.",
        lambda _, load: load.waiting_handoffs,
    ),
    (
        "worker_queued_prompt_tokens",
        "Prompt tokens still to be computed.",
        lambda _, load: load.queued_prompt_tokens,
    ),
    (
        "worker_prefill_tokens_per_second",
        "Prefill speed measured lately.",
        lambda _, load: load.prefill_tokens_per_s,
    ),
    (
        "worker_step_seconds",
        "Median duration of a step lately.",
        lambda _, load: load.step_s,
    ),
    (
        "worker_draining",
        "1 while the worker takes nothing new.",
        lambda _, load: float(load.is_draining),
    ),
)  # fmt: skip


def _blocks_by_state(load: WorkerLoad) -> tuple[tuple[str, int], ...]:
    return (
        ("free", load.free_blocks),
        ("cached", load.cached_blocks),
        ("held", load.held_blocks),
    )


class _Maker:
    """Makes metrics under our prefix on one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def histogram(self, name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"kvrelay_{name}", text, labels, buckets=buckets, registry=self._registry)

    def gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"kvrelay_{name}", text, labels, registry=self._registry)

    def counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"kvrelay_{name}", text, labels, registry=self._registry)
