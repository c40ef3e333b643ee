"""The command lines that `kvrelay up` writes are ones the services take."""

import importlib

import pytest

from coordinator.config import CoordinatorConfig
from decode_svc.config import DecodeConfig
from kvrelay.config import read_settings
from kvrelay.supervise.topology import Topology
from prefill_svc.config import PrefillConfig

EVERYTHING = Topology(
    model="/models/some",
    num_prefill=2,
    num_decode=3,
    num_threads=4,
    transport="stream",
    disaggregate="never",
    dtype="bfloat16",
    kv_dtype="fp8",
    wire_dtype="int8",
    block_size=32,
    num_blocks=64,
    drain_s=5.0,
)
DEFAULTS = Topology(model="/models/some")


@pytest.mark.parametrize("topology", [EVERYTHING, DEFAULTS])
def test_the_coordinator_takes_its_command_line(topology):
    """
    Every flag is a setting of it, and says what was wanted.
    """
    dash_m, module, *flags = topology.coordinator(
        listen="127.0.0.1:1234", http_listen="127.0.0.1:5678"
    )
    config = read_settings(CoordinatorConfig, service="coordinator", argv=flags, environ={})

    assert (dash_m, module) == ("-m", "coordinator")
    assert (config.model, config.listen) == ("/models/some", "127.0.0.1:1234")
    assert config.http_listen == "127.0.0.1:5678"
    assert config.expect_prefill == topology.num_prefill
    assert config.expect_decode == topology.num_decode
    assert config.disaggregate == topology.disaggregate
    assert config.drain_s == topology.drain_s


@pytest.mark.parametrize("topology", [EVERYTHING, DEFAULTS])
@pytest.mark.parametrize(("role", "cls"), [("prefill", PrefillConfig), ("decode", DecodeConfig)])
def test_workers_take_their_command_line(topology, role, cls):
    """
    Every flag is a setting of theirs; what was not chosen is left to their defaults.
    """
    _, module, *flags = topology.worker(role, 1, coordinator="127.0.0.1:1234")
    config = read_settings(cls, service=role, argv=flags, environ={})
    default = read_settings(cls, service=role, argv=["--model", "x"], environ={})

    assert importlib.util.find_spec(module) is not None
    assert (config.worker_id, config.coordinator) == (f"{role}-1", "127.0.0.1:1234")
    assert config.threads == topology.num_threads
    for name in ("transport", "dtype", "kv_dtype", "block_size", "num_blocks"):
        assert getattr(config, name) == (getattr(topology, name) or getattr(default, name))
    if role == "decode":
        assert config.wire_dtype == (topology.wire_dtype or default.wire_dtype)


@pytest.mark.parametrize(("role", "cls"), [("prefill", PrefillConfig), ("decode", DecodeConfig)])
def test_what_was_not_chosen_may_differ_between_the_pools(role, cls):
    """
    The environment has settings for each role, and no flag overrules them unasked.
    """
    given = {"TRANSPORT": "stream", "KV_DTYPE": "int8", "BLOCK_SIZE": "64"}
    environ = {f"KVRELAY_{role.upper()}_{name}": value for name, value in given.items()}
    _, _, *flags = DEFAULTS.worker(role, 0, coordinator="127.0.0.1:1234")
    config = read_settings(cls, service=role, argv=flags, environ=environ)

    assert (config.transport, config.kv_dtype, config.block_size) == ("stream", "int8", 64)


def test_every_worker_has_its_own_name():
    """
    Names count up within a role.
    """
    names = [f"{role}-{i}" for role, i in EVERYTHING.workers]

    assert names == ["prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"]
