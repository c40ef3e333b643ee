"""Settings of both workers: what is refused, by what name."""

import subprocess
import sys

import pytest

from decode_svc.config import DecodeConfig
from kvrelay.config import SettingsError, read_settings
from prefill_svc.config import PrefillConfig

CONFIGS = [("prefill", PrefillConfig), ("decode", DecodeConfig)]


def settings(service, config, *argv, **environ):
    return read_settings(config, service=service, argv=["--model", "m", *argv], environ=environ)


@pytest.mark.parametrize(("service", "config"), CONFIGS)
def test_a_flag_is_a_number_where_a_number_is_meant(service, config):
    """Text from flags and environment becomes what the field is."""
    prefix = f"KVRELAY_{service.upper()}_"
    made = settings(service, config, "--block-size", "32", **{f"{prefix}NUM_BLOCKS": "7"})

    assert (made.block_size, made.num_blocks) == (32, 7)


@pytest.mark.parametrize(("service", "config"), CONFIGS)
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--block-size", "12"),
        ("--block-size", "x"),
        ("--dtype", "float16"),
        ("--threads", "-1"),
        ("--worker-id", "Not A Name"),
        ("--coordinator", "nowhere"),
        ("--budget-tokens", "1"),
        ("--transport", "pigeon"),
        ("--drain-s", "nan"),
        ("--kv-dtype", "float32"),
        ("--kv-dtype", "int4"),
        ("--block-size", "4"),
        ("--hold-s", "0"),
    ],
)
def test_an_impossible_value_is_refused_by_name(service, config, flag, value):
    """The message names the setting and the value."""
    with pytest.raises(SettingsError) as caught:
        settings(service, config, flag, value)

    assert flag[2:].replace("-", "_") in str(caught.value)
    assert value in str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--wire-dtype", "float32"),
        ("--wire-dtype", "int4"),
        ("--landing-mib", "0"),
        ("--batch-mib", "0"),
        ("--max-landings", "0"),
        ("--release-timeout-s", "0"),
        ("--chaos", "corrupt=2"),
        ("--chaos", "rain=0.1"),
    ],
)
def test_what_only_a_decode_worker_may_choose_is_refused_by_name(flag, value):
    """How KV comes is its puller's choice; a prefill worker knows no such setting."""
    name = flag[2:].replace("-", "_")
    with pytest.raises(SettingsError) as caught:
        settings("decode", DecodeConfig, flag, value)
    assert name in str(caught.value)
    with pytest.raises(SettingsError, match=flag[2:]):
        settings("prefill", PrefillConfig, flag, value)


@pytest.mark.parametrize("wire_dtype", ["auto", "bfloat16", "fp8", "int8"])
def test_a_wire_dtype_is_taken_as_it_is_said(wire_dtype):
    """`auto` if nothing is said."""
    said = settings("decode", DecodeConfig, "--wire-dtype", wire_dtype)
    silent = settings("decode", DecodeConfig)

    assert said.wire_dtype == wire_dtype
    assert (silent.wire_dtype, silent.kv_dtype, silent.chaos_spec) == ("auto", "auto", None)


def test_chaos_is_a_spec_once_it_is_asked_for():
    """What a developer wrote, read once."""
    spec = settings("decode", DecodeConfig, "--chaos", "corrupt=0.5,seed=7").chaos_spec

    assert spec is not None
    assert spec.seed == 7


def test_float32_kv_is_not_asked_for_in_another_form():
    """It is for checking, and no handoff of it would succeed; other KV may be."""
    with pytest.raises(SettingsError, match="wire_dtype: is int8, but float32 KV travels as it is"):
        settings("decode", DecodeConfig, "--dtype", "float32", "--wire-dtype", "int8")

    for flags in (("--kv-dtype", "bfloat16", "--wire-dtype", "int8"), ("--wire-dtype", "auto")):
        assert settings("decode", DecodeConfig, "--dtype", "float32", *flags)


@pytest.mark.parametrize(
    ("service", "argv"),
    [("prefill", ["--model", "/nowhere/at/all"]), ("decode", ["--blokc-size", "16"])],
)
def test_a_refused_start_is_one_line_and_exit_2(service, argv):
    """Whether a setting or the model is at fault."""
    ended = subprocess.run(
        [sys.executable, "-m", f"{service}_svc", *argv], capture_output=True, text=True
    )

    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert argv[0] in ended.stderr or argv[1] in ended.stderr


def test_a_broken_engine_ends_the_process_at_once():
    """Exit 70, after the log has said why."""
    code = (
        "from kvrelay import process\n"
        "from kvrelay.obs import logging\n"
        "logging.configure(level='info', fmt='json')\n"
        "process.crash(FloatingPointError('logits'))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert ended.returncode == 70
    assert "process.broken" in ended.stderr
