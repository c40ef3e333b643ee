"""`kvrelay explain`: where the time of a past request went."""

import dataclasses
import json

import typer
from rich.console import Console

from kvrelay.cli import render, target
from kvrelay.client import Client


def explain(address: str, request_id: str, *, as_json: bool) -> None:
    """Show the ledger of a request that ended lately."""
    target.run(address, _explain(address, request_id, as_json=as_json))


async def _explain(address: str, request_id: str, *, as_json: bool) -> None:
    async with Client(address) as client:
        ledger = await client.explain(request_id, timeout_s=target.ANSWER_WITHIN_S)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(ledger)))
    else:
        Console().print(render.ledger(ledger))
