"""compose.yaml without Docker: it is well-formed, and what it says starts a deployment."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from kvrelay.client import Client
from kvrelay.obs.metrics import CoordinatorMetrics, WorkerMetrics
from kvrelay.types import Role
from tests.support.compose import COMPOSE_DIR, LocalCompose, read_compose, started_by_up
from tests.support.deployment import shared_memory, until_idle

WORKERS = ("prefill", "decode", "prefill-gpu", "decode-gpu")
HEALTHY_WITHIN_S = 90.0


def test_the_file_follows_the_compose_specification():
    """
    The published schema accepts it.
    """
    check = Path(sys.executable).with_name("check-jsonschema")
    words = [check, "--builtin-schema", "vendor.compose-spec", COMPOSE_DIR / "compose.yaml"]
    done = subprocess.run(words, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("service", WORKERS)
def test_workers_can_be_scaled(service):
    """
    Nothing of a worker is fixed that two of them could not both have.
    """
    spec = read_compose()["services"][service]

    assert not {"container_name", "hostname", "ports"} & set(spec)
    assert not any("worker-id" in word for word in spec["command"])


def test_only_loopback_is_published():
    """
    The wire is plain text inside of the project, so nothing of it is reachable from elsewhere.
    """
    services = read_compose()["services"]
    published = [port for spec in services.values() for port in spec.get("ports", ())]

    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("service", ["coordinator", *WORKERS])
def test_a_service_may_finish_its_drain(service):
    """
    It is killed only after its own limit has passed.
    """
    spec = read_compose()["services"][service]
    drain_s = next(float(v) for k, v in spec["environment"].items() if k.endswith("_DRAIN_S"))

    assert float(spec["stop_grace_period"].removesuffix("s")) > drain_s


@pytest.mark.parametrize(
    ("profiles", "workers"),
    [((), {"prefill", "decode"}), (("gpu",), {"prefill-gpu", "decode-gpu"})],
)
def test_one_kind_of_workers_starts(profiles, workers):
    """
    On CPU if nothing is said, on GPUs where their profile is asked for, never both.
    """
    assert started_by_up(profiles) == {"model", "coordinator"} | workers


@pytest.mark.parametrize("service", ["prefill-gpu", "decode-gpu"])
def test_gpus_are_asked_for_only_in_their_profile(service):
    """
    Without the profile nothing needs a GPU.
    """
    services = read_compose()["services"]

    assert services[service]["profiles"] == ["gpu"]
    assert services[service]["deploy"]["resources"]["reservations"]["devices"]
    assert "deploy" not in services[service.removesuffix("-gpu")]


def test_prometheus_scrapes_where_the_services_serve_metrics():
    """
    Its ports are those of the commands.
    """
    services = read_compose()["services"]
    jobs = yaml.safe_load((COMPOSE_DIR / "prometheus.yml").read_text())["scrape_configs"]
    coordinator, workers = jobs[0]["static_configs"][0], jobs[1]["dns_sd_configs"][0]

    assert coordinator["targets"] == ["coordinator:8000"]
    assert "--http-listen=0.0.0.0:8000" in services["coordinator"]["command"]
    assert set(workers["names"]) == set(WORKERS)
    for name in WORKERS:
        assert f"--metrics-listen=0.0.0.0:{workers['port']}" in services[name]["command"]


def test_the_dashboard_shows_only_metrics_that_exist():
    """
    Every name in a query is one that a service exports.
    """
    registry, worker_registry = CollectorRegistry(), CollectorRegistry()
    CoordinatorMetrics(registry)
    WorkerMetrics(Role.DECODE, worker_registry)
    text = (generate_latest(registry) + generate_latest(worker_registry)).decode()
    exported = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE))
    dashboard = json.loads((COMPOSE_DIR / "grafana/dashboards/kvrelay.json").read_text())
    queries = " ".join(t["expr"] for panel in dashboard["panels"] for t in panel["targets"])
    shown = {re.sub(r"_(bucket|sum|count)$", "", n) for n in re.findall(r"kvrelay_\w+", queries)}

    assert shown
    assert shown <= exported


@pytest.mark.e2e
@pytest.mark.realmodel
def test_the_same_topology_answers_as_local_processes():
    """
    The file's own commands, environment and healthchecks start a deployment that answers the
    question of its `ask` service, and every service ends well when it is stopped: no block was
    held any more, and no process or shared memory stays.
    """
    memory_before = shared_memory()
    with LocalCompose(read_compose()["services"], {}) as compose:
        assert compose.run("model").returncode == 0
        running = [compose.start(name) for name in ("coordinator", "prefill", "decode")]
        for name in ("prefill", "decode", "coordinator"):
            wait_until_healthy(compose, name)

        asked = compose.run("ask")
        assert asked.stdout.startswith("The capital of France is Paris."), asked.stderr
        wait_until_idle(f"127.0.0.1:{compose.port('coordinator', 50051)}")

        left = [psutil.Process(process.pid) for process in running]
        left += [child for process in left for child in process.children(recursive=True)]
        for process in running:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(45) for process in running] == [0, 0, 0]
        assert not [process for process in left if process.is_running()]
        assert shared_memory() <= memory_before


def wait_until_healthy(compose: LocalCompose, service: str) -> None:
    """As Docker does: run the healthcheck until it passes. Each run takes a while by itself."""
    deadline_s = time.monotonic() + HEALTHY_WITHIN_S
    while not compose.is_healthy(service):
        assert time.monotonic() < deadline_s, f"{service} is not healthy"


def wait_until_idle(grpc: str) -> None:
    """Every block of every worker is free or cached."""

    async def wait() -> None:
        async with Client(grpc) as client:
            await until_idle(client)

    asyncio.run(wait())
