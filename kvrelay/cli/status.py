"""`kvrelay status`: the pool, once or live."""

import asyncio
import json

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from kvrelay.cli import render
from kvrelay.cli.target import ANSWER_WITHIN_S, Target, fail
from kvrelay.client import Pool

WATCH_INTERVAL_S = 0.5


def status(target: Target, *, as_json: bool) -> None:
    """Print the pool as it is now."""
    target.run(_status(target, as_json=as_json))


def watch(target: Target) -> None:
    """Keep the pool on the screen until Ctrl-C."""
    if not Console().is_terminal:
        fail("--watch needs a terminal; --json prints the pool once, for programs")
    target.run(_watch(target))


async def _status(target: Target, *, as_json: bool) -> None:
    async with target.connect() as client:
        pool = await client.pool(timeout_s=ANSWER_WITHIN_S)
    if as_json:
        typer.echo(json.dumps(render.pool_json(pool)))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width; never break a row
    console.print(_drawn(pool, console))


async def _watch(target: Target) -> None:
    async with target.connect() as client:
        console = Console()
        with Live(console=console, auto_refresh=False, screen=True) as screen:
            while True:
                pool = await client.pool(timeout_s=ANSWER_WITHIN_S)
                screen.update(_drawn(pool, console), refresh=True)
                # The refresh of a display, not a wait for anything: loads change all the time.
                await asyncio.sleep(WATCH_INTERVAL_S)


def _drawn(pool: Pool, console: Console) -> RenderableType:
    return render.pool(pool, is_wide=console.width >= render.WIDE_COLUMNS)
