"""Settings come from file, environment and flags, and are refused by name."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field

from kvrelay.config import (
    ServiceSettings,
    SettingsError,
    exit_when_refused,
    help_text,
    is_loopback,
    load_settings,
    read_settings,
    split_address,
)
from kvrelay.errors import ModelInvalid


class WorkerSettings(ServiceSettings):
    model: str
    """Directory of the model."""

    block_size: Annotated[int, Field(ge=1, le=256)] = 16
    """Token slots of a block."""


def read(*argv, environ=None, model="m"):
    given = [*argv, "--model", model] if model else argv
    return read_settings(WorkerSettings, service="prefill", argv=given, environ=environ or {})


def write_toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "kvrelay.toml"
    path.write_text(text)
    return str(path)


def test_flags_overrule_the_environment_which_overrules_the_file(tmp_path):
    """Each source gives what the ones above it leave open."""
    file = write_toml(tmp_path, '[prefill]\nblock_size = 1\nlog_level = "debug"\nready_fd = 7\n')
    environ = {"KVRELAY_PREFILL_BLOCK_SIZE": "2", "KVRELAY_PREFILL_LOG_LEVEL": "error"}

    settings = read("--config", file, "--block-size=4", environ=environ)

    assert (settings.block_size, settings.log_level, settings.ready_fd) == (4, "error", 7)


def test_top_level_keys_are_shared_and_tables_of_other_services_are_not_read(tmp_path):
    """One file can configure all services."""
    text = "block_size = 8\n[prefill]\nready_fd = 1\n[decode]\nblock_size = 9\nnonsense = 1\n"

    settings = read("--config", write_toml(tmp_path, text))

    assert (settings.block_size, settings.ready_fd) == (8, 1)


def test_the_file_may_be_named_by_the_environment(tmp_path):
    """A container is configured without flags."""
    file = write_toml(tmp_path, "block_size = 8\n")

    assert read(environ={"KVRELAY_PREFILL_CONFIG": file}).block_size == 8


def test_a_switch_is_turned_on_and_off_by_flags():
    """`--insecure` and `--no-insecure` need no value; the last one counts."""
    assert read("--insecure").insecure is True
    assert read("--insecure", "--no-insecure").insecure is False
    assert read("--insecure=false").insecure is False
    assert read("--no-insecure", environ={"KVRELAY_PREFILL_INSECURE": "1"}).insecure is False


@pytest.mark.parametrize("flag", ["--blokc-size", "--block_size", "--no-block-size", "-b", "model"])
def test_an_unknown_flag_is_refused_with_those_there_are(flag):
    """Nothing is guessed, abbreviated or ignored."""
    with pytest.raises(SettingsError) as refused:
        read(flag)

    assert str(refused.value).startswith(f"{flag} is not a setting; have ")
    assert "--block-size" in str(refused.value)


def test_an_unknown_variable_is_refused_with_those_there_are():
    """Only variables with the service's own prefix are looked at."""
    with pytest.raises(
        SettingsError, match=r"KVRELAY_PREFILL_BLOKC_SIZE is not a setting; have KVRELAY_PREFILL_"
    ):
        read(environ={"KVRELAY_PREFILL_BLOKC_SIZE": "1", "KVRELAY_DECODE_X": "1", "PATH": "/"})


@pytest.mark.parametrize("text", ["blokc_size = 1\n", "[prefill]\nblokc_size = 1\n", "[prefil]\n"])
def test_an_unknown_key_of_the_file_is_refused_with_those_there_are(tmp_path, text):
    """At the top level and in the service's table alike."""
    with pytest.raises(SettingsError, match=r"kvrelay.toml: \w+ is not a setting; have .*block_si"):
        read("--config", write_toml(tmp_path, text))


def test_an_impossible_value_is_refused_with_its_source_and_bounds(tmp_path):
    """Whoever reads the sentence knows what to change and where."""
    file = write_toml(tmp_path, "block_size = 0\n")
    cases = {
        "block_size = '0' from --block-size": lambda: read("--block-size", "0"),
        "block_size = 'x' from environment KVRELAY_PREFILL_BLOCK_SIZE": lambda: read(
            environ={"KVRELAY_PREFILL_BLOCK_SIZE": "x"}
        ),
        f"block_size = 0 from file {file}": lambda: read("--config", file),
    }
    for sentence, act in cases.items():
        with pytest.raises(SettingsError) as refused:
            act()
        assert str(refused.value).startswith(sentence)
        assert str(refused.value).endswith("bounds: at least 1, at most 256")


def test_all_impossible_values_are_named_at_once():
    """A second start does not find the second mistake."""
    with pytest.raises(SettingsError, match=r"listen = 'x' .*; block_size = '0'"):
        read("--listen", "x", "--block-size", "0")


def test_a_missing_setting_is_named_with_its_flag():
    """What has no default must be given."""
    with pytest.raises(SettingsError, match=r"model must be set \(--model\)"):
        read(model=None)


@pytest.mark.parametrize("argv", [("--block-size",), ("--config", "/nowhere/x.toml")])
def test_a_flag_without_value_or_file_is_refused(argv):
    """The flag is named."""
    with pytest.raises(SettingsError, match=argv[0]):
        read_settings(WorkerSettings, service="prefill", argv=argv, environ={})


def test_a_file_that_is_not_toml_is_refused(tmp_path):
    """With the parser's word on where."""
    with pytest.raises(SettingsError, match=r"kvrelay\.toml: .*line 1"):
        read("--config", write_toml(tmp_path, "block_size 8"))


def test_tls_files_come_all_three_or_none():
    """Half of mutual TLS is none."""
    argv = ["--tls-cert-file", "c", "--tls-key-file", "k"]

    with pytest.raises(SettingsError, match="all three or none"):
        read(*argv)
    tls = read(*argv, "--tls-ca-file", "a").tls
    assert tls is not None
    assert (tls.cert, tls.key, tls.ca) == (Path("c"), Path("k"), Path("a"))
    assert read(environ={"KVRELAY_PREFILL_TLS_CERT_FILE": ""}).tls is None


def test_metrics_are_bound_to_loopback_unless_told_otherwise():
    """They too are reached by whoever reaches the address."""
    with pytest.raises(SettingsError, match=r"metrics_listen.*insecure"):
        read("--metrics-listen", "0.0.0.0:9000")

    assert read("--metrics-listen", "127.0.0.1:9000").metrics_listen == "127.0.0.1:9000"
    assert read("--metrics-listen", "0.0.0.0:9000", "--insecure").metrics_listen == "0.0.0.0:9000"


def test_the_advertised_address_has_the_port_that_was_bound():
    """Port 0 stands for it; a host that means "all" is replaced by this machine's name."""
    assert read().advertised("127.0.0.1:5") == "127.0.0.1:5"
    assert read("--advertise", "prefill:0").advertised("0.0.0.0:5") == "prefill:5"
    assert read("--advertise", "prefill:9").advertised("0.0.0.0:5") == "prefill:9"
    assert not read().advertised("0.0.0.0:5").startswith("0.0.0.0")


@pytest.mark.parametrize("text", ["", "x", "x:", ":1", "x:-1", "x:65536", "x:1a", "::1:5", "x:٣"])
def test_what_is_no_address_is_refused(text):
    """An address is HOST:PORT, IPv6 in brackets."""
    with pytest.raises(ValueError, match="must"):
        split_address(text)


def test_addresses_are_split_and_loopback_is_known():
    """The brackets of IPv6 are no part of the host."""
    assert split_address("[::1]:50051") == ("::1", 50051)
    assert split_address("worker-0.pool:0") == ("worker-0.pool", 0)
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org")))


def test_help_names_every_setting_with_meaning_and_bounds():
    """Flags and their docs are made from the fields."""
    text = help_text(WorkerSettings, service="prefill")

    assert "--block-size SIZE\n      Token slots of a block. (default 16; at least 1" in text
    assert "--model MODEL\n      Directory of the model. (required)" in text
    assert "--insecure | --no-insecure" in text


def test_the_printed_configuration_can_be_read_again(tmp_path, capsys):
    """`--print-config` gives a file that means the same."""
    argv = ["--model", 'a "b"', "--block-size", "8", "--print-config"]
    with pytest.raises(SystemExit) as end:
        load_settings(WorkerSettings, service="prefill", argv=argv)
    printed = capsys.readouterr().out

    again = read("--config", write_toml(tmp_path, printed), model=None)
    assert end.value.code == 0
    assert "block_size = 8  # --block-size" in printed
    assert (again.model, again.block_size) == ('a "b"', 8)


def test_help_exits_0_and_a_refusal_2(capsys):
    """A refusal is one line on stderr."""
    with pytest.raises(SystemExit) as helped:
        load_settings(WorkerSettings, service="decode", argv=["--help"])
    assert helped.value.code == 0
    assert "KVRELAY_DECODE_NAME" in capsys.readouterr().out

    with pytest.raises(SystemExit) as refused:
        load_settings(WorkerSettings, service="decode", argv=["--nope"])
    assert refused.value.code == 2
    assert capsys.readouterr().err.startswith("kvrelay decode: --nope is not a setting")


def test_a_model_that_cannot_be_served_is_a_refused_start(capsys):
    """It ends as a bad setting does, with the file named."""
    with pytest.raises(SystemExit) as refused, exit_when_refused("prefill"):
        raise ModelInvalid("m/config.json", "missing")

    assert refused.value.code == 2
    assert capsys.readouterr().err == "kvrelay prefill: m/config.json: missing\n"
