"""A whole pool in this process, each worker behind a proxy: real but for model and tokenizer.

Everything that workers and the coordinator say to each other goes through the proxies, which
can lose, repeat, delay and cut it, or have a worker die, stop or be started again meanwhile.
The scripted model reads its whole context back from the bytes that were handed over, so KV of
another request, or none, fails a step or shows in the tokens.
"""

import asyncio
import contextlib
import secrets
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from coordinator.request import GenerateSpec, TokenPrompt
from kvrelay.clock import MonotonicClock
from kvrelay.errors import ServingError
from kvrelay.events import Delta, Finished
from kvrelay.handoff.holds import HoldLimits
from kvrelay.rpc.membership import Membership
from kvrelay.types import Fingerprint, Role, WorkerIdentity
from tests.support.handoff_proxy import Act, HandoffProxy, Rule, proxy_before
from tests.support.scripted_coordinator import Deployment, scripted_coordinator
from tests.support.scripted_model import StepGate, expected_tokens
from tests.support.workers import (
    LAYOUT,
    Bench,
    decode_worker,
    prefill_worker,
    until,
)

Hook = Callable[[], Awaitable[None]]

FINGERPRINT = Fingerprint(model_digest="m", numerics="scripted-v1", layout=LAYOUT)
NUM_BLOCKS = 64

HOLD_LIMITS = HoldLimits(hold_s=0.4, unclaimed_hold_s=0.4, max_expected=64, max_remembered=256)
"""Short: what nobody comes for is found out while a test waits."""

RELEASE_TIMEOUT_S = 0.4
STOPPED_S = 0.25
ASK_TIMEOUT_S = 8.0


class Pace(StepGate):
    """Makes every step take a while, so that there is a middle to act in."""

    def __init__(self, step_s: float) -> None:
        super().__init__()
        self._step_s = step_s

    def pass_through(self, timeout_s: float = 10.0) -> None:
        if not self._is_open.is_set():
            time.sleep(self._step_s)


@dataclass
class Node:
    """A worker's name and address, and whoever is that worker now."""

    role: Role
    name: str
    proxy: HandoffProxy
    coordinator: str
    transport: str
    stack: contextlib.AsyncExitStack
    step_s: float = 0.0
    num_blocks: int = NUM_BLOCKS
    hold_limits: HoldLimits = HOLD_LIMITS
    gate: "Pace | None" = None
    bench: Bench | None = None
    joining: "asyncio.Task[None] | None" = None
    membership: Membership | None = None
    num_starts: int = 0

    async def start(self) -> None:
        """Serve behind the proxy, and join the pool."""
        worker = prefill_worker if self.role is Role.PREFILL else decode_worker
        options: dict[str, Any] = (
            {} if self.role is Role.PREFILL else {"release_timeout_s": RELEASE_TIMEOUT_S}
        )
        self.gate = Pace(self.step_s) if self.step_s else None
        bench = self.bench = await self.stack.enter_async_context(
            worker(
                worker_id=self.name,
                epoch=secrets.token_hex(8),
                hold_limits=self.hold_limits,
                num_blocks=self.num_blocks,
                fingerprint=FINGERPRINT,
                gate=self.gate,
                **options,
            )
        )
        self.num_starts += 1
        await self.proxy.come_back(bench.address)
        self.membership = Membership(
            identity=self._identity(bench),
            coordinator=self.coordinator,
            load=bench.service.load,
            clock=MonotonicClock(),
            on_key=bench.desk.take_key,
        )
        self.joining = asyncio.create_task(self.membership.run())

    def _identity(self, bench: Bench) -> WorkerIdentity:
        return WorkerIdentity(
            worker_id=self.name,
            epoch=bench.epoch,
            role=self.role,
            address=self.proxy.address,
            pid=1,
            fingerprint=FINGERPRINT,
            num_blocks=self.num_blocks,
            max_sequences=8,
            offers=(bench.offer(self.transport),),
        )

    async def die(self) -> None:
        """Everything that led to it breaks off, and nobody answers any more."""
        await self.proxy.go_down()
        await self.leave()

    async def leave(self) -> None:
        if self.joining is not None:
            self.joining.cancel()
            await asyncio.gather(self.joining, return_exceptions=True)

    async def drain(self) -> None:
        """Take nothing new, and say so."""
        assert self.bench is not None
        assert self.membership is not None
        self.bench.service.begin_drain()
        self.membership.announce()

    async def restart(self) -> None:
        """Die, and be somebody else at the same address."""
        await self.die()
        await self.start()

    async def stop(self) -> None:
        """Stand still from now on, and go on a little later."""
        self.proxy.stop()
        asyncio.get_running_loop().call_later(STOPPED_S, self.proxy.resume)

    async def lapse(self) -> None:
        """Give up whatever is held here, as if its time had come."""
        assert self.bench is not None
        for hold in list(self.bench.keeper.holds._holds.values()):
            self.bench.keeper.lapse(hold)

    @property
    def is_busy(self) -> bool:
        """Whether a handoff or a sequence is under way here."""
        assert self.bench is not None
        load = self.bench.service.load()
        return load.handoff_holds + load.running_sequences + load.waiting_sequences > 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a caller got."""

    token_ids: tuple[int, ...]
    error: ServingError | None = None
    lost_attempts: tuple[str, ...] = ()


@dataclass
class ProxiedPool:
    """What tests touch."""

    coordinator: Deployment
    nodes: list[Node]
    rules: list[Rule] = field(default_factory=list)
    leaving: Node | None = None
    happening: "set[asyncio.Task[None]]" = field(default_factory=set)

    def of(self, role: Role) -> list[Node]:
        return [node for node in self.nodes if node.role is role]

    def busy(self, role: Role) -> Node:
        """A worker that has to do with a request, if there is one."""
        nodes = self.of(role)
        return next((node for node in nodes if node.is_busy), nodes[0])

    def at(
        self, step: str, act_of: Callable[[Node], Act], *, which: int = 0, only: str = ""
    ) -> Rule:
        """One rule at all workers, acting once: at the first that the step comes to."""
        shared = None
        for node in self.nodes:
            rule = node.proxy.at(step, act_of(node), which=which, only=only)
            if shared is not None:
                rule.has_acted = shared.has_acted
            shared = rule
        assert shared is not None
        self.rules.append(shared)
        return shared

    def whole(self, happening: Callable[[], Coroutine[None, None, None]]) -> Hook:
        """A hook that does all of it, even if that breaks the call at whose message it is done."""

        async def hook() -> None:
            task = asyncio.create_task(happening())
            self.happening.add(task)
            await asyncio.shield(task)

        return hook

    @property
    def seen(self) -> Counter[str]:
        return sum((node.proxy.seen for node in self.nodes), Counter())

    async def ask(
        self, prompt_ids: Sequence[int], max_tokens: int, *, timeout_s: float = ASK_TIMEOUT_S
    ) -> Answer:
        """As a caller does, with a deadline. Positions must follow each other."""
        spec = GenerateSpec(
            prompt=TokenPrompt(tuple(prompt_ids)), max_tokens=max_tokens, temperature=0.0
        )
        token_ids: list[int] = []
        ledger = None
        try:
            events = self.coordinator.relay.generate(spec, time_left_s=timeout_s)
            async with contextlib.aclosing(events):
                async for event in events:
                    if isinstance(event, Delta):
                        assert event.position == len(token_ids), "a gap or a repeat"
                        token_ids += event.token_ids
                    elif isinstance(event, Finished):
                        ledger = event.ledger
        except ServingError as error:
            return Answer(tuple(token_ids), error)
        assert ledger is not None
        return Answer(tuple(token_ids), None, ledger.lost_attempts)

    def require_right(self, answer: Answer, prompt_ids: Sequence[int], max_tokens: int) -> None:
        """All tokens, or the first ones and a typed error; never another."""
        expected = expected_tokens(prompt_ids, max_tokens)
        assert answer.token_ids == expected[: len(answer.token_ids)], "wrong tokens"
        if answer.error is None:
            assert answer.token_ids == expected

    async def settle(self) -> None:
        """Until nobody holds anything for anybody."""
        await asyncio.gather(*self.happening)
        benches = [node.bench for node in self.nodes if node.bench is not None]
        await until(lambda: all(bench.engine.is_idle or bench.failures for bench in benches))
        for bench in benches:
            assert not bench.failures, bench.failures


@contextlib.asynccontextmanager
async def proxied_pool(
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    transport: str = "shm",
    prefill: Mapping[str, Any] | None = None,
    decode: Mapping[str, Any] | None = None,
) -> AsyncIterator[ProxiedPool]:
    """Workers that have joined, and at the end: none failed, and every block is given back.

    `prefill` and `decode` are more of a `Node`.
    """
    async with contextlib.AsyncExitStack() as stack:
        coordinator = await stack.enter_async_context(
            scripted_coordinator(suspect_after_s=1.0, queue_limit_s=5.0)
        )
        pool = ProxiedPool(coordinator, [])
        names = [(Role.PREFILL, f"p{i}", prefill) for i in range(num_prefill)]
        names += [(Role.DECODE, f"d{i}", decode) for i in range(num_decode)]
        for role, name, more in names:
            proxy = await stack.enter_async_context(proxy_before())
            node = Node(role, name, proxy, coordinator.address, transport, stack, **(more or {}))
            await node.start()
            pool.nodes.append(node)
        await until_members(pool, len(names))
        try:
            yield pool
            await pool.settle()
        finally:
            for node in pool.nodes:
                await node.leave()


async def until_members(pool: ProxiedPool, number: int) -> None:
    """Until so many take work."""
    async with asyncio.timeout(10):
        while sum(m.takes_work for m in pool.coordinator.pool.members()) < number:
            await pool.coordinator.pool.wait_change()
