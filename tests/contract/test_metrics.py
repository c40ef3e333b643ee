"""Names, units and labels of the metrics are promises to dashboards."""

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvrelay.config import SettingsError
from kvrelay.kv.layout import KvLayout
from kvrelay.obs.ledger import LedgerBuilder
from kvrelay.obs.metrics import CoordinatorMetrics, WorkerMetrics, serve_metrics
from kvrelay.types import Fingerprint, Role, WorkerIdentity, WorkerLoad

LAYOUT = KvLayout(num_layers=2, block_size=16, num_kv_heads=2, head_dim=8, dtype="float32")

COORDINATOR_METRICS = {
    ("kvrelay_time_to_first_token_seconds", "histogram", ()),
    ("kvrelay_inter_token_latency_seconds", "histogram", ()),
    ("kvrelay_e2e_request_latency_seconds", "histogram", ()),
    ("kvrelay_request_queue_time_seconds", "histogram", ()),
    ("kvrelay_request_prefill_time_seconds", "histogram", ()),
    ("kvrelay_handoff_tax_seconds", "histogram", ()),
    ("kvrelay_handoff_stage_seconds", "histogram", ("stage",)),
    ("kvrelay_num_requests_running", "gauge", ()),
    ("kvrelay_num_requests_waiting", "gauge", ()),
    ("kvrelay_prompt_tokens_total", "counter", ()),
    ("kvrelay_generation_tokens_total", "counter", ()),
    ("kvrelay_prefix_cache_hit_tokens_total", "counter", ()),
    ("kvrelay_request_success_total", "counter", ("finished_reason",)),
    ("kvrelay_request_failure_total", "counter", ("reason",)),
    ("kvrelay_lost_attempts_total", "counter", ("reason",)),
    ("kvrelay_handoffs_total", "counter", ("transport",)),
    ("kvrelay_handoff_bytes_total", "counter", ("transport",)),
    ("kvrelay_handoff_overlapped_bytes_total", "counter", ("transport",)),
    ("kvrelay_moves_total", "counter", ("outcome", "reason")),
    ("kvrelay_move_gap_seconds", "histogram", ()),
    ("kvrelay_stale_outputs_total", "counter", ()),
    ("kvrelay_pool_workers", "gauge", ("role",)),
    ("kvrelay_worker_blocks", "gauge", ("role", "state", "worker_id")),
    ("kvrelay_kv_cache_usage_perc", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_running_sequences", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_waiting_sequences", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_handoff_holds", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_waiting_handoffs", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_queued_prompt_tokens", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_prefill_tokens_per_second", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_step_seconds", "gauge", ("role", "worker_id")),
    ("kvrelay_worker_draining", "gauge", ("role", "worker_id")),
}

WORKER_METRICS = {
    ("kvrelay_engine_blocks", "gauge", ("role", "state")),
    ("kvrelay_engine_running_sequences", "gauge", ("role",)),
    ("kvrelay_engine_waiting_sequences", "gauge", ("role",)),
    ("kvrelay_engine_handoff_holds", "gauge", ("role",)),
    ("kvrelay_engine_waiting_handoffs", "gauge", ("role",)),
    ("kvrelay_engine_grant_wait_seconds", "histogram", ("role",)),
    ("kvrelay_engine_step_seconds", "histogram", ("role",)),
    ("kvrelay_engine_handoffs_total", "counter", ("role",)),
    ("kvrelay_engine_preemptions_total", "counter", ("role",)),
    ("kvrelay_engine_hold_expirations_total", "counter", ("role",)),
    ("kvrelay_engine_pulled_bytes_total", "counter", ("role",)),
    ("kvrelay_engine_pull_seconds", "histogram", ("role",)),
    ("kvrelay_engine_kv_corrupt_total", "counter", ("role",)),
}


def exported(registry):
    """(name, type, labels) of each family that has samples."""
    families = [family for family in registry.collect() if family.samples]
    return {
        (
            family.name + ("_total" if family.type == "counter" else ""),
            family.type,
            tuple(sorted({k for sample in family.samples for k in sample.labels} - {"le"})),
        )
        for family in families
    }


def identity(worker_id, role):
    return WorkerIdentity(
        worker_id=worker_id,
        epoch="0" * 16,
        role=role,
        address="127.0.0.1:1",
        pid=1,
        fingerprint=Fingerprint(model_digest="d", numerics="n", layout=LAYOUT),
        num_blocks=10,
        max_sequences=2,
    )


def handed_over(outcome="stop"):
    """A request with three tokens, the second from another worker."""
    b = LedgerBuilder(request_id="r", arrived_at_s=0.0, prompt_tokens=7, transport="shm")
    b.cached_prompt_tokens, b.handoff_num_bytes, b.overlapped_num_bytes = 4, 4096, 1024
    b.dispatched(0.0)
    b.lost("PEER_UNAVAILABLE")
    b.dispatched(1.0)
    b.tokens(2.0, 1)
    b.gap1_stages = {"transfer": 0.5}
    b.tokens(3.0, 1)
    b.moved()
    b.tokens(3.5, 1)
    return b.build(outcome, 4.0)


def test_the_coordinator_exports_exactly_these_names():
    """A renamed metric breaks somebody's dashboard in silence."""
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.observe_ended(handed_over())
    metrics.observe_refused("QUEUE_FULL")
    metrics.observe_move("drain", "moved")
    metrics.observe_pool([(identity("p", Role.PREFILL), WorkerLoad())])

    assert exported(registry) == COORDINATOR_METRICS


def test_a_worker_exports_exactly_these_names():
    """All with its role, so one query covers both kinds."""
    registry = CollectorRegistry()
    WorkerMetrics(Role.PREFILL, registry).observe_load(WorkerLoad())

    assert exported(registry) == WORKER_METRICS


@pytest.mark.parametrize("name", [name for name, *_ in COORDINATOR_METRICS | WORKER_METRICS])
def test_names_carry_base_units(name):
    """Durations in seconds, sizes in bytes, never their fractions."""
    assert name.startswith("kvrelay_")
    assert not {"ms", "milliseconds", "kb", "mb", "mib"} & set(name.split("_"))


def test_an_ended_request_is_counted_where_it_belongs():
    """Once, with its tokens, its attempts and its bytes."""
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    metrics.observe_ended(handed_over())
    metrics.observe_ended(handed_over(outcome="NO_WORKER"))
    value = registry.get_sample_value

    assert value("kvrelay_request_success_total", {"finished_reason": "stop"}) == 1
    assert value("kvrelay_request_failure_total", {"reason": "NO_WORKER"}) == 1
    assert value("kvrelay_lost_attempts_total", {"reason": "PEER_UNAVAILABLE"}) == 2
    assert value("kvrelay_handoffs_total", {"transport": "shm"}) == 2
    assert value("kvrelay_handoff_bytes_total", {"transport": "shm"}) == 8192
    assert value("kvrelay_handoff_overlapped_bytes_total", {"transport": "shm"}) == 2048
    assert value("kvrelay_move_gap_seconds_sum") == 1.0
    assert value("kvrelay_generation_tokens_total") == 6
    assert value("kvrelay_prefix_cache_hit_tokens_total") == 8
    assert value("kvrelay_time_to_first_token_seconds_sum") == 4.0
    assert value("kvrelay_handoff_stage_seconds_sum", {"stage": "pull_wait"}) == 1.0
    assert value("kvrelay_handoff_tax_seconds_sum") == 0.5


def test_a_worker_that_left_is_no_longer_shown():
    """A gauge that outlives its worker would hold a dashboard's sum up for ever."""
    registry = CollectorRegistry()
    metrics = CoordinatorMetrics(registry)
    load = WorkerLoad(held_blocks=3, cached_blocks=2, free_blocks=5)
    members = [(identity("p", Role.PREFILL), load), (identity("d", Role.DECODE), load)]
    labels = {"worker_id": "p", "role": "prefill"}
    value = registry.get_sample_value

    metrics.observe_pool(members)
    assert value("kvrelay_kv_cache_usage_perc", labels) == 0.3
    assert value("kvrelay_worker_blocks", labels | {"state": "cached"}) == 2
    assert value("kvrelay_pool_workers", {"role": "prefill"}) == 1

    metrics.observe_pool(members[1:])
    assert value("kvrelay_kv_cache_usage_perc", labels) is None
    assert value("kvrelay_pool_workers", {"role": "prefill"}) == 0


def test_totals_of_loads_become_counters():
    """Each load says the sum since the start; the counter grows by the difference."""
    registry = CollectorRegistry()
    metrics = WorkerMetrics(Role.DECODE, registry)
    for total in (1, 1, 4):
        metrics.observe_load(WorkerLoad(handoffs_total=total, preemptions_total=total))

    for name in ("handoffs", "preemptions"):
        value = registry.get_sample_value(f"kvrelay_engine_{name}_total", {"role": "decode"})
        assert value == 4


def test_metrics_are_served_until_closed():
    """By a thread of its own, over HTTP, on a port that is known."""
    registry = CollectorRegistry()
    WorkerMetrics(Role.DECODE, registry)
    server = serve_metrics("127.0.0.1:0", registry)
    try:
        with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10) as answer:
            body = answer.read()
        with pytest.raises(SettingsError, match=f"metrics_listen = {server.address}"):
            serve_metrics(server.address, registry)
    finally:
        server.close()

    assert b'kvrelay_engine_running_sequences{role="decode"} 0.0' in body
    assert b"# HELP kvrelay_engine_running_sequences" in generate_latest(registry)
