"""A running request moves from one decode worker to another, and its caller does not notice.

Whatever happens to either worker on the way: real sessions, tokens from a formula, and a formula
that gives other tokens for anything but the right ones before.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from coordinator.moves import MoveRules
from coordinator.request import GenerateSpec, TokenPrompt
from kvrelay.errors import DeadlinePassed, KvPoolExhausted
from kvrelay.events import Delta, Event
from kvrelay.obs.ledger import Ledger
from kvrelay.types import FinishReason, Role, WorkerLoad
from tests.support.scripted_coordinator import scripted_coordinator
from tests.support.scripted_workers import ScriptedWorker, oracle

PROMPT = (5, 6, 7, 8, 9)
MAX_TOKENS = 24
ANSWER = oracle(PROMPT, MAX_TOKENS)


async def until(condition: Callable[[], Any]) -> None:
    """Let the loop run until `condition()`."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.001)


class Caller:
    """Reads a request's stream, and holds it to gapless positions."""

    def __init__(self, relay: Any, **changes: Any) -> None:
        time_left_s = changes.pop("time_left_s", None)
        fields = {"prompt": TokenPrompt(PROMPT), "max_tokens": MAX_TOKENS, "temperature": 0.0}
        spec = GenerateSpec(**(fields | changes))
        self.tokens: list[int] = []
        self.last: Any = None
        self._events = relay.generate(spec, time_left_s=time_left_s)

    def take(self, event: Event) -> None:
        self.last = event
        if isinstance(event, Delta):
            assert event.position == len(self.tokens)
            self.tokens += event.token_ids

    async def read(self, num_tokens: int) -> None:
        """Until that many tokens are here."""
        async with asyncio.timeout(10):
            while len(self.tokens) < num_tokens:
                self.take(await anext(self._events))

    async def rest(self) -> Ledger:
        """To the end of the stream."""
        async with asyncio.timeout(10):
            async for event in self._events:
                self.take(event)
        ledger: Ledger = self.last.ledger
        return ledger

    async def close(self) -> None:
        await self._events.aclose()


@dataclass
class Scene:
    """A request that runs on `source`, with four tokens at its caller, and another worker."""

    deployed: Any
    prefill: ScriptedWorker
    source: ScriptedWorker
    target: ScriptedWorker
    caller: Caller
    join: Callable[[str], Awaitable[ScriptedWorker]]

    def drain(self) -> None:
        self.source.load = replace(self.source.load, is_draining=True)
        self.source.membership.announce()

    def moves(self, reason: str = "drain") -> dict[str, float]:
        """How moves came out, by outcome."""
        value = self.deployed.metrics.get_sample_value
        found = {
            outcome: value("kvrelay_moves_total", {"reason": reason, "outcome": outcome})
            for outcome in ("moved", "failed", "overtaken")
        }
        return {outcome: count for outcome, count in found.items() if count}


@contextlib.asynccontextmanager
async def scene(
    *,
    is_pulling_shut: bool = False,
    is_parting_shut: bool = False,
    is_target_held: bool = False,
    rules: MoveRules | None = None,
    num_read: int = 4,
    **asked: Any,
) -> AsyncIterator[Scene]:
    peers: dict[str, ScriptedWorker] = {}
    async with contextlib.AsyncExitStack() as stack:

        async def started(worker: ScriptedWorker) -> ScriptedWorker:
            return await stack.enter_async_context(worker)

        prefill = await started(ScriptedWorker("p0", Role.PREFILL))
        source = await started(
            ScriptedWorker(
                "d0", Role.DECODE, is_held=True, peers=peers, is_parting_shut=is_parting_shut
            )
        )
        target = await started(
            ScriptedWorker(
                "d1",
                Role.DECODE,
                is_held=is_target_held,
                peers=peers,
                is_pulling_shut=is_pulling_shut,
            )
        )
        deployed = await stack.enter_async_context(
            scripted_coordinator(move_rules=rules or MoveRules(max_failed=1))
        )

        async def join(name: str) -> ScriptedWorker:
            worker = await started(ScriptedWorker(name, Role.DECODE, peers=peers))
            await deployed.join(worker)
            return worker

        moving = asyncio.create_task(deployed.mover.run())
        stack.callback(moving.cancel)
        await deployed.join(prefill, source)
        caller = Caller(deployed.relay, **asked)
        stack.push_async_callback(caller.close)
        source.allow(num_read)
        await caller.read(num_read)
        await deployed.join(target)
        yield Scene(deployed, prefill, source, target, caller, join)


async def test_a_draining_worker_hands_its_request_over() -> None:
    """
    The stream goes on at the next token, elsewhere; no prompt is computed again, no attempt is
    lost, and the worker that is left was never told to cancel.
    """
    async with scene() as it:
        it.drain()
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert [s.attempt for s in it.target.submits] == [2]
        assert list(it.target.submits[0].emitted_token_ids) == ANSWER[:4]
        assert (ledger.decode_worker, ledger.attempts, ledger.lost_attempts) == ("d1", 1, ())
        assert len(ledger.move_gaps_s) == 1
        assert len(it.prefill.submits) == 1
        assert it.source.released == [h.handoff_id for h in it.source.hand_overs]
        assert it.source.hand_overs[0].puller_id == "d1"
        assert (it.source.cancels, it.source.cancelled_hand_overs) == ([], [])
        assert it.moves() == {"moved": 1}


async def test_the_worker_that_is_left_goes_on_until_it_is_frozen() -> None:
    """
    Tokens of both attempts reach the caller, each position once.
    """
    async with scene(is_pulling_shut=True) as it:
        it.drain()
        await until(lambda: it.target.submits)
        it.source.allow(6)
        await it.caller.read(10)
        assert it.caller.tokens == ANSWER[:10]
        it.target.pulling.open()
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert list(it.target.submits[0].emitted_token_ids) == ANSWER[:4]
        assert ledger.lost_attempts == ()


async def test_the_last_words_of_the_worker_that_is_left_may_come_late() -> None:
    """
    The other has repeated them by then; nobody waits for them, and they change nothing.
    """
    async with scene(is_parting_shut=True) as it:
        it.drain()
        ledger = await it.caller.rest()
        it.source.parting.open()

        assert it.caller.tokens == ANSWER
        assert (ledger.lost_attempts, it.moves()) == ((), {"moved": 1})


async def test_the_worker_that_takes_over_may_be_slow() -> None:
    """
    With the last tokens of the other handed on, its caller waits for its first.
    """
    async with scene(is_target_held=True) as it:
        it.drain()
        await it.caller.read(5)
        assert it.caller.tokens == ANSWER[:5]
        it.target.allow(100)
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert (ledger.lost_attempts, it.moves()) == ((), {"moved": 1})


async def test_a_worker_without_room_leaves_the_request_where_it_is() -> None:
    """
    The refusal costs nothing; the hand-over is called off.
    """
    async with scene() as it:
        it.target.fail_with = [KvPoolExhausted(wanted_blocks=9, free_blocks=2)]
        it.drain()
        await until(lambda: it.source.cancelled_hand_overs)
        it.source.allow(100)
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert (ledger.decode_worker, ledger.lost_attempts, ledger.move_gaps_s) == ("d0", (), ())
        assert it.source.cancelled_hand_overs == [h.handoff_id for h in it.source.hand_overs]
        assert it.moves() == {"failed": 1}


async def test_a_move_that_failed_is_tried_again() -> None:
    """
    Under another handoff and another attempt, once the target was heard again.
    """
    async with scene(rules=MoveRules(max_failed=2)) as it:
        it.target.fail_with = [KvPoolExhausted(wanted_blocks=9, free_blocks=2)]
        it.drain()
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert [s.attempt for s in it.target.submits] == [2, 3]
        assert len({h.handoff_id for h in it.source.hand_overs}) == 2
        assert {h.attempt for h in it.source.hand_overs} == {1}
        assert (ledger.decode_worker, ledger.lost_attempts) == ("d1", ())
        assert it.moves() == {"failed": 1, "moved": 1}


async def test_a_target_that_dies_before_it_has_taken_over_was_nothing() -> None:
    """
    The request never left.
    """
    async with scene(is_pulling_shut=True) as it:
        it.drain()
        await until(lambda: it.target.submits)
        await it.target.vanish()
        await until(lambda: it.source.cancelled_hand_overs)
        it.source.allow(100)
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert (ledger.decode_worker, ledger.lost_attempts) == ("d0", ())
        assert it.moves() == {"failed": 1}


@pytest.mark.parametrize("is_parting_shut", [False, True])
async def test_a_target_that_dies_once_it_has_taken_over_is_a_lost_attempt(
    is_parting_shut: bool,
) -> None:
    """
    Before it said a word: the prompt is prefilled again, whichever of the two is heard of first,
    its death or that the request had moved.
    """
    async with scene(is_target_held=True, is_parting_shut=is_parting_shut) as it:
        it.drain()
        reading = asyncio.create_task(it.caller.rest())
        await until(lambda: it.source.released)
        if not is_parting_shut:
            await until(lambda: len(it.caller.tokens) == 5)
        await it.target.vanish()
        await it.deployed.until_left("d1")
        await it.join("d2")
        it.source.parting.open()
        ledger = await reading

        assert it.caller.tokens == ANSWER
        assert ledger.decode_worker == "d2"
        expected = "HANDOFF_LOST" if is_parting_shut else "PEER_UNAVAILABLE"
        assert (ledger.lost_attempts, ledger.attempts) == ((expected,), 2)
        assert [s.attempt for s in it.prefill.submits] == [1, 3]


async def test_a_worker_that_dies_while_it_is_left_is_a_lost_attempt() -> None:
    """
    If it had not handed over: the other worker says so, and the prompt is prefilled again, with
    all tokens that the caller has.
    """
    async with scene(is_pulling_shut=True) as it:
        it.drain()
        await until(lambda: it.target.submits)
        await it.source.vanish()
        it.target.pulling.open()
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert ledger.lost_attempts == ("HANDOFF_LOST",)
        assert [s.attempt for s in it.target.submits] == [2, 3]
        assert list(it.target.submits[1].emitted_token_ids) == ANSWER[:4]
        assert it.moves() == {"failed": 1}


async def test_a_worker_that_dies_once_it_has_handed_over_is_not_missed() -> None:
    """
    Before it could say so, and before the other said a word: nothing is lost, since the other
    repeats whatever the caller may not have.
    """
    async with scene(is_target_held=True, is_parting_shut=True) as it:
        it.drain()
        reading = asyncio.create_task(it.caller.rest())
        await until(lambda: it.source.released)
        await it.source.vanish()
        await it.deployed.until_left("d0")
        it.target.allow(100)
        ledger = await reading

        assert it.caller.tokens == ANSWER
        assert (ledger.decode_worker, ledger.lost_attempts) == ("d1", ())
        assert len(it.prefill.submits) == 1


async def test_a_request_that_ends_where_it_was_just_ends() -> None:
    """
    Its last token was there first; the other worker is told to forget it.
    """
    async with scene(is_pulling_shut=True) as it:
        it.drain()
        await until(lambda: it.target.submits)
        it.source.allow(100)
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert (ledger.decode_worker, ledger.lost_attempts) == ("d0", ())
        await until(lambda: it.target.cancels)
        assert it.moves() == {"overtaken": 1}


@pytest.mark.parametrize("has_moved", [False, True])
async def test_a_caller_that_leaves_cancels_wherever_it_is(has_moved: bool) -> None:
    """
    In the midst of a move both workers; after it the one that took over.
    """
    async with scene(is_pulling_shut=not has_moved, is_target_held=True) as it:
        it.drain()
        await until(lambda: it.source.released if has_moved else it.target.submits)
        if has_moved:
            it.target.allow(1)
            await it.caller.read(6)
        await it.caller.close()
        await until(lambda: it.target.cancels and (has_moved or it.source.cancels))

        assert it.deployed.relay.num_active == 0
        assert bool(it.source.cancels) is not has_moved
        assert it.moves() == ({"moved": 1} if has_moved else {"overtaken": 1})


async def test_a_deadline_passes_in_the_midst_of_a_move() -> None:
    """
    Nothing goes on afterwards, on either side.
    """
    async with scene(is_pulling_shut=True, time_left_s=0.6) as it:
        it.drain()
        with pytest.raises(DeadlinePassed):
            await it.caller.rest()
        await until(lambda: it.source.cancels and it.target.cancels)
        assert it.deployed.relay.num_active == 0


async def test_a_stop_string_ends_both_sides() -> None:
    """
    Found in a token of the worker that is being left.
    """
    at = next(i for i in range(6, MAX_TOKENS) if ANSWER.index(ANSWER[i]) == i)
    async with scene(is_pulling_shut=True, stop=(chr(0x100 + ANSWER[at]),)) as it:
        it.drain()
        await until(lambda: it.target.submits)
        it.source.allow(at - 3)
        await it.caller.rest()

        assert it.caller.tokens == ANSWER[: at + 1]
        assert it.caller.last.reason is FinishReason.STOP
        await until(lambda: it.source.cancels and it.target.cancels)


async def test_a_caller_who_does_not_read_holds_no_move_up() -> None:
    """
    By the time it looks again the request has moved, and the worker that was left is gone.
    """
    async with scene() as it:
        it.drain()
        await until(lambda: it.moves() == {"moved": 1} and it.source.released)
        await it.source.vanish()
        await it.deployed.until_left("d0")
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert (ledger.decode_worker, ledger.lost_attempts) == ("d1", ())


async def test_all_requests_of_a_draining_worker_move() -> None:
    """
    A few at a time, each with its own tokens, while their callers read on.
    """
    async with scene(rules=MoveRules(max_under_way=2)) as it:
        others = [Caller(it.deployed.relay, prompt=TokenPrompt((i, i + 1))) for i in range(6)]
        ended = [asyncio.create_task(caller.rest()) for caller in [it.caller, *others]]
        while not all(len(caller.tokens) > 1 for caller in others):
            it.source.allow(1)
            await asyncio.sleep(0.001)
        it.drain()
        ledgers = await asyncio.gather(*ended)

        assert it.caller.tokens == ANSWER
        assert [c.tokens for c in others] == [oracle((i, i + 1), MAX_TOKENS) for i in range(6)]
        assert not any(ledger.lost_attempts for ledger in ledgers)
        assert len(it.prefill.submits) == 7


async def test_the_coordinator_may_drain_meanwhile() -> None:
    """
    What is under way ends well, and then nothing is under way.
    """
    async with scene(is_pulling_shut=True) as it:
        it.drain()
        await until(lambda: it.target.submits)
        draining = asyncio.create_task(it.deployed.relay.drain())
        it.target.pulling.open()
        await it.caller.rest()
        await asyncio.wait_for(draining, 5)

        assert it.caller.tokens == ANSWER


async def test_a_crowded_worker_is_relieved() -> None:
    """
    Somebody waits there while another worker is empty.
    """
    rules = MoveRules(min_left=4, lately_s=60.0)
    async with scene(rules=rules) as it:
        it.source.load = WorkerLoad(held_blocks=63, free_blocks=1, waiting_sequences=1)
        it.source.membership.announce()
        ledger = await it.caller.rest()

        assert it.caller.tokens == ANSWER
        assert (ledger.decode_worker, ledger.lost_attempts) == ("d1", ())
        assert it.moves("relief") == {"moved": 1}


@pytest.mark.parametrize("seed", range(20))
async def test_a_request_may_be_moved_again_and_again(seed: int) -> None:
    """
    Between three workers, each of which has it drained away at some moment or fails to take it:
    every token once, and none of another position.
    """
    rng = random.Random(seed)
    peers: dict[str, ScriptedWorker] = {}
    async with contextlib.AsyncExitStack() as stack:
        prefill = await stack.enter_async_context(ScriptedWorker("p0", Role.PREFILL))
        workers = [
            ScriptedWorker(f"d{i}", Role.DECODE, is_held=True, peers=peers) for i in range(3)
        ]
        for worker in workers:
            await stack.enter_async_context(worker)
        rules = MoveRules(max_failed=100)
        deployed = await stack.enter_async_context(scripted_coordinator(move_rules=rules))
        moving = asyncio.create_task(deployed.mover.run())
        stack.callback(moving.cancel)
        await deployed.join(prefill, *workers)
        caller = Caller(deployed.relay, max_tokens=60)
        reading = asyncio.create_task(caller.rest())
        while not reading.done():
            worker = rng.choice(workers)
            match rng.randrange(4):
                case 0:
                    worker.fail_with = [KvPoolExhausted(wanted_blocks=9, free_blocks=2)]
                case 1:
                    worker.load = replace(worker.load, is_draining=not worker.load.is_draining)
                    worker.membership.announce()
                case _:
                    worker.allow(rng.randrange(4))
            for _ in range(rng.randrange(40)):
                await asyncio.sleep(0)
        ledger = await reading

        assert caller.tokens == oracle(PROMPT, 60), f"seed={seed}"
        assert set(ledger.lost_attempts) <= {"KV_POOL_EXHAUSTED"}, f"seed={seed}"
