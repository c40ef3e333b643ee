"""Reaching a deployment from the terminal, and ending with one line when that fails."""

import asyncio
import os
import socket
import sys
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

from kvrelay.errors import DeadlinePassed, PeerUnavailable, ServingError

if TYPE_CHECKING:  # gRPC would take longer to load than `--help` to print
    from kvrelay.client import Client

DEFAULT = "127.0.0.1:50051"
ANSWER_WITHIN_S = 5.0
"""Limit of a call that computes nothing."""

INTERRUPTED = 130


class ConnectionLost(Exception):
    """The coordinator went away in the middle of an answer."""

    def __init__(self) -> None:
        super().__init__(
            "the connection was lost in the middle of the answer; "
            "the coordinator went away, ask again"
        )


@dataclass(frozen=True, slots=True)
class Tls:
    """The three PEM files as they were given; all or none."""

    cert_file: Path | None = None
    key_file: Path | None = None
    ca_file: Path | None = None

    def __post_init__(self) -> None:
        given = (self.cert_file, self.key_file, self.ca_file)
        if any(given) and not all(given):
            raise typer.BadParameter(
                "--tls-cert-file, --tls-key-file, --tls-ca-file: give all three or none"
            )


@dataclass(frozen=True, slots=True)
class Target:
    """Where a deployment is, and how it wants to be spoken to."""

    address: str
    tls: Tls = Tls()

    def connect(self) -> "Client":
        """A client of it; the caller closes it.

        Raises:
            SettingsError: a TLS file cannot be read.
        """
        from kvrelay.client import Client
        from kvrelay.config import TlsFiles

        cert, key, ca = self.tls.cert_file, self.tls.key_file, self.tls.ca_file
        if cert is None or key is None or ca is None:
            return Client(self.address)
        return Client(self.address, tls=TlsFiles(cert=cert, key=key, ca=ca))

    def run(self, main: Coroutine[None, None, None]) -> None:
        """Run a command against it; failures become a line that says what to do next."""
        from kvrelay.cli.generate import was_answered
        from kvrelay.config import SettingsError

        try:
            asyncio.run(main)
        except PeerUnavailable as error:
            fail(str(error) if was_answered(error) else self._nothing_answers())
        except ConnectionLost as error:
            fail(str(error))
        except DeadlinePassed as error:
            fail(f"{self.address} was too slow: {error}")
        except (ServingError, SettingsError) as error:
            fail(str(error))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader left, as `head` does. Nothing more may be written, not even at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None

    def _nothing_answers(self) -> str:
        host = self.address.rpartition(":")[0].strip("[]")
        if not _resolves(host):
            return f"the name {host} does not resolve; is the target's address right?"
        if self.tls.cert_file is None:
            return f"nothing answers at {self.address}; start one with: kvrelay up"
        # TLS does not tell the two apart: a refused certificate ends the connection, no more.
        return f"nothing answers at {self.address} in TLS, or it refuses our certificate"


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return True


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
