"""What a command says of an answer that came, came empty, or broke off."""

import asyncio
from io import StringIO

import pytest
from rich.console import Console

from kvrelay.cli.generate import Answer, how_to_explain, stream, tell_if_empty
from kvrelay.cli.target import DEFAULT, ConnectionLost
from kvrelay.cli.up import Screen
from kvrelay.errors import PeerUnavailable
from kvrelay.events import Delta, Finished, Started, Usage
from kvrelay.supervise.keeper import Event
from kvrelay.types import FinishReason
from tests.unit.test_cli_render import LEDGER

STARTED = Started(request_id="ab", seed=1, prompt_tokens=2)


class BreakingClient:
    """Sends `events`, then loses the connection."""

    def __init__(self, *events):
        self.events = events

    async def generate(self, prompt, options, *, timeout_s=None):
        for event in self.events:
            yield event
        raise PeerUnavailable("UNAVAILABLE: Socket closed")


def finished(num_tokens: int, reason: FinishReason = FinishReason.STOP) -> Finished:
    usage = Usage(prompt_tokens=2, completion_tokens=num_tokens, cached_prompt_tokens=0)
    return Finished(reason=reason, usage=usage, ledger=LEDGER)


def test_a_connection_lost_after_the_start_is_no_dead_target():
    """
    Before the first event it is one, afterwards the coordinator went away.
    """
    begun = BreakingClient(STARTED, Delta(position=0, token_ids=(1,), text="x"))
    with pytest.raises(ConnectionLost, match="in the middle of the answer"):
        asyncio.run(stream(begun, "p", None))
    with pytest.raises(PeerUnavailable):
        asyncio.run(stream(BreakingClient(), "p", None))


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (finished(1), "(the model ended its answer at once: 1 token, no text)\n"),
        (finished(3, FinishReason.LENGTH), "(the answer is empty: 3 tokens, no text)\n"),
    ],
)
def test_an_answer_without_text_is_told_on_stderr(end, said, capsys):
    """
    Once it ended, with the number of its tokens.
    """
    tell_if_empty(Answer(started=STARTED, finished=end))
    tell_if_empty(Answer(text="x", started=STARTED, finished=end))

    assert capsys.readouterr() == ("", said)


def test_the_way_to_the_ledger_can_be_copied():
    """
    With the target, unless it is the one that is asked anyway.
    """
    answer = Answer(started=STARTED, finished=finished(24))

    assert how_to_explain(answer, DEFAULT) == "24 tokens · kvrelay explain ab"
    assert how_to_explain(answer, "h:1").endswith("kvrelay explain ab --target h:1")


def test_a_process_that_comes_back_is_said_to_be_back():
    """
    Once per absence, and not at its first start.
    """
    said = StringIO()
    screen = Screen(Console(file=said, width=80))
    for kind in ("listening", "died", "died", "listening", "listening"):
        screen.show(Event("decode-0", kind, "died"))

    assert said.getvalue().count("decode-0 is back after 0.0 s") == 1
    assert said.getvalue().count("is back") == 1
