"""`kvrelay demo`: everything once: two pools, one question, its answer and its ledger."""

import asyncio
import shutil
import sys
import time
from pathlib import Path

import typer
from rich.console import Console

from kvrelay.cli import render
from kvrelay.cli.generate import stream
from kvrelay.cli.target import INTERRUPTED, ConnectionLost, fail
from kvrelay.cli.up import (
    Screen,
    explain_failure,
    make_deployment,
    make_log_dir,
    with_model,
)
from kvrelay.client import Client, GenerateOptions, Message
from kvrelay.errors import ServingError
from kvrelay.supervise.deployment import Deployment
from kvrelay.supervise.keeper import ProcessFailed
from kvrelay.supervise.topology import Topology


def demo(question: str, model: str) -> None:
    """Start a deployment, answer one question, show where the time went, and stop."""
    screen = Screen(Console(stderr=True, highlight=False))
    try:
        topology = Topology(model=model, disaggregate="always")
        topology = with_model(topology, screen.console)
        asyncio.run(_demo(topology, question, make_log_dir(None), screen))
    except (ServingError, ConnectionLost) as error:
        fail(str(error))
    except ProcessFailed:
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


async def _demo(topology: Topology, question: str, log_dir: Path, screen: Screen) -> None:
    deployment = make_deployment(topology, grpc_port=0, http_port=0, log_dir=log_dir, screen=screen)
    screen.say("Starting a coordinator, a prefill worker and a decode worker.")
    screen.say(f"Logs: {log_dir}")
    screen.begin(topology)
    try:
        await _ask(deployment, question, screen)
    except ProcessFailed as failure:
        screen.settle()
        explain_failure(failure, log_dir, screen)
        raise
    finally:
        screen.settle()
        screen.is_ending = True
        await deployment.drain()


async def _ask(deployment: Deployment, question: str, screen: Screen) -> None:
    began_at_s = time.monotonic()
    ready = await deployment.start()
    screen.settle()
    screen.say(f"Ready after {time.monotonic() - began_at_s:.1f} s.")
    typer.echo(f"\n> {question}")
    options = GenerateOptions(max_tokens=64, temperature=0.0)
    async with Client(ready.address.grpc) as client:
        answer = await stream(client, [Message("user", question)], options, timeout_s=120.0)
    assert answer.finished is not None, "a stream without an end"
    typer.echo()
    Console().print(render.ledger(answer.finished.ledger))
    screen.say(_what_next())


def _what_next() -> str:
    """Lines to copy: by its name where the shell finds it, else as it was called."""
    called = sys.argv[0] if sys.argv[0].endswith("/kvrelay") else "kvrelay"
    kvrelay = "kvrelay" if shutil.which("kvrelay") else called
    steps = {
        "up": "serve until Ctrl-C: gRPC at 50051, OpenAI's HTTP at 8000",
        "status --watch": "see its workers, from another terminal",
        "chat": "talk with the model",
        'generate "Why?" --ledger': "ask once, and see where the time went",
    }
    lines = [f"  {kvrelay} {words:26}{meaning}" for words, meaning in steps.items()]
    return "\n".join(["\nWhat to try next:", *lines])
