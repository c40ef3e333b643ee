"""`kvrelay demo`: everything once: two pools, one question, its answer and its ledger."""

import asyncio
from pathlib import Path

import typer
from rich.console import Console

from kvrelay.cli import model as models
from kvrelay.cli import render, target
from kvrelay.cli.generate import stream
from kvrelay.cli.up import Screen, Wanted, explain_failure, make_deployment, make_log_dir
from kvrelay.client import Client, GenerateOptions, Message
from kvrelay.errors import ServingError
from kvrelay.supervise.deployment import Deployment
from kvrelay.supervise.keeper import ProcessFailed
from kvrelay.supervise.topology import Topology


def demo(question: str, model: str) -> None:
    """Start a deployment, answer one question, show where the time went, and stop."""
    screen = Screen(Console(stderr=True, highlight=False))
    try:
        wanted = Wanted(model=model, disaggregate="always")
        topology = wanted.topology(models.ensure(model, console=screen.console))
        asyncio.run(_demo(topology, question, make_log_dir(None), screen))
    except ServingError as error:
        target.fail(str(error))
    except ProcessFailed:
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(target.INTERRUPTED) from None


async def _demo(topology: Topology, question: str, log_dir: Path, screen: Screen) -> None:
    deployment = make_deployment(topology, grpc_port=0, http_port=0, log_dir=log_dir, screen=screen)
    screen.say(f"starting a coordinator, a prefill and a decode worker; logs: {log_dir}")
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
    ready = await deployment.start()
    screen.settle()
    screen.say(str(ready))
    typer.echo(f"\n> {question}")
    options = GenerateOptions(max_tokens=64, temperature=0.0)
    async with Client(ready.address.grpc) as client:
        answer = await stream(client, [Message("user", question)], options, timeout_s=120.0)
    assert answer.finished is not None, "a stream without an end"
    typer.echo()
    Console().print(render.ledger(answer.finished.ledger))
