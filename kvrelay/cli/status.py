"""`kvrelay status`: the pool, once or live."""

import asyncio
import json
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live

from kvrelay.cli import render, target
from kvrelay.client import Client

WATCH_INTERVAL_S = 0.5


def status(
    as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep it on the screen.")] = False,
    address: target.Target = target.DEFAULT,
) -> None:
    """Show the workers: blocks, queues, running sequences."""
    if watch and as_json:
        raise typer.BadParameter("--watch and --json exclude each other")
    target.run(address, _watch(address) if watch else _status(address, as_json=as_json))


async def _status(address: str, *, as_json: bool) -> None:
    async with Client(address) as client:
        pool = await client.pool(timeout_s=target.ANSWER_WITHIN_S)
    if as_json:
        typer.echo(json.dumps(render.pool_json(pool)))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width; never break a row
    console.print(render.pool(pool))


async def _watch(address: str) -> None:
    async with Client(address) as client:
        with Live(auto_refresh=False, screen=True) as screen:
            while True:
                pool = await client.pool(timeout_s=target.ANSWER_WITHIN_S)
                screen.update(render.pool(pool), refresh=True)
                await asyncio.sleep(WATCH_INTERVAL_S)
