"""`kvrelay explain`: where the time of a past request went."""

import dataclasses
import json

import typer
from rich.console import Console

from kvrelay.cli import render
from kvrelay.cli.target import ANSWER_WITHIN_S, Target


def explain(target: Target, request_id: str, *, as_json: bool) -> None:
    """Show the ledger of a request that ended lately."""
    target.run(_explain(target, request_id, as_json=as_json))


async def _explain(target: Target, request_id: str, *, as_json: bool) -> None:
    async with target.connect() as client:
        ledger = await client.explain(request_id, timeout_s=ANSWER_WITHIN_S)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(ledger)))
    else:
        Console().print(render.ledger(ledger))
