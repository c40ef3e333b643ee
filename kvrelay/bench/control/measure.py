"""Tokens per second through one coordinator: one process on one core, everybody else on another.

1. a real coordinator starts on its core; it tokenizes the script
2. scripted workers start on the other core and join it
3. callers, in this process, ask again and again, from first to last
4. once every caller has had `warm_up` tokens, rounds of a fixed length are counted

A round's length depends on no caller: counting from the slowest one's beginning to the fastest
one's end leaves, where they differ much, a moment too short for the kernel's clock. Where the
other core is the slower one, the wall clock says little about the coordinator; so its
CPU time is read from the kernel, and both rates are told.
"""

import asyncio
import os
import statistics
from collections.abc import Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from kvrelay.bench.control.processes import START_S, Running, choose_cores, cpu_s, pinned, running
from kvrelay.bench.control.script import TEXT, Script
from kvrelay.client import Client, GenerateOptions, Tokens
from kvrelay.clock import Clock, MonotonicClock
from kvrelay.events import Delta

PROMPT_TOKENS = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured."""

    model: str
    num_callers: int = 64
    num_tokens: int = 4000
    """Output of each request."""

    num_rounds: int = 5
    round_s: float = 5.0
    warm_up: int = 400
    """Tokens that every caller has had when the count begins."""

    step_s: float = 0.0
    """Pause of the decode worker after each step; 0 has the coordinator set the pace."""

    share_connection: bool = False
    """All callers over one connection, instead of one each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What was counted between the two ends of one round."""

    elapsed_s: float
    num_tokens: int
    num_messages: int
    coordinator_cpu_s: float | None
    """None where the kernel does not tell."""

    others_cpu_s: float | None
    """Workers and callers together."""

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s

    @property
    def tokens_per_cpu_s(self) -> float | None:
        return self.num_tokens / self.coordinator_cpu_s if self.coordinator_cpu_s else None

    @property
    def fits_one_core(self) -> bool:
        """Whether a process on one core could have used so much CPU time, a few ticks aside."""
        return (self.coordinator_cpu_s or 0.0) <= 1.02 * self.elapsed_s + 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """All rounds, and where they ran."""

    rounds: tuple[Round, ...]
    num_answers: int
    """Whole ones, the first tokens of those under way at the end besides; all were checked."""

    num_wrong: int
    """Answers that were not the script's."""

    coordinator_core: int | None
    other_cores: tuple[int, ...]

    @property
    def is_pinned(self) -> bool:
        return self.coordinator_core is not None

    def median(self, of: Callable[[Round], float | None]) -> float | None:
        values = [value for value in map(of, self.rounds) if value is not None]
        return statistics.median(values) if values else None


async def measure(options: Options, *, on_round: Callable[[Round], None]) -> Result:
    """Run everything and stop it again.

    Raises:
        PeerUnavailable: a process did not come up; its last lines are in the message.
        ServingError: whatever ended a request badly.
    """
    ours, others = choose_cores()
    cores = None if ours is None else {ours}
    async with AsyncExitStack() as stack:
        with pinned(others):
            coordinator = await stack.enter_async_context(
                running("coordinator", _coordinator(options.model), cores)
            )
            script, workers = await _with_workers(stack, options, coordinator.address)
            callers = await _callers(stack, options, coordinator.address)
            pids = _Pids(coordinator.pid, (workers.pid, os.getpid()))
            crowd = _Crowd(options, script, pids, MonotonicClock())
            rounds = await crowd.run(callers, on_round)
    return Result(
        rounds=tuple(rounds),
        num_answers=crowd.num_answers,
        num_wrong=crowd.num_wrong,
        coordinator_core=ours,
        other_cores=tuple(sorted(others or ())),
    )


async def _with_workers(
    stack: AsyncExitStack, options: Options, coordinator: str
) -> tuple[Script, Running]:
    async with Client(coordinator) as client:
        text_ids = await client.tokenize(TEXT, timeout_s=START_S)
        argv = (
            *("-m", "kvrelay.bench.control.workers", "--coordinator", coordinator),
            *("--model", options.model, "--text-ids", ",".join(map(str, text_ids))),
            *("--step-s", str(options.step_s)),
        )
        workers = await stack.enter_async_context(running("workers", argv))
        async with asyncio.timeout(START_S), aclosing(client.watch_serving()) as states:
            async for is_serving in states:
                if is_serving:
                    break
    return Script(text_ids), workers


def _coordinator(model: str) -> tuple[str, ...]:
    return (
        *("-m", "coordinator", "--model", model, "--listen", "127.0.0.1:0"),
        *("--http-listen", "127.0.0.1:0", "--disaggregate", "always", "--log-level", "warning"),
    )


async def _callers(stack: AsyncExitStack, options: Options, coordinator: str) -> list[Client]:
    num_connections = 1 if options.share_connection else options.num_callers
    clients = [await stack.enter_async_context(Client(coordinator)) for _ in range(num_connections)]
    return [clients[i % num_connections] for i in range(options.num_callers)]


@dataclass(frozen=True, slots=True)
class _Pids:
    coordinator: int
    others: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Moment:
    """What the clocks and counters say now."""

    at_s: float
    num_tokens: int
    num_messages: int
    coordinator_cpu_s: float | None
    others_cpu_s: float | None


class _Crowd:
    """All callers: asks, checks every answer, and looks at the clocks at the ends of rounds."""

    def __init__(self, options: Options, script: Script, pids: _Pids, clock: Clock) -> None:
        self._options = options
        self._script = script
        self._pids = pids
        self._clock = clock
        self._num_cold = options.num_callers
        self._all_warm = asyncio.Event()
        self._num_tokens = 0
        self._num_messages = 0
        self.num_answers = 0
        self.num_wrong = 0

    async def run(self, callers: list[Client], on_round: Callable[[Round], None]) -> list[Round]:
        """Ask until all rounds are over.

        Raises:
            ServingError: whatever ended a request badly.
        """
        asking = [asyncio.create_task(self._ask_on(it, n)) for n, it in enumerate(callers)]
        counting = asyncio.create_task(self._count(on_round))
        try:
            await asyncio.wait({counting, *asking}, return_when=asyncio.FIRST_COMPLETED)
            for task in asking:  # they end by themselves only when something fails
                if task.done():
                    task.result()
            return counting.result()
        finally:
            for ending in (counting, *asking):
                ending.cancel()
            await asyncio.gather(counting, *asking, return_exceptions=True)

    async def _count(self, on_round: Callable[[Round], None]) -> list[Round]:
        await self._all_warm.wait()
        rounds = []
        began = self._now()
        for _ in range(self._options.num_rounds):
            await asyncio.sleep(self._options.round_s)
            ended = self._now()
            rounds.append(_between(began, ended))
            on_round(rounds[-1])
            began = ended
        return rounds

    async def _ask_on(self, client: Client, number: int) -> None:
        prompt_ids = self._script.prompt(number, PROMPT_TOKENS)
        expected = self._script.answer(prompt_ids, self._options.num_tokens)
        is_cold = True
        while True:
            answer: list[int] = []
            try:
                async with aclosing(client.generate(Tokens(prompt_ids), self._wanted())) as events:
                    async for event in events:
                        if not isinstance(event, Delta):
                            continue
                        self._take(event, answer)
                        if is_cold and len(answer) >= self._options.warm_up:
                            is_cold = False
                            self._warm()
                self.num_answers += 1
                self.num_wrong += len(answer) != len(expected)
            finally:
                self.num_wrong += answer != expected[: len(answer)]

    def _wanted(self) -> GenerateOptions:
        return GenerateOptions(
            max_tokens=self._options.num_tokens, temperature=0.0, ignore_eos=True
        )

    def _take(self, delta: Delta, answer: list[int]) -> None:
        assert delta.position == len(answer), "a position was lost or came twice"
        answer += delta.token_ids
        self._num_tokens += len(delta.token_ids)
        self._num_messages += 1

    def _warm(self) -> None:
        self._num_cold -= 1
        if not self._num_cold:
            self._all_warm.set()

    def _now(self) -> _Moment:
        others = [cpu_s(pid) for pid in self._pids.others]
        known = [it for it in others if it is not None]
        return _Moment(
            at_s=self._clock.now(),
            num_tokens=self._num_tokens,
            num_messages=self._num_messages,
            coordinator_cpu_s=cpu_s(self._pids.coordinator),
            others_cpu_s=sum(known) if len(known) == len(others) else None,
        )


def _between(began: _Moment, ended: _Moment) -> Round:
    return Round(
        elapsed_s=ended.at_s - began.at_s,
        num_tokens=ended.num_tokens - began.num_tokens,
        num_messages=ended.num_messages - began.num_messages,
        coordinator_cpu_s=_difference(ended.coordinator_cpu_s, began.coordinator_cpu_s),
        others_cpu_s=_difference(ended.others_cpu_s, began.others_cpu_s),
    )


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier
