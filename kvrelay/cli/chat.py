"""`kvrelay chat`: a conversation. All of it is sent at every turn; the prefix index remembers."""

import asyncio
import readline
import signal

import typer

from kvrelay.cli.generate import Answer, stream, tell_if_empty
from kvrelay.cli.target import ANSWER_WITHIN_S, ConnectionLost, Target
from kvrelay.client import Client, GenerateOptions, Message
from kvrelay.errors import InvalidRequest, PeerUnavailable, ServingError

_HELP = "/reset forgets the conversation, /quit leaves, Ctrl-C stops an answer."


def chat(target: Target, options: GenerateOptions, *, system: str | None) -> None:
    """Talk with the model until the end of input."""
    readline.set_history_length(1000)
    target.run(_chat(target, system, options))


async def _chat(target: Target, system: str | None, options: GenerateOptions) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # at the prompt, Ctrl-C leaves
    opening = [Message("system", system)] if system else []
    turns = list(opening)
    async with target.connect() as client:
        await client.pool(timeout_s=ANSWER_WITHIN_S)  # a dead target is told at once
        typer.echo(_HELP, err=True)
        while (said := _read()) is not None:
            if said == "/reset":
                turns = list(opening)
            elif said == "/quit":
                return
            elif said.startswith("/"):
                typer.echo(_HELP, err=True)
            elif said:
                turns = await _turn(client, [*turns, Message("user", said)], options)


def _read() -> str | None:
    """The next line; None at the end of input. Blocks the loop, which has nothing else to do."""
    try:
        return input("> ").encode(errors="surrogateescape").decode(errors="replace").strip()
    except EOFError:
        typer.echo(err=True)
        return None
    except KeyboardInterrupt:
        typer.echo(err=True)  # the shell's prompt begins a line of its own
        raise


async def _turn(client: Client, turns: list[Message], options: GenerateOptions) -> list[Message]:
    """Answer the last of `turns`; returns the conversation to go on from."""
    answering = asyncio.create_task(stream(client, turns, options))
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, answering.cancel)
    try:
        await asyncio.wait({answering})
        answer: Answer = answering.result()
    except asyncio.CancelledError:
        return turns[:-1]
    except PeerUnavailable:
        raise
    except ConnectionLost as error:
        typer.echo(f"error: {error}", err=True)
        return turns[:-1]
    except ServingError as error:
        hint = "; try /reset" if isinstance(error, InvalidRequest) else ""
        typer.echo(f"error: {error}{hint}", err=True)
        return turns[:-1]
    finally:
        loop.remove_signal_handler(signal.SIGINT)
    tell_if_empty(answer)
    return [*turns, Message("assistant", answer.text)]
