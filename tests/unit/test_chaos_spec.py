"""What `--chaos` takes, and how it refuses the rest."""

import pytest
from typer.testing import CliRunner

from decode_svc.config import DecodeConfig
from kvrelay.cli.app import app
from kvrelay.config import SettingsError, read_settings
from kvrelay.supervise.topology import Topology
from kvrelay.transfer.chaos_spec import ChaosSpec, Fault, parse_chaos


def test_each_part_says_one_thing():
    """Rates by the name of the fault, times with their unit, and a seed."""
    spec = parse_chaos("corrupt=0.05,drop=0.1, delay=0.2:50ms,stall=0.01:1.5s,seed=7")

    rates = {Fault.CORRUPT: 0.05, Fault.DROP: 0.1, Fault.DELAY: 0.2, Fault.STALL: 0.01}
    assert spec == ChaosSpec(rates=rates, delay_s=0.05, stall_s=1.5, seed=7)


@pytest.mark.parametrize("fault", Fault)
def test_every_fault_can_be_asked_for(fault):
    """By its own name; the rest has defaults."""
    assert parse_chaos(f"{fault.value}=1") == ChaosSpec(rates={fault: 1.0})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "corupt=0.1",
        "corrupt",
        "corrupt=",
        "corrupt=lots",
        "corrupt=nan",
        "corrupt=-0.1",
        "corrupt=1.01",
        "corrupt=0.1:50ms",
        "corrupt=0.1,corrupt=0.2",
        "corrupt=0.1,,drop=0.1",
        "delay=0.1:50",
        "delay=0.1:",
        "delay=0.1:-1s",
        "delay=0.1:1h",
        "stall=0.1:601s",
        "seed=",
        "seed=-1",
        "seed=x",
        "seed=1,seed=2",
        f"seed={1 << 64}",
        "drop=0." + "1" * 600,
    ],
)
def test_what_cannot_be_is_refused(text):
    """A typo must not be a calm run."""
    with pytest.raises(ValueError, match=r"may be drop|at most"):
        parse_chaos(text)


def test_a_refusal_names_the_part_and_what_may_be_given():
    """So that nobody needs the documentation to mend it."""
    with pytest.raises(ValueError, match=r"'dorp=0\.1': unknown; may be drop\|delay\|.*seed=NUM"):
        parse_chaos("corrupt=0.05,dorp=0.1")


def test_the_command_refuses_a_typo_before_it_starts_anything():
    """With the sentence, as a wrong use of the command."""
    result = CliRunner().invoke(app, ["up", "--chaos", "dorp=0.1"])

    assert result.exit_code == 2
    assert "'dorp=0.1': unknown" in result.output


def test_only_decode_workers_are_told():
    """They alone pull."""
    topology = Topology(model="m", chaos="drop=0.1")
    decode, prefill = (topology.worker(r, 0, coordinator="h:1") for r in ("decode", "prefill"))

    assert decode[decode.index("--chaos") + 1] == "drop=0.1"
    assert "--chaos" not in prefill
    assert "--chaos" not in Topology(model="m").worker("decode", 0, coordinator="h:1")


def test_a_decode_worker_refuses_a_typo_by_name():
    """Its flag, its variable and its file take the same text."""
    with pytest.raises(SettingsError, match=r"chaos = 'drop=2' from --chaos: .*0 to 1"):
        read_settings(
            DecodeConfig, service="decode", argv=["--model", "m", "--chaos", "drop=2"], environ={}
        )
    settings = read_settings(
        DecodeConfig,
        service="decode",
        argv=["--model", "m"],
        environ={"KVRELAY_DECODE_CHAOS": "drop=0.5,seed=3"},
    )
    assert settings.chaos_spec == ChaosSpec(rates={Fault.DROP: 0.5}, seed=3)
