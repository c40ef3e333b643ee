"""What the command line refuses by itself, each by its name."""

import typing
from typing import get_args

import pytest
from typer.testing import CliRunner

from kvrelay.cli import app as app_module
from kvrelay.cli import up
from kvrelay.cli.app import app
from kvrelay.transfer.build import TransportChoice
from kvrelay.transfer.wire_choice import WireDtype
from kvrelay.worker.settings import WorkerSettings

REFUSED = {
    "no tokens": (("generate", "hi", "--max-tokens", "0"), "--max-tokens"),
    "no tokens in chat": (("chat", "--max-tokens", "0"), "--max-tokens"),
    "unknown transport": (("up", "--transport", "pigeon"), "'auto', 'shm', 'nixl', 'cuda_ipc'"),
    "unknown dtype of KV": (("up", "--kv-dtype", "float32"), "'auto', 'bfloat16', 'fp8', 'int8'"),
    "unknown dtype on the way": (("up", "--wire-dtype", "int4"), "'bfloat16', 'fp8', 'int8'"),
    "a block of no such size": (("up", "--block-size", "12"), "'8', '16', '32', '64'"),
    "one TLS file": (("--tls-cert-file", "x.pem", "status"), "--tls-key-file"),
    "watched JSON": (("status", "--watch", "--json"), "--json"),
}


@pytest.mark.parametrize(
    ("flags", "num_prefill"),
    [
        ((), 1),
        (("--disaggregate", "never"), 0),
        (("--disaggregate", "never", "--prefill", "2"), 2),
    ],
)
def test_where_nothing_is_disaggregated_no_prefill_worker_is_started(
    flags, num_prefill, monkeypatch
):
    """
    Unless one is asked for.
    """
    taken = []
    monkeypatch.setattr(up, "up", lambda topology, **_: taken.append(topology))
    done = CliRunner().invoke(app, ["up", *flags])

    assert done.exit_code == 0
    assert [topology.num_prefill for topology in taken] == [num_prefill]


def test_what_kv_is_kept_in_and_travels_in_is_passed_on(monkeypatch):
    """
    As it was typed; what was not typed is left to the workers' settings.
    """
    taken = []
    monkeypatch.setattr(up, "up", lambda topology, **_: taken.append(topology))
    flags = ("--kv-dtype", "fp8", "--wire-dtype", "auto", "--transport", "nixl")
    for some in (flags, ()):
        assert CliRunner().invoke(app, ["up", *some]).exit_code == 0

    chosen = [(it.kv_dtype, it.wire_dtype, it.transport, it.block_size) for it in taken]
    assert chosen == [("fp8", "auto", "nixl", None), (None, None, None, None)]


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("transport", WorkerSettings.model_fields["transport"].annotation),
        ("transport", TransportChoice),
        ("kv_dtype", WorkerSettings.model_fields["kv_dtype"].annotation),
        ("wire_dtype", WireDtype),
        ("block_size", WorkerSettings.model_fields["block_size"].annotation),
    ],
)
def test_an_option_of_up_offers_what_the_workers_take(option, setting):
    """
    Every choice, in the same order.
    """
    (choices, _) = get_args(typing.get_type_hints(app_module.up)[option])

    assert [choice.value for choice in choices] == [str(it) for it in get_args(setting)]


def test_a_model_that_is_nowhere_is_refused_with_what_there_is(tmp_path, monkeypatch):
    """
    The hint names what can be had, not another command that would refuse it.
    """
    monkeypatch.setenv("KVRELAY_CACHE_DIR", str(tmp_path))
    done = CliRunner().invoke(app, ["up", "--model", "nosuch"])

    assert done.exit_code == 1
    assert "known: smollm2-135m-instruct; or a .gguf file" in done.output


def test_a_name_that_does_not_resolve_is_told():
    """
    Nothing could be started that would answer there.
    """
    done = CliRunner().invoke(app, ["status", "--target", "nosuch.invalid:1"])

    assert done.exit_code == 1
    assert "the name nosuch.invalid does not resolve" in done.output


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_option_is_a_usage_error_that_names_it(case, monkeypatch):
    """
    Status 2, before anything is dialled or started.
    """
    monkeypatch.setenv("COLUMNS", "200")
    arguments, named = REFUSED[case]
    done = CliRunner().invoke(app, [*arguments])

    assert done.exit_code == 2
    assert named in done.output
