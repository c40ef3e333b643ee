"""`kvrelay status`: the pool, once or live."""

import asyncio
import json

import typer
from rich.console import Console
from rich.live import Live

from kvrelay.cli import render, target
from kvrelay.client import Client

WATCH_INTERVAL_S = 0.5


def status(address: str, *, as_json: bool) -> None:
    """Print the pool as it is now."""
    target.run(address, _status(address, as_json=as_json))


def watch(address: str) -> None:
    """Keep the pool on the screen until Ctrl-C."""
    target.run(address, _watch(address))


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
