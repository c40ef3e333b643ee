"""What an attempt has heard is handed over once, in order, and together where it had to wait."""

import asyncio
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.convert import FirstToken, Lost, News, Output
from coordinator.inbox import Inbox, Order
from coordinator.turns import Turns
from kvrelay.errors import PeerUnavailable
from kvrelay.types import FinishReason

LOST = Lost(attempt=1, error=PeerUnavailable("gone"), worker_id="d0")


def output(position: int, *token_ids: int, finish: FinishReason | None = None) -> Output:
    return Output(attempt=1, position=position, token_ids=token_ids, finish=finish, cost=None)


def first(token_id: int) -> FirstToken:
    return FirstToken(
        attempt=1,
        token_id=token_id,
        finish=None,
        queue_s=0.0,
        prefill_s=0.0,
        cached_prompt_tokens=0,
    )


def inbox_of(*news: News) -> Inbox:
    inbox = Inbox(Turns())
    for it in news:
        inbox.put(it)
    return inbox


async def test_what_came_while_nobody_looked_is_handed_over_together() -> None:
    """In order, and nothing of it again."""
    inbox = inbox_of(output(1, 11), output(2, 12), output(3, 13))

    assert await inbox.get(is_urgent=False) == [output(1, 11), output(2, 12), output(3, 13)]
    inbox.put(output(4, 14))
    assert await inbox.get(is_urgent=False) == [output(4, 14)]


async def test_what_comes_before_our_turn_is_handed_over_with_the_rest() -> None:
    """Who waits for a turn waits for no message of its own."""
    turns = Turns(callers_per_turn=1)
    ahead = asyncio.get_running_loop().create_future()
    inbox = Inbox(turns)
    getting = asyncio.create_task(inbox.get(is_urgent=False))
    await asyncio.sleep(0)
    turns.queue(ahead)
    inbox.put(output(1, 11))
    await ahead
    inbox.put(output(2, 12))

    assert await getting == [output(1, 11), output(2, 12)]


async def test_the_first_token_is_handed_over_alone_and_out_of_turn() -> None:
    """However many callers wait for their turn, and whatever came after it."""
    turns = Turns(callers_per_turn=1)
    inbox = Inbox(turns)
    getting = asyncio.create_task(inbox.get(is_urgent=True))
    await asyncio.sleep(0)
    others = [asyncio.get_running_loop().create_future() for _ in range(8)]
    for other in others:
        turns.queue(other)
    inbox.put(first(10))
    inbox.put(output(1, 11))

    assert await getting == [first(10)]
    assert not all(other.done() for other in others)
    assert await inbox.get(is_urgent=False) == [output(1, 11)]


async def test_what_was_said_before_a_loss_comes_before_it() -> None:
    """So tokens that arrived are not lost with their worker."""
    inbox = inbox_of(output(1, 11), output(2, 12), LOST)

    assert await inbox.get(is_urgent=False) == [output(1, 11), output(2, 12)]
    assert await inbox.get(is_urgent=False) is LOST


async def test_who_gives_up_waiting_loses_nothing() -> None:
    """A deadline that passes meanwhile leaves the news where they are."""
    inbox = Inbox(Turns())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await inbox.get(is_urgent=False)
    inbox.put(output(1, 11))

    assert await inbox.get(is_urgent=False) == [output(1, 11)]


async def test_a_slow_caller_costs_a_bounded_number_of_bytes_for_each_token() -> None:
    """A whole context that nobody reads is a megabyte or two, not more."""
    num_tokens = 8192
    inbox = Inbox(Turns())
    tracemalloc.start()
    try:
        for position in range(num_tokens):
            inbox.put(output(position, 1000 + position))
        num_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert num_bytes < 256 * num_tokens


@st.composite
def utterances(draw: st.DrawFn) -> tuple[list[int], list[Output]]:
    """Tokens, and outputs that bring them: gapless, some of them again."""
    token_ids = draw(st.lists(st.integers(0, 99), min_size=1, max_size=30))
    said, at = [], 0
    while at < len(token_ids):
        start = draw(st.integers(max(0, at - 2), at))
        end = draw(st.integers(at + 1, min(len(token_ids), at + 4)))
        finish = FinishReason.LENGTH if end == len(token_ids) else None
        said.append(output(start, *token_ids[start:end], finish=finish))
        at = end
    return token_ids, said


@given(utterances())
def test_order_gives_each_token_once_and_in_its_place(
    case: tuple[list[int], Sequence[Output]],
) -> None:
    """However often a worker repeats itself, with the finish at the last token only."""
    token_ids, said = case
    order = Order(0)
    due: list[int] = []
    finishes = []
    for news in said:
        new_ids, finish = order.accept(news)
        due += new_ids
        finishes.append(finish)

    assert due == token_ids
    assert finishes == [None] * (len(said) - 1) + [FinishReason.LENGTH]


def test_tokens_that_are_here_before_the_first_wait_for_it() -> None:
    """The decode worker may be faster than the first token's own way; its repetition is nothing."""
    order = Order(0)
    assert order.accept(output(1, 11)) == ([], None)
    assert order.accept(output(2, 12, finish=FinishReason.LENGTH)) == ([], None)
    assert order.accept(first(10)) == ([10, 11, 12], FinishReason.LENGTH)
    assert order.accept(first(10)) == ([], None)


@given(utterances(), st.data())
async def test_however_it_is_fetched_nothing_changes_places(
    case: tuple[list[int], Sequence[Output]], data: st.DataObject
) -> None:
    """Between any two arrivals the caller may look, or not."""
    _, said = case
    inbox = Inbox(Turns())
    heard: list[News] = []
    for news in said:
        inbox.put(news)
        if data.draw(st.booleans()):
            fetched = await inbox.get(is_urgent=data.draw(st.booleans()))
            assert isinstance(fetched, Sequence)
            heard += fetched
    while len(heard) < len(said):
        fetched = await inbox.get(is_urgent=False)
        assert isinstance(fetched, Sequence)
        heard += fetched

    assert heard == said
