"""`kvrelay health`: the standard gRPC health check as an exit status."""

from typing import Annotated

import typer

from kvrelay.cli import target
from kvrelay.client import Client


def health(
    service: Annotated[
        str, typer.Option(help="A service's full name; empty asks for the whole process.")
    ] = "",
    address: target.Target = target.DEFAULT,
) -> None:
    """Exit with 0 if the server at the target serves, with 1 if not."""
    target.run(address, _health(address, service))


async def _health(address: str, service: str) -> None:
    async with Client(address) as client:
        is_serving = await client.is_serving(service, timeout_s=target.ANSWER_WITHIN_S)
    if not is_serving:
        target.fail(f"{address} does not serve {service or 'yet'}")
    typer.echo("serving")
