"""Who waits goes on in order, a few in each turn of the event loop."""

import asyncio

from coordinator.turns import Turns


def waiters(num: int) -> list[asyncio.Future[None]]:
    return [asyncio.get_running_loop().create_future() for _ in range(num)]


async def next_turn() -> None:
    await asyncio.sleep(0)


def done(all_waiters: list[asyncio.Future[None]]) -> list[int]:
    return [i for i, waiter in enumerate(all_waiters) if waiter.done()]


async def test_a_few_go_on_in_each_turn_of_the_loop() -> None:
    """In the order they asked; whatever else the loop has to do comes in between."""
    turns, all_waiters = Turns(callers_per_turn=2), waiters(5)
    for waiter in all_waiters:
        turns.queue(waiter)

    assert done(all_waiters) == []
    for expected in ([0, 1], [0, 1, 2, 3], [0, 1, 2, 3, 4]):
        await next_turn()
        assert done(all_waiters) == expected


async def test_who_gave_up_takes_nobody_s_turn() -> None:
    """A cancelled waiter is passed over."""
    turns, all_waiters = Turns(callers_per_turn=2), waiters(4)
    for waiter in all_waiters:
        turns.queue(waiter)
    all_waiters[0].cancel()
    await next_turn()

    assert done(all_waiters) == [0, 1, 2]
    await next_turn()
    assert done(all_waiters) == [0, 1, 2, 3]


async def test_after_a_pause_the_next_who_waits_goes_on_at_once() -> None:
    """Nobody waits for a turn that nobody else needs."""
    turns = Turns(callers_per_turn=1)
    for _ in range(3):
        (waiter,) = waiters(1)
        turns.queue(waiter)
        await next_turn()
        assert waiter.done()
