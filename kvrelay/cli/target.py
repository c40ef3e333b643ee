"""Reaching a deployment from the terminal, and ending with one line when that fails."""

import asyncio
import os
import sys
from collections.abc import Coroutine
from typing import NoReturn

import typer

from kvrelay.errors import DeadlinePassed, PeerUnavailable, ServingError

DEFAULT = "127.0.0.1:50051"
ANSWER_WITHIN_S = 5.0
"""Limit of a call that computes nothing."""

INTERRUPTED = 130


def checked(target: str) -> str:
    """`target`, if it is HOST:PORT."""
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise typer.BadParameter(f"{target!r} is not HOST:PORT")
    return target


def fail(message: str, *, status: int = 1) -> NoReturn:
    """End with one line on stderr."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)


def run(target: str, main: Coroutine[None, None, None]) -> None:
    """Run a command against `target`; failures become a line that says what to do next."""
    try:
        asyncio.run(main)
    except PeerUnavailable:
        fail(f"nothing answers at {target}; start one with: kvrelay up")
    except DeadlinePassed as error:
        fail(f"{target} was too slow: {error}")
    except ServingError as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader left, as `head` does. Nothing more may be written, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
