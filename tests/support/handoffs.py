"""Handoffs by the thousand through one pair of workers in this process, some of them damaged.

Everything between the prompt's KV and the second token is real: the holder's announcements over
gRPC, a transport, the puller's verification, and the fence. One session with each worker carries
them all, with many under way at once, as a coordinator has it.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kvrelay.engine.plan import StepLimits
from kvrelay.kv.cache import KvCache
from kvrelay.kv.layout import KvLayout
from kvrelay.rpc import status
from kvrelay.transfer.base import BlockCopy, KvTransport, PullStats, RemoteHold
from kvrelay.transfer.chaos_spec import Damage
from kvrelay.transfer.damage import Landing, damage
from tests.support.scripted_model import VOCAB_SIZE, expected_tokens
from tests.support.workers import (
    BLOCK_SIZE,
    LAYOUT,
    DecodeBench,
    PrefillBench,
    Session,
    decode_session,
    decode_submit,
    decode_worker,
    new_id,
    prefill_session,
    prefill_submit,
    prefill_worker,
    pull_of,
    until,
)

Harm = Damage | Literal["truncated", "other-prompt"]
"""What is done to a handoff: to the bytes of a block that landed, to all blocks from one on, or
the holder computes another prompt of the same length."""

HARMS: tuple[Harm, ...] = (*Damage, "truncated", "other-prompt")

MAX_TOKENS = 3
AT_ONCE = 24
NUM_BLOCKS = 512
LIMITS = StepLimits(budget_tokens=512, max_chunk_tokens=16, max_sequences=64, max_waiting=1024)

_CORRUPT = "KV_CORRUPT"


class HarmingTransport:
    """As `inner`, but what lands is not what the holder digested, for the handoffs that are named
    in `harms`: once each, at the first pull that brings something.

    Either the bytes change on their way, which is done by changing them where they come from while
    they are fetched; whoever digests what it copies must see that. Or they change once they are
    here, and then nobody has digested them yet.
    """

    def __init__(
        self,
        inner: KvTransport,
        harms: dict[str, Harm],
        rng: random.Random,
        *,
        holder: PrefillBench,
    ) -> None:
        self._inner = inner
        self._harms = harms
        self._rng = rng
        self._holder = holder
        self._cache: KvCache | None = None
        self._earlier = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def register(self, cache: KvCache) -> None:
        self._cache = cache
        self._inner.register(cache)

    async def pull(self, remote: RemoteHold, copies: Sequence[BlockCopy]) -> PullStats:
        assert self._cache is not None
        harm = self._harms.pop(remote.handoff_id, None) if copies else None
        landing = Landing(self._cache, copies, is_on_device=False)
        if harm is None:
            stats = await self._inner.pull(remote, copies)
            if copies:
                self._earlier = landing.read(0)
            return stats
        before = [landing.read(i) for i in range(len(copies))]
        if self._rng.random() < 0.5:
            stats = await self._inner.pull(remote, copies)
            self._harm(landing, harm, before)
            return replace(stats, digests=None)
        await self._until_digested(remote.handoff_id)
        origin = Landing(
            self._holder.cache,
            [replace(copy, target_offset=copy.source_offset) for copy in copies],
            is_on_device=False,
        )
        right = [origin.read(i) for i in range(len(copies))]
        self._harm(origin, harm, before)
        try:
            return await self._inner.pull(remote, copies)
        finally:
            for i, data in enumerate(right):
                origin.write(i, data)

    async def _until_digested(self, handoff_id: str) -> None:
        """What changes before is digested as it then is."""
        hold = self._holder.keeper.holds.alive(handoff_id)
        assert hold is not None
        await until(lambda: hold.is_told or not hold.is_alive)

    def _harm(self, landing: Landing, harm: Harm, before: Sequence[bytes]) -> None:
        kind = harm if isinstance(harm, Damage) else Damage.STALE
        if harm == "truncated":
            first = self._rng.randrange(len(landing))
            for i in range(first + 1, len(landing)):
                landing.write(i, before[i])
            landing, before = landing.only(first), before[first : first + 1]
        damage(landing, kind, self._rng, before=before, earlier=self._earlier)


@dataclass(slots=True)
class Tally:
    """What became of handoffs. Anything in `wrong` is a failure of the whole idea."""

    caught: Counter[str] = field(default_factory=Counter)
    """Damaged and refused, by harm."""

    num_clean: int = 0
    """Undamaged, and their tokens right."""

    wrong: list[str] = field(default_factory=list)

    def add(self, other: "Tally") -> None:
        self.caught += other.caught
        self.num_clean += other.num_clean
        self.wrong += other.wrong

    @property
    def num_caught(self) -> int:
        return self.caught.total()


@dataclass(slots=True)
class _Request:
    prompt_ids: tuple[int, ...]
    ended: "asyncio.Future[str]"
    token_ids: list[int] = field(default_factory=list)


class Handoffs:
    """One pair of workers and the sessions with both."""

    def __init__(
        self,
        holder: PrefillBench,
        puller: DecodeBench,
        prefills: Session,
        decodes: Session,
        *,
        transport: str,
        harms: dict[str, Harm],
        rng: random.Random,
    ) -> None:
        self._holder = holder
        self._puller = puller
        self._prefills = prefills
        self._decodes = decodes
        self._transport = transport
        self._harms = harms
        self._rng = rng
        self._requests: dict[str, _Request] = {}
        self._instructions: asyncio.Queue[tuple[Session, dict[str, Any] | str]] = asyncio.Queue()

    async def run(
        self, *, num_corruptions: int, num_clean: int, on_done: Callable[[], None] | None = None
    ) -> Tally:
        """So many of each, mixed in random order, each with a prompt of its own."""
        tally = Tally()
        plan: list[Harm | None] = [HARMS[i % len(HARMS)] for i in range(num_corruptions)]
        plan += [None] * num_clean
        self._rng.shuffle(plan)
        todo = iter(plan)
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(each)
                for each in (
                    *(self._instruct(), self._hear_prefills(), self._hear_decodes()),
                    self._watch(),
                )
            ]
            lanes = [group.create_task(self._lane(todo, tally, on_done)) for _ in range(AT_ONCE)]
            await asyncio.wait(lanes)
            for task in helpers:
                task.cancel()
        benches = (self._holder, self._puller)
        await until(lambda: all(b.engine.is_idle or b.failures for b in benches))
        self._require_alive()
        return tally

    async def _watch(self) -> None:
        """A worker that failed answers nobody any more: then there is nothing to wait for."""
        while True:
            self._require_alive()
            await asyncio.sleep(0.1)

    def _require_alive(self) -> None:
        failures = [*self._holder.failures, *self._puller.failures]
        assert not failures, f"a worker failed: {failures}"

    async def _lane(
        self, todo: Iterator[Harm | None], tally: Tally, on_done: Callable[[], None] | None
    ) -> None:
        for harm in todo:
            await self._one(harm, tally)
            if on_done is not None:
                on_done()

    async def _one(self, harm: Harm | None, tally: Tally) -> None:
        prompt_ids = self._prompt()
        request_id, handoff_id = new_id(), new_id()
        computed_ids = prompt_ids
        if harm == "other-prompt":
            computed_ids = self._prompt(len(prompt_ids))
        elif harm is not None:
            self._harms[handoff_id] = harm
        request = _Request(prompt_ids, asyncio.get_running_loop().create_future())
        self._requests[request_id] = request
        names = {"request_id": request_id, "max_tokens": MAX_TOKENS}
        source = pull_of(self._holder, handoff_id, self._transport)
        self._tell(self._decodes, decode_submit(prompt_ids, pull=source, **names))
        self._tell(self._prefills, prefill_submit(computed_ids, handoff_id=handoff_id, **names))
        how = await request.ended
        del self._requests[request_id]
        self._tell(self._prefills, request_id)  # as the coordinator does at the end
        if harm is None:
            expected = list(expected_tokens(prompt_ids, MAX_TOKENS))
            if how == "" and request.token_ids == expected:
                tally.num_clean += 1
            else:
                tally.wrong.append(f"clean: {how or 'wrong tokens'}")
        elif how == _CORRUPT and not request.token_ids and handoff_id not in self._harms:
            tally.caught[harm.value if isinstance(harm, Damage) else harm] += 1
        else:
            tally.wrong.append(f"{harm}: {how or 'served'}")

    def _prompt(self, num_tokens: int = 0) -> tuple[int, ...]:
        """Of its own from the first token on, so that no prefix is known."""
        num_tokens = num_tokens or self._rng.randint(1, 10 * BLOCK_SIZE)
        return tuple(self._rng.randrange(VOCAB_SIZE) for _ in range(num_tokens))

    # The sessions

    def _tell(self, session: Session, what: dict[str, Any] | str) -> None:
        self._instructions.put_nowait((session, what))

    async def _instruct(self) -> None:
        while True:
            session, what = await self._instructions.get()
            if isinstance(what, str):
                await session.cancel(what)
            else:
                await session.submit(**what)

    async def _hear_prefills(self) -> None:
        while True:
            message = await self._prefills.call.read()
            for failed in message.failed:
                self._end(failed.request_id, f"holder {failed.failure}")

    async def _hear_decodes(self) -> None:
        while True:
            message = await self._decodes.call.read()
            for output in message.outputs:
                request = self._requests[output.request_id]
                request.token_ids += output.token_ids
                if output.finish_reason:
                    self._end(output.request_id, "")
            for failed in message.failed:
                self._end(failed.request_id, status_reason(failed))

    def _end(self, request_id: str, how: str) -> None:
        request = self._requests.get(request_id)
        if request is not None and not request.ended.done():
            request.ended.set_result(how)


def status_reason(failed: Any) -> str:
    """The reason of a failed attempt, as errors name it."""
    return status.from_failure(failed.failure).reason


@contextlib.asynccontextmanager
async def handoffs(
    transport: str,
    *,
    seed: int,
    holder_layout: KvLayout = LAYOUT,
    puller_layout: KvLayout = LAYOUT,
) -> AsyncIterator[Handoffs]:
    """A pair that hands over by `transport`. At its end every block is given back.

    The scripted model's KV survives blocks of another size, but not another dtype.
    """
    rng = random.Random(f"{seed}/{transport}")
    harms: dict[str, Harm] = {}
    options = {"num_blocks": NUM_BLOCKS, "limits": LIMITS, "transport": transport}

    def wrap(inner: KvTransport) -> KvTransport:
        return HarmingTransport(inner, harms, rng, holder=holder)

    async with (
        prefill_worker(**options, layout=holder_layout) as holder,
        decode_worker(**options, layout=puller_layout, wrap=wrap) as puller,
        prefill_session(holder) as prefills,
        decode_session(puller) as decodes,
    ):
        yield Handoffs(holder, puller, prefills, decodes, transport=transport, harms=harms, rng=rng)
