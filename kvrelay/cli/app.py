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

from kvrelay.cli.target import DEFAULT, Target, Tls, checked
from kvrelay.store.catalog import SMOLLM2_135M_INSTRUCT
from kvrelay.transfer.chaos_spec import parse_chaos

MAX_U32 = 2**32 - 1
MAX_U64 = 2**64 - 1
DEFAULT_MODEL = SMOLLM2_135M_INSTRUCT.name

app = typer.Typer(
    name="kvrelay",
    help="Serve a language model with prefill and decode on separate pools of workers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Address = Annotated[
    str,
    typer.Option(
        envvar="KVRELAY_TARGET",
        metavar="HOST:PORT",
        callback=checked,
        help="The coordinator's gRPC address.",
    ),
]
Model = Annotated[
    str,
    typer.Option(metavar="NAME|DIR|FILE", help="A pulled model, a model directory, a .gguf file."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest token.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_U32, help="Most tokens of an answer. Default: the coordinator's."),
]


class Transport(StrEnum):
    """How KV travels."""

    AUTO = "auto"
    SHM = "shm"
    NIXL = "nixl"
    CUDA_IPC = "cuda_ipc"
    NCCL = "nccl"
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


class KvDtype(StrEnum):
    """What KV is kept in, or travels in."""

    AUTO = "auto"
    BFLOAT16 = "bfloat16"
    FP8 = "fp8"
    INT8 = "int8"


class BlockSize(StrEnum):
    """Token slots that a KV block may have."""

    OF_8 = "8"
    OF_16 = "16"
    OF_32 = "32"
    OF_64 = "64"


class Loop(StrEnum):
    """What decides when a request of a benchmark is sent."""

    CLOSED = "closed"
    OPEN = "open"


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


def checked_chaos(text: str) -> str:
    """`text` if it can be; ends the command with a sentence if not."""
    try:
        parse_chaos(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return text


@app.command()
def up(
    model: Model = DEFAULT_MODEL,
    prefill: Annotated[
        int | None,
        typer.Option(
            min=0, max=64, help="Prefill workers. Default: 1, and 0 with --disaggregate never."
        ),
    ] = None,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode workers.")] = 1,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The coordinator's gRPC port; 0 picks one.")
    ] = 50051,
    http_port: Annotated[
        int, typer.Option(min=0, max=65535, help="The OpenAI-style HTTP port; 0 picks one.")
    ] = 8000,
    transport: Annotated[
        Transport | None,
        typer.Option(help="How KV travels. Default: the best that two workers have in common."),
    ] = None,
    disaggregate: Annotated[
        Disaggregate, typer.Option(help="When prompts go to prefill workers.")
    ] = Disaggregate.AUTO,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and KV. Default: the workers'.")
    ] = None,
    kv_dtype: Annotated[
        KvDtype | None, typer.Option(help="Of KV alone. Default: the workers'.")
    ] = None,
    wire_dtype: Annotated[
        KvDtype | None,
        typer.Option(help="Of KV as it travels; fp8 and int8 are half of bfloat16. Default: auto."),
    ] = None,
    threads: Annotated[
        int, typer.Option(min=0, help="Most of each worker. 0: all cores, shared as needed.")
    ] = 0,
    block_size: Annotated[
        BlockSize | None, typer.Option(help="Token slots of a KV block. Default: the workers'.")
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
    chaos: Annotated[
        str,
        typer.Option(
            metavar="FAULT=RATE,...",
            callback=lambda value: checked_chaos(value) if value else "",
            help="For developers: handoffs go wrong on purpose, e.g. corrupt=0.05,delay=0.2:50ms.",
        ),
    ] = "",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show the processes' logs on stderr too.")
    ] = False,
) -> None:
    """Start a coordinator and its workers on this machine, and keep them alive.

    A flag is for all workers. What is to differ between the two pools is set in the environment
    instead: KVRELAY_PREFILL_KV_DTYPE, KVRELAY_DECODE_KV_DTYPE, KVRELAY_DECODE_BLOCK_SIZE and so on;
    a flag that is given overrules it.
    """
    from kvrelay.cli import up as command
    from kvrelay.supervise.topology import Topology

    if prefill is None:
        prefill = 0 if disaggregate is Disaggregate.NEVER else 1
    command.up(
        Topology(
            model=model,
            num_prefill=prefill,
            num_decode=decode,
            num_threads=threads,
            disaggregate=disaggregate.value,
            transport=transport.value if transport else None,
            dtype=dtype.value if dtype else None,
            kv_dtype=kv_dtype.value if kv_dtype else None,
            wire_dtype=wire_dtype.value if wire_dtype else None,
            block_size=int(block_size.value) if block_size else None,
            num_blocks=num_blocks,
            drain_s=drain_s,
            chaos=chaos,
        ),
        grpc_port=grpc_port,
        http_port=http_port,
        log_dir=log_dir,
        is_verbose=verbose,
    )


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to answer; `-` reads it from stdin.")],
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without chat template.")
    ] = False,
    max_tokens: MaxTokens = None,
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
    target: Address = DEFAULT,
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
        Target(target, context.obj),
        prompt,
        options,
        is_raw=raw,
        as_json=as_json,
        with_ledger=ledger,
        timeout_s=timeout,
    )


@app.command()
def chat(
    context: typer.Context,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    target: Address = DEFAULT,
) -> None:
    """Talk with the model."""
    from kvrelay.cli import chat as command
    from kvrelay.client import GenerateOptions

    options = GenerateOptions(max_tokens=max_tokens, temperature=temperature)
    command.chat(Target(target, context.obj), options, system=system)


@app.command()
def status(
    context: typer.Context,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep it on the screen.")] = False,
    target: Address = DEFAULT,
) -> None:
    """Show the workers: blocks, queues, running sequences."""
    from kvrelay.cli import status as command

    if watch and as_json:
        raise typer.BadParameter("--watch and --json exclude each other")
    where = Target(target, context.obj)
    command.watch(where) if watch else command.status(where, as_json=as_json)


@app.command()
def health(
    context: typer.Context,
    service: Annotated[
        str, typer.Option(help="A service's full name; empty asks for the whole process.")
    ] = "",
    target: Address = DEFAULT,
) -> None:
    """Exit with 0 if the server at the target serves, with 1 if not."""
    from kvrelay.cli import health as command

    command.health(Target(target, context.obj), service)


@app.command()
def explain(
    context: typer.Context,
    request_id: Annotated[str, typer.Argument(help="From `generate --json`, or from a log.")],
    as_json: AsJson = False,
    target: Address = DEFAULT,
) -> None:
    """Show the ledger of a request that ended lately."""
    from kvrelay.cli import explain as command

    command.explain(Target(target, context.obj), request_id, as_json=as_json)


@app.command()
def bench(
    context: typer.Context,
    http: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            callback=lambda value: checked(value) if value else None,
            help="Ask an OpenAI-style HTTP server there instead, ours or another.",
        ),
    ] = None,
    mode: Annotated[
        Loop, typer.Option(help="closed: clients ask in turn; open: requests come at a rate.")
    ] = Loop.CLOSED,
    clients: Annotated[
        int, typer.Option(min=1, max=4096, help="Of the closed loop and the warm-up.")
    ] = 1,
    rate: Annotated[
        list[float] | None,
        typer.Option(min=1e-3, help="Requests per second of an open loop; repeatable."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Of each run. Default: 64.")
    ] = None,
    duration_s: Annotated[
        float | None, typer.Option(min=0.001, help="Start no request of a run after this long.")
    ] = None,
    mix: Annotated[
        str, typer.Option(metavar="PROMPT:OUTPUT[:WEIGHT],...", help="Lengths in tokens.")
    ] = "128:32",
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Times and lengths in Mooncake's format."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=MAX_U64, help="Same seed, same work. Default: another each time."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, max=2, help="Of every request.")] = 0.0,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts are of token ids below. Default: the model's."),
    ] = None,
    ttft_slo_s: Annotated[float, typer.Option(min=0, help="Target of goodput.")] = 1.0,
    tpot_slo_s: Annotated[float, typer.Option(min=0, help="Target of goodput.")] = 0.1,
    warm_up: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Requests before all runs, not counted.")
    ] = 4,
    timeout: Annotated[
        float, typer.Option(min=0.001, metavar="S", help="Give up on one request after this.")
    ] = 300.0,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every number there.")
    ] = None,
    plot_path: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE.png", help="Draw goodput and TTFT against the rate."),
    ] = None,
    target: Address = DEFAULT,
) -> None:
    """Measure latency, throughput and goodput of a running deployment."""
    from kvrelay.cli import bench as command

    options = command.Options(
        http=http,
        is_open_loop=mode is Loop.OPEN,
        clients=clients,
        rates=tuple(rate or ()),
        requests=requests,
        duration_s=duration_s,
        mix=mix,
        trace=trace,
        seed=seed,
        temperature=temperature,
        vocab_size=vocab_size,
        ttft_slo_s=ttft_slo_s,
        tpot_slo_s=tpot_slo_s,
        warm_up=warm_up,
        timeout_s=timeout,
        json_path=json_path,
        plot_path=plot_path,
    )
    command.bench(Target(target, context.obj), options)


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
    context: typer.Context,
    tls_cert_file: Annotated[
        Path | None,
        typer.Option(envvar="KVRELAY_TLS_CERT_FILE", help="PEM certificate for the role `client`."),
    ] = None,
    tls_key_file: Annotated[
        Path | None,
        typer.Option(envvar="KVRELAY_TLS_KEY_FILE", help="PEM key of that certificate."),
    ] = None,
    tls_ca_file: Annotated[
        Path | None,
        typer.Option(envvar="KVRELAY_TLS_CA_FILE", help="PEM certificates that vouch for servers."),
    ] = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    context.obj = Tls(tls_cert_file, tls_key_file, tls_ca_file)


def main() -> None:
    """The entry point of the `kvrelay` script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 is no reason to fail
    app()


if __name__ == "__main__":
    main()
