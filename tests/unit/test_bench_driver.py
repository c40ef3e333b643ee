"""The load generator in a time of its own: nothing waits, every number is exact."""

import asyncio
import heapq
import itertools

import pytest

from kvrelay.bench.base import Arrived, Ask, Ended, Failed
from kvrelay.bench.driver import Driver
from kvrelay.bench.workload import Item, Shape

SETTLE_TURNS = 50
"""Turns of the event loop after which whatever can go on has gone on."""


class ScriptedTime:
    """A timeline that jumps to the next thing due once nothing else can happen."""

    def __init__(self):
        self.now_s = 100.0  # no instant of a run may be taken for one since its start
        self._due = []
        self._count = itertools.count()

    def now(self):
        return self.now_s

    async def sleep_until(self, at_s):
        due = asyncio.get_running_loop().create_future()
        heapq.heappush(self._due, (max(at_s, self.now_s), next(self._count), due))
        await due

    async def play(self, work):
        """What `work` returns."""
        task = asyncio.create_task(work)
        while not await self._settles(task):
            at_s, _, due = heapq.heappop(self._due)
            self.now_s = max(self.now_s, at_s)
            if not due.done():
                due.set_result(None)
        return task.result()

    async def _settles(self, task):
        for _ in range(SETTLE_TURNS):
            await asyncio.sleep(0)
        return task.done()


class ScriptedSource:
    """Answers each request by a script: seconds to wait, or what to say, or what to raise."""

    def __init__(self, time, script):
        self.num_running = self.most_running = 0
        self.asked = []
        self._time = time
        self._script = script

    async def ask(self, ask):
        self.asked.append(ask)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            for step in self._script(len(self.asked) - 1):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, float):
                    await self._time.sleep_until(self._time.now() + step)
                else:
                    yield step
        finally:
            self.num_running -= 1


ONE, END = Arrived(1), Ended(output_tokens=None)


class Set:
    """A driver, its source and its time."""

    def __init__(self, script, *, make_late_s=0.0, timeout_s=300.0):
        self.time = ScriptedTime()
        self.source = ScriptedSource(self.time, script)
        self.seen = []
        self._make_late_s = make_late_s
        self.driver = Driver(
            self.source,
            self.time,
            make_ask=self._make_ask,
            on_record=self.seen.append,
            timeout_s=timeout_s,
        )

    def _make_ask(self, index, item):
        self.time.now_s += self._make_late_s
        token_ids = [0] * item.shape.prompt_tokens
        return Ask(
            token_ids=token_ids, max_tokens=item.shape.output_tokens, temperature=0.0, seed=index
        )

    async def open(self, *due_s):
        items = [Item(Shape(3, 5), at_s) for at_s in due_s]
        return await self.time.play(self.driver.open_loop(items))

    async def closed(self, num_items, **how):
        items = (Item(Shape(3, 5)) for _ in range(num_items))
        return await self.time.play(self.driver.closed_loop(items, **how))


async def test_every_token_is_timed():
    """Known gaps give known numbers, those of tokens that come together too."""
    script = [1.0, Arrived(1), 3.0, Arrived(2), 0.5, Arrived(1), 7.0, Arrived(1), 0.25]
    (r,) = await Set(lambda _: [*script, Ended(output_tokens=5)]).open(0.0)

    assert r.token_at_s == (1.0, 4.0, 4.0, 4.5, 11.5)
    assert (r.ttft_s, r.gap1_s, r.max_stall_s) == (1.0, 3.0, 7.0)
    assert (r.tpot_s, r.e2e_s, r.error) == (10.5 / 4, 11.75, "")
    assert (r.prompt_tokens, r.max_tokens, r.output_tokens) == (3, 5, 5)


async def test_an_open_loop_does_not_wait_for_answers():
    """Requests go out when they are due, however many are still under way."""
    a = Set(lambda _: [10.0, ONE, END])
    records = await a.open(0.0, 1.0, 2.5)

    assert [r.sent_s for r in records] == [0.0, 1.0, 2.5]
    assert [r.e2e_s for r in records] == [10.0] * 3
    assert a.source.most_running == 3


async def test_a_late_generator_adds_its_delay_to_what_it_measures():
    """And the lag says how much of it is its own."""
    a = Set(lambda _: [1.0, ONE, END], make_late_s=0.5)
    records = await a.open(0.0, 0.0, 0.0)

    assert [r.lag_s for r in records] == [0.5, 1.0, 1.5]
    assert [r.ttft_s for r in records] == [1.5, 2.0, 2.5]


async def test_a_closed_loop_asks_again_when_an_answer_has_ended():
    """Never more are under way than there are clients."""
    a = Set(lambda _: [2.0, ONE, END])
    records = await a.closed(5, num_clients=2)

    assert a.source.most_running == 2
    assert [r.sent_s for r in records] == [0.0, 0.0, 2.0, 2.0, 4.0]
    assert [r.index for r in records] == list(range(5))
    assert {r.ttft_s for r in records} == {2.0}
    assert len(a.seen) == 5


async def test_a_closed_loop_starts_nothing_after_its_time():
    """What is under way then still ends, and counts."""
    records = await Set(lambda _: [2.0, ONE, END]).closed(99, num_clients=1, duration_s=5.0)

    assert [r.ended_s for r in records] == [2.0, 4.0, 6.0]


async def test_failures_are_kept_with_what_came_before_them():
    """The others go on."""
    scripts = [[1.0, ONE, Failed("DATA_LOSS")], [1.0, ONE, END], [Failed("QUEUE_FULL")]]
    a = Set(lambda number: scripts[number])
    records = await a.open(0.0, 0.0, 0.0)

    assert [r.error for r in records] == ["DATA_LOSS", "", "QUEUE_FULL"]
    assert [r.output_tokens for r in records] == [1, 1, 0]
    assert a.source.num_running == 0


async def test_a_stream_that_never_said_it_was_whole_has_failed():
    """Even if it ended in peace."""
    (r,) = await Set(lambda _: [ONE]).open(0.0)

    assert r.error == "STREAM_CUT"


async def test_a_request_that_takes_too_long_is_given_up():
    """It is cancelled at its source, and counted."""
    a = Set(lambda _: [ONE, 5.0, END], timeout_s=0.01)
    driving = asyncio.create_task(a.driver.open_loop([Item(Shape(1, 1))]))
    await asyncio.sleep(0)
    a.time._due[0][2].set_result(None)  # the request is due; nothing else ever is
    (r,) = await driving

    assert (r.error, r.output_tokens) == ("DEADLINE_PASSED", 1)
    assert a.source.num_running == 0


async def test_a_bug_in_a_source_is_not_a_failed_request():
    """It ends the benchmark."""
    with pytest.raises(ExceptionGroup) as raised:
        await Set(lambda _: [ZeroDivisionError()]).open(0.0)

    assert raised.value.subgroup(ZeroDivisionError)
