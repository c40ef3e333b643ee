"""The `kvrelay` command: all that can be typed, and nothing else.

What a command does is in the module of its name, imported when it is called: `--help` must
not wait for gRPC, and torch is never loaded in this process.
"""

import importlib.metadata
import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kvrelay.cli import target
from kvrelay.store.catalog import SMOLLM2_135M_INSTRUCT

MAX_U32 = 2**32 - 1
MAX_U64 = 2**64 - 1
DEFAULT_MODEL = SMOLLM2_135M_INSTRUCT.name
DEFAULT_MAX_TOKENS = 256

app = typer.Typer(
    name="kvrelay",
    help="Serve a language model with prefill and decode on separate pools of workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Target = Annotated[
    str,
    typer.Option(
        envvar="KVRELAY_TARGET",
        metavar="HOST:PORT",
        callback=target.checked,
        help="The coordinator's gRPC address.",
    ),
]
Model = Annotated[
    str, typer.Option(metavar="NAME|DIR", help="A pulled model, or a model directory.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]


class Transport(StrEnum):
    """How KV travels."""

    AUTO = "auto"
    SHM = "shm"
    STREAM = "stream"


class Disaggregate(StrEnum):
    """When a request's prompt goes to a prefill worker."""

    ALWAYS = "always"
    AUTO = "auto"
    NEVER = "never"


class Dtype(StrEnum):
    """What weights and KV are kept in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"


@app.command()
def pull(
    source: Annotated[
        str,
        typer.Argument(
            help=f"A known model ({DEFAULT_MODEL}), a .gguf file, "
            "a Hugging Face directory, or a hub id ORG/NAME."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call the model.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Pull again even if the model is already there.")
    ] = False,
) -> None:
    """Fetch or convert a model so that `kvrelay up` can serve it."""
    from kvrelay.cli import pull as command

    command.pull(source, name=name, force=force)


@app.command()
def up(
    model: Model = DEFAULT_MODEL,
    prefill: Annotated[int, typer.Option(min=0, max=64, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode workers.")] = 1,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The coordinator's gRPC port; 0 picks one.")
    ] = 50051,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The OpenAI-style HTTP port; 0 picks one.")
    ] = 8000,
    transport: Annotated[Transport, typer.Option(help="How KV travels.")] = Transport.AUTO,
    disaggregate: Annotated[
        Disaggregate, typer.Option(help="When prompts go to prefill workers.")
    ] = Disaggregate.AUTO,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and KV. Default: the workers'.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each worker. Default: the cores, shared out.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(min=1, help="Token slots of a KV block. Default: the workers'.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, help="KV blocks of each worker. Default: the workers'.")
    ] = None,
    drain_s: Annotated[
        float, typer.Option(min=0, help="Longest wait for running requests at the end.")
    ] = 30.0,
    log_dir: Annotated[
        Path | None, typer.Option(help="Where logs go. Default: ~/.cache/kvrelay/logs/...")
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the processes' logs on stderr too.")
    ] = False,
) -> None:
    """Start a coordinator and its workers on this machine, and keep them alive."""
    from kvrelay.cli import up as command

    command.up(
        command.Wanted(
            model=model,
            num_prefill=prefill,
            num_decode=decode,
            num_threads=threads,
            transport=transport.value,
            disaggregate=disaggregate.value,
            dtype=dtype.value if dtype else None,
            block_size=block_size,
            num_blocks=num_blocks,
            drain_s=drain_s,
        ),
        grpc_port=grpc_port,
        http_port=http_port,
        log_dir=log_dir,
        is_verbose=verbose,
    )


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to answer; `-` reads it from stdin.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(min=0, max=MAX_U32, help="Most tokens to generate.")
    ] = DEFAULT_MAX_TOKENS,
    temperature: Temperature = None,
    top_k: Annotated[
        int | None, typer.Option(min=0, max=MAX_U32, help="Keep the k likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this times the likeliest.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_U64, help="Same seed, same tokens.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="End before this text; repeatable.")
    ] = None,
    as_json: AsJson = False,
    ledger: Annotated[
        bool, typer.Option("--ledger", help="Show where the time went, after the text.")
    ] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, metavar="S", help="Give up after this many seconds.")
    ] = None,
    target: Target = target.DEFAULT,
) -> None:
    """Generate from a prompt and stream the text."""
    from kvrelay.cli import generate as command
    from kvrelay.client import GenerateOptions

    options = GenerateOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    command.generate(
        target,
        prompt,
        options,
        is_raw=raw,
        as_json=as_json,
        with_ledger=ledger,
        timeout_s=timeout,
    )


@app.command()
def chat(
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_U32, help="Most tokens of one answer.")
    ] = DEFAULT_MAX_TOKENS,
    temperature: Temperature = None,
    target: Target = target.DEFAULT,
) -> None:
    """Talk with the model."""
    from kvrelay.cli import chat as command
    from kvrelay.client import GenerateOptions

    options = GenerateOptions(max_tokens=max_tokens, temperature=temperature)
    command.chat(target, options, system=system)


@app.command()
def status(
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep it on the screen.")] = False,
    target: Target = target.DEFAULT,
) -> None:
    """Show the workers: blocks, queues, running sequences."""
    from kvrelay.cli import status as command

    if watch and as_json:
        raise typer.BadParameter("--watch and --json exclude each other")
    command.watch(target) if watch else command.status(target, as_json=as_json)


@app.command()
def health(
    service: Annotated[
        str, typer.Option(help="A service's full name; empty asks for the whole process.")
    ] = "",
    target: Target = target.DEFAULT,
) -> None:
    """Exit with 0 if the server at the target serves, with 1 if not."""
    from kvrelay.cli import health as command

    command.health(target, service)


@app.command()
def explain(
    request_id: Annotated[str, typer.Argument(help="From `generate --json`, or from a log.")],
    as_json: AsJson = False,
    target: Target = target.DEFAULT,
) -> None:
    """Show the ledger of a request that ended lately."""
    from kvrelay.cli import explain as command

    command.explain(target, request_id, as_json=as_json)


@app.command(hidden=True)
def demo(
    question: Annotated[str, typer.Argument()] = "What is the capital of France?",
    model: Model = DEFAULT_MODEL,
) -> None:
    """Start a deployment, answer one question, show where the time went, and stop."""
    from kvrelay.cli import demo as command

    command.demo(question, model)


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail
    app()


if __name__ == "__main__":
    main()
