"""What the command line refuses by itself, each by its name."""

import pytest
from typer.testing import CliRunner

from kvrelay.cli.app import app

REFUSED = {
    "no tokens": (("generate", "hi", "--max-tokens", "0"), "--max-tokens"),
    "no tokens in chat": (("chat", "--max-tokens", "0"), "--max-tokens"),
    "unknown transport": (("up", "--transport", "nixl"), "'shm', 'stream'"),
    "one TLS file": (("--tls-cert-file", "x.pem", "status"), "--tls-key-file"),
    "watched JSON": (("status", "--watch", "--json"), "--json"),
}


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
