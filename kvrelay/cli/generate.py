"""`kvrelay generate`: one prompt in, text out as it comes."""

import dataclasses
import json
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc
import typer
from rich.console import Console
from rich.text import Text

from kvrelay.cli import render
from kvrelay.cli.target import DEFAULT, ConnectionLost, Target, fail
from kvrelay.client import Client, GenerateOptions, Message, Prompt
from kvrelay.errors import PeerUnavailable, ServingError
from kvrelay.events import Delta, Event, Finished, Started
from kvrelay.types import FinishReason


@dataclass(slots=True)
class Answer:
    """What has arrived so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None

    def add(self, event: Event) -> str:
        """Take an event; returns the text it brought."""
        match event:
            case Started():
                self.started = event
            case Delta(token_ids=token_ids, text=text):
                self.token_ids += token_ids
                self.text += text
                return text
            case Finished():
                self.finished = event
        return ""

    def to_json(self) -> dict[str, object]:
        """Everything, for machines."""
        assert self.started is not None, "a stream without a start"
        assert self.finished is not None, "a stream without an end"
        return {
            "request_id": self.started.request_id,
            "seed": self.started.seed,
            "text": self.text,
            "token_ids": self.token_ids,
            "finish_reason": self.finished.reason.value,
            "usage": dataclasses.asdict(self.finished.usage),
            "ledger": ledger_json(self.finished),
        }


def ledger_json(finished: Finished) -> dict[str, object]:
    """The ledger as plain JSON values."""
    return dataclasses.asdict(finished.ledger)


def generate(
    target: Target,
    prompt: str,
    options: GenerateOptions,
    *,
    is_raw: bool,
    as_json: bool,
    with_ledger: bool,
    timeout_s: float | None,
) -> None:
    """Generate from a prompt and stream the text."""
    text = read_prompt(prompt)
    wanted = text if is_raw else [Message("user", text)]
    main = _generate(
        target, wanted, options, timeout_s=timeout_s, as_json=as_json, with_ledger=with_ledger
    )
    target.run(main)


async def _generate(
    target: Target,
    prompt: Prompt,
    options: GenerateOptions,
    *,
    timeout_s: float | None,
    as_json: bool,
    with_ledger: bool,
) -> None:
    async with target.connect() as client:
        answer = await stream(client, prompt, options, timeout_s=timeout_s, is_silent=as_json)
    if as_json:
        typer.echo(json.dumps(answer.to_json(), ensure_ascii=False))
        return
    tell_if_empty(answer)
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        console.print(Text(how_to_explain(answer, target.address), style="dim"), soft_wrap=True)
    if with_ledger and answer.finished is not None:
        Console().print(render.ledger(answer.finished.ledger))


async def stream(
    client: Client,
    prompt: Prompt,
    options: GenerateOptions,
    *,
    timeout_s: float | None = None,
    is_silent: bool = False,
) -> Answer:
    """Generate, writing text to stdout as it comes, and return the whole."""
    answer = Answer()
    generated = client.generate(prompt, options, timeout_s=timeout_s)
    try:
        await _stream(answer, generated, is_silent=is_silent)
    except PeerUnavailable as error:
        if answer.started is None or was_answered(error):
            raise
        raise ConnectionLost from error
    return answer


async def _stream(
    answer: Answer, generated: AsyncGenerator[Event, None], *, is_silent: bool
) -> None:
    async with aclosing(generated) as events:
        try:
            async for event in events:
                if (text := answer.add(event)) and not is_silent:
                    sys.stdout.write(text)
                    sys.stdout.flush()
        finally:
            if answer.text and not is_silent:
                sys.stdout.write("\n")
                sys.stdout.flush()


def was_answered(error: ServingError) -> bool:
    """Whether the coordinator itself told `error`, rather than a connection that broke."""
    cause = error.__cause__
    trailers = cause.trailing_metadata() if isinstance(cause, grpc.aio.AioRpcError) else None
    return any(key == "grpc-status-details-bin" for key, _ in trailers or ())


def tell_if_empty(answer: Answer) -> None:
    """Explain why there is nothing on the screen."""
    if answer.text or answer.finished is None:
        return
    number = answer.finished.usage.completion_tokens
    at_once = answer.finished.reason is FinishReason.STOP and number <= 1
    what = "the model ended its answer at once" if at_once else "the answer is empty"
    typer.echo(f"({what}: {_tokens(number)}, no text)", err=True)


def how_to_explain(answer: Answer, address: str) -> str:
    """The name of the request and what can be asked with it."""
    assert answer.started is not None, "a stream without a start"
    assert answer.finished is not None, "a stream without an end"
    name, tokens = answer.started.request_id, _tokens(answer.finished.usage.completion_tokens)
    at = "" if address == DEFAULT else f" --target {address}"
    return f"{tokens} · kvrelay explain {name}{at}"


def _tokens(number: int) -> str:
    return f"{number} token" if number == 1 else f"{number} tokens"


def read_prompt(prompt: str) -> str:
    """The prompt itself, from stdin if it is `-`; ends the command if it is not UTF-8."""
    as_given = prompt.encode(errors="surrogateescape")  # the bytes the shell gave us
    data = sys.stdin.buffer.read() if prompt == "-" else as_given
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return fail(f"PROMPT is not UTF-8: byte {error.start} of {len(data)} is wrong")
