"""`kvrelay health`: the standard gRPC health check as an exit status."""

import typer

from kvrelay.cli.target import ANSWER_WITHIN_S, Target, fail


def health(target: Target, service: str) -> None:
    """End with status 0 if `service` serves."""
    target.run(_health(target, service))


async def _health(target: Target, service: str) -> None:
    async with target.connect() as client:
        is_serving = await client.is_serving(service, timeout_s=ANSWER_WITHIN_S)
    if not is_serving:
        fail(f"{target.address} does not serve {service or 'yet'}")
    typer.echo("serving")
