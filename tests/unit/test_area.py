"""The landing area: parts never overlap, and whoever waits is served in the order of asking."""

import asyncio
from contextlib import AsyncExitStack

import hypothesis.strategies as st
import pytest
from hypothesis import given

from decode_svc.area import LandingArea

OFFSET, NUM_BYTES = 4096, 100


def area() -> LandingArea:
    return LandingArea(offset=OFFSET, num_bytes=NUM_BYTES)


async def turns(num_turns: int = 5) -> None:
    """Let everybody go on who can."""
    for _ in range(num_turns):
        await asyncio.sleep(0)


async def test_parts_lie_side_by_side_within_the_area():
    """Three that just fit; then there is no byte left."""
    shared = area()
    async with shared.part(40) as a, shared.part(50) as b, shared.part(10) as c:
        assert sorted([a, b, c]) == [OFFSET, OFFSET + 40, OFFSET + 90]
        waiting = asyncio.create_task(shared.part(1).__aenter__())
        await turns()
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    async with shared.part(NUM_BYTES) as all_of_it:
        assert all_of_it == OFFSET


async def test_a_part_goes_where_another_left_a_gap():
    """The lowest that is large enough."""
    shared = area()
    async with AsyncExitStack() as kept, AsyncExitStack() as left:
        for size in (20, 30, 50):
            stack = left if size == 30 else kept
            await stack.enter_async_context(shared.part(size))
        await left.aclose()
        async with shared.part(25) as in_gap, shared.part(5) as beside:
            assert (in_gap, beside) == (OFFSET + 20, OFFSET + 45)


async def test_who_asked_first_is_served_first():
    """Also if somebody behind would fit in at once: a large part is not put off for ever."""
    shared = area()
    served: list[str] = []

    async def use(name: str, num_bytes: int, until: asyncio.Event) -> None:
        async with shared.part(num_bytes):
            served.append(name)
            await until.wait()

    ends = {name: asyncio.Event() for name in ("first", "large", "small")}
    users = []
    for name, num_bytes in (("first", 60), ("large", 80), ("small", 10)):
        users.append(asyncio.create_task(use(name, num_bytes, ends[name])))
        await turns()
    assert served == ["first"]
    ends["first"].set()
    await turns(20)
    assert served == ["first", "large", "small"]
    for end in ends.values():
        end.set()
    await asyncio.gather(*users)


async def test_who_stops_waiting_does_not_stop_the_others():
    """The next in line is looked at instead."""
    shared = area()
    async with shared.part(60):
        large = asyncio.create_task(shared.part(80).__aenter__())
        await turns()
        small = shared.part(10)
        entering = asyncio.create_task(small.__aenter__())
        await turns()
        assert not entering.done()
        large.cancel()
        assert await asyncio.wait_for(entering, 5) == OFFSET + 60
        await small.__aexit__(None, None, None)


async def test_a_part_comes_back_whatever_its_user_meets():
    """An error gives it back as the end does."""
    shared = area()
    with pytest.raises(ZeroDivisionError):
        async with shared.part(NUM_BYTES):
            raise ZeroDivisionError
    async with shared.part(NUM_BYTES):
        pass


async def test_a_part_larger_than_the_area_is_a_bug():
    """It would wait for ever."""
    with pytest.raises(AssertionError):
        async with area().part(NUM_BYTES + 1):
            pass


@given(st.lists(st.tuples(st.integers(1, NUM_BYTES), st.integers(0, 4)), max_size=25))
def test_parts_never_overlap_and_everybody_is_served(wants):
    """Users of random sizes who stay for random times: each gets its own bytes, in order."""
    served = asyncio.run(crowd(wants))
    assert served == list(range(len(wants)))


async def crowd(wants: list[tuple[int, int]]) -> list[int]:
    shared = area()
    in_use: dict[int, tuple[int, int]] = {}
    served: list[int] = []

    async def use(i: int, num_bytes: int, num_turns: int) -> None:
        async with shared.part(num_bytes) as offset:
            assert OFFSET <= offset <= OFFSET + NUM_BYTES - num_bytes
            for start, end in in_use.values():
                assert offset + num_bytes <= start or end <= offset, "an overlap"
            in_use[i] = (offset, offset + num_bytes)
            served.append(i)
            await turns(num_turns)
            del in_use[i]

    await asyncio.gather(*(use(i, *want) for i, want in enumerate(wants)))
    return served
