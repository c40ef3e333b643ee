"""`kvrelay health`: the standard gRPC health check as an exit status."""

import typer

from kvrelay.cli import target
from kvrelay.client import Client


def health(address: str, service: str) -> None:
    """End with status 0 if `service` serves."""
    target.run(address, _health(address, service))


async def _health(address: str, service: str) -> None:
    async with Client(address) as client:
        is_serving = await client.is_serving(service, timeout_s=target.ANSWER_WITHIN_S)
    if not is_serving:
        target.fail(f"{address} does not serve {service or 'yet'}")
    typer.echo("serving")
