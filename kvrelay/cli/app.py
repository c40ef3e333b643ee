"""The `kvrelay` command. Starts fast: no torch in this process, ever."""

import importlib.metadata
from typing import Annotated

import typer

from kvrelay.cli.chat import chat
from kvrelay.cli.demo import demo
from kvrelay.cli.explain import explain
from kvrelay.cli.generate import generate
from kvrelay.cli.health import health
from kvrelay.cli.pull import pull
from kvrelay.cli.status import status
from kvrelay.cli.up import up

app = typer.Typer(
    name="kvrelay",
    help="Serve a language model with prefill and decode on separate pools of workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (pull, up, generate, chat, status, health, explain):
    app.command()(command)
app.command(hidden=True)(demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvrelay {importlib.metadata.version('kvrelay')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the `kvrelay` script."""
    app()


if __name__ == "__main__":
    main()
