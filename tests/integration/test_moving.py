"""A sequence that generates moves from one decode worker to another, as a coordinator has it.

`left` is the worker it leaves, `right` the one that goes on with it. Rows are counted: each row of
the scripted model is one token, so a worker that computed a token again shows.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest

from kvrelay.handoff.holds import HoldState
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.base import KvTransport
from kvrelay.v1 import decode_pb2
from tests.support.builders import prompt
from tests.support.scripted_model import StepGate, expected_tokens
from tests.support.workers import (
    HOLD_LIMITS,
    LAYOUT,
    LIMITS,
    WAIT_S,
    DecodeBench,
    Session,
    decode_session,
    decode_submit,
    decode_worker,
    new_id,
    pull_of,
    ticket_of,
    until,
)

MAX_TOKENS = 40
TRANSPORTS = ("shm", "stream")
NUM_TOKENS = (1, 3, 4, 5, 8, 9, 17)


class Ear:
    """Hears one session, all the time: what each attempt has been told, and in which order."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.tokens: dict[tuple[str, int], dict[int, int]] = {}
        """By attempt: token by position."""
        self.outputs: dict[tuple[str, int], list[decode_pb2.SequenceOutput]] = {}
        self.failed: dict[tuple[str, int], str] = {}
        self.moved: dict[tuple[str, int], int] = {}
        self.finished: set[tuple[str, int]] = set()
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._hear())

    async def _hear(self) -> None:
        while (message := await self.session.call.read()) and message.HasField("header"):
            for output in message.outputs:
                self._take(output)
            for each in message.failed:
                name = (each.request_id, each.attempt)
                assert name not in self.moved
                self.failed[name] = each.failure.reason
            for each in message.moved:
                name = (each.request_id, each.attempt)
                assert name not in self.finished
                # Its last tokens were told before.
                assert max(self.tokens[name]) == each.num_outputs - 1
                self.moved[name] = each.num_outputs
            self._changed.set()

    def _take(self, output: decode_pb2.SequenceOutput) -> None:
        name = (output.request_id, output.attempt)
        assert name not in self.moved
        assert name not in self.finished
        tokens = self.tokens.setdefault(name, {})
        assert not tokens or output.position == max(tokens) + 1, "a gap or a repeat"
        tokens |= dict(enumerate(output.token_ids, output.position))
        self.outputs.setdefault(name, []).append(output)
        if output.finish_reason:
            self.finished.add(name)

    async def until(self, condition):
        async with asyncio.timeout(WAIT_S):
            while not condition(self):
                assert not self._task.done(), "the session ended"
                self._changed.clear()
                await self._changed.wait()
        return condition(self)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Watched:
    """A client of holders whose freezes and releases are seen, and wait if they are to."""

    def __init__(self, inner) -> None:
        self._inner = inner
        self.froze, self.asked_release = asyncio.Event(), asyncio.Event()
        self.may_release = asyncio.Event()
        self.may_release.set()

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    async def freeze(self, source) -> None:
        await self._inner.freeze(source)
        self.froze.set()

    async def release(self, source, generations) -> None:
        self.asked_release.set()
        await self.may_release.wait()
        await self._inner.release(source, generations)


class Gated:
    """A transport whose pulls wait until they may go."""

    def __init__(self, inner: KvTransport) -> None:
        self._inner = inner
        self.entered, self.may_pull = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    async def pull(self, remote, copies):
        self.entered.set()
        await self.may_pull.wait()
        return await self._inner.pull(remote, copies)


@dataclass(kw_only=True)
class Scene:
    """Two decode workers and a coordinator's sessions with both; `left` takes steps when told."""

    left: DecodeBench
    right: DecodeBench
    lefts: Ear
    rights: Ear
    gate: StepGate
    holder: Watched
    prompt_ids: tuple[int, ...] = prompt(9)
    request_id: str = field(default_factory=new_id)

    async def start(
        self, num_outputs: int, *, max_tokens: int = MAX_TOKENS, num_steps_before: int = 0
    ) -> None:
        """Have `left` generate so many tokens; it is then in the step of the next."""
        num_others = self.num_on_left
        await self.lefts.session.submit(
            **decode_submit(self.prompt_ids, request_id=self.request_id, max_tokens=max_tokens)
        )
        await until(lambda: self.num_on_left > num_others)
        name = (self.request_id, 1)
        num_chunks = -(-len(self.prompt_ids) // LIMITS.max_chunk_tokens)
        for _ in range(num_steps_before + num_chunks):
            self.gate.let_one_pass()
        for wanted in range(1, num_outputs + 1):
            await self.lefts.until(lambda it, n=wanted: len(it.tokens.get(name, ())) >= n)
            if wanted < num_outputs:
                self.gate.let_one_pass()

    @property
    def num_on_left(self) -> int:
        load = self.left.engine.load()
        return load.waiting + load.running

    async def move(
        self,
        *,
        transport: str = "shm",
        max_tokens: int = MAX_TOKENS,
        num_emitted: int | None = None,
        right_first: bool = False,
        **changes,
    ) -> str:
        """Tell both; returns the handoff's name."""
        handoff_id = new_id()
        known = self.lefts.tokens[self.request_id, 1]
        num_emitted = len(known) if num_emitted is None else num_emitted
        source = pull_of(self.left, handoff_id, transport, is_running=True, **changes)
        submit = decode_submit(
            self.prompt_ids,
            request_id=self.request_id,
            attempt=2,
            emitted_token_ids=[known[i] for i in range(num_emitted)],
            max_tokens=max_tokens,
            pull=source,
        )
        if right_first:
            await self.rights.session.submit(**submit)
            await until(lambda: not self.left.keeper.holds.is_empty)
        await hand_over(self.lefts, self.request_id, 1, handoff_id, self.right)
        if not right_first:
            await self.rights.session.submit(**submit)
        return handoff_id

    async def cancel_move(self, handoff_id: str) -> None:
        await cancel_hand_over(self.lefts, self.request_id, 1, handoff_id)

    def hold(self, handoff_id: str):
        return self.left.keeper.holds.alive(handoff_id)

    async def moved(self) -> int:
        """Tokens that `left` had generated; it has nothing more of the request."""
        num_outputs = await self.lefts.until(lambda it: it.moved.get((self.request_id, 1)))
        await until(lambda: self.left.engine.is_idle)
        assert self.left.num_held_blocks == 0
        assert self.left.keeper.holds.is_empty
        return num_outputs

    async def ended(self, ear: Ear, attempt: int) -> dict[int, int]:
        name = (self.request_id, attempt)
        await ear.until(lambda it: name in it.finished)
        return ear.tokens[name]

    async def require_stays(self, num_tokens: int = MAX_TOKENS) -> None:
        """`left` generates to the end, right tokens, and none of the other's comes between."""
        self.gate.open()
        tokens = await self.ended(self.lefts, 1)
        await until(lambda: self.left.engine.is_idle and self.right.engine.is_idle)
        assert tuple(tokens[i] for i in range(num_tokens)) == self.expected(num_tokens)
        assert (self.request_id, 2) not in self.rights.tokens
        assert not self.lefts.moved
        assert self.left.runner.num_rows == len(self.prompt_ids) + num_tokens - 1
        assert self.right.num_held_blocks == 0

    def expected(self, num_tokens: int = MAX_TOKENS) -> tuple[int, ...]:
        return expected_tokens(self.prompt_ids, num_tokens)


async def hand_over(
    ear: Ear, request_id: str, attempt: int, handoff_id: str, target: DecodeBench
) -> None:
    order = decode_pb2.HandOver(
        request_id=request_id,
        attempt=attempt,
        handoff_id=handoff_id,
        puller_id=target.worker_id,
    )
    await ear.session.call.write(decode_pb2.DecodeRequest(hand_over=order))


async def cancel_hand_over(ear: Ear, request_id: str, attempt: int, handoff_id: str) -> None:
    order = decode_pb2.CancelHandOver(request_id=request_id, attempt=attempt, handoff_id=handoff_id)
    await ear.session.call.write(decode_pb2.DecodeRequest(cancel_hand_over=order))


@contextlib.asynccontextmanager
async def scene(
    *,
    left: dict | None = None,
    right: dict | None = None,
    num_prompt: int = 9,
) -> AsyncIterator[Scene]:
    gate = StepGate()
    holders: list[Watched] = []

    def watch(client):
        holders.append(Watched(client))
        return holders[-1]

    async with (
        decode_worker(worker_id="left", epoch="a" * 16, gate=gate, **(left or {})) as a,
        decode_worker(wrap_holders=watch, **(right or {})) as b,
        decode_session(a) as lefts,
        decode_session(b) as rights,
    ):
        made = Scene(
            left=a,
            right=b,
            lefts=Ear(lefts),
            rights=Ear(rights),
            gate=gate,
            holder=holders[0],
            prompt_ids=prompt(num_prompt),
        )
        try:
            yield made
        finally:
            gate.open()
            await made.lefts.close()
            await made.rights.close()


def sized(block_size: int) -> dict[str, KvLayout]:
    return {"layout": replace(LAYOUT, block_size=block_size)}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 4)])
@pytest.mark.parametrize("num_prompt", NUM_TOKENS)
async def test_a_moved_request_goes_on_with_the_same_tokens(transport, sizes, num_prompt):
    """None is computed again: the worker that goes on computes those its holder had not, and no
    row of the prompt; the one that was left is empty when it says so."""
    async with scene(left=sized(sizes[0]), right=sized(sizes[1]), num_prompt=num_prompt) as it:
        await it.start(10)
        await it.move(transport=transport)
        await it.holder.froze.wait()
        it.gate.let_one_pass()
        num_moved = await it.moved()
        tokens = await it.ended(it.rights, 2)

    assert num_moved == 11
    assert tokens == dict(enumerate(it.expected()[10:], 10))
    assert it.left.runner.num_rows == num_prompt + 10
    assert it.right.runner.num_rows == MAX_TOKENS - num_moved
    first, *others = it.rights.outputs[it.request_id, 2]
    assert first.position == 10
    assert first.handoff.transport == transport
    assert first.handoff.num_bytes == (
        it.left.cache.layout.num_blocks_for(num_prompt + 10) * it.left.cache.layout.block_num_bytes
    )
    assert not any(output.HasField("handoff") for output in others)


@pytest.mark.parametrize("right_first", [False, True])
async def test_tokens_that_the_caller_may_not_have_are_told_again(right_first):
    """From the position that the coordinator knew on, whichever of the two hears of it first."""
    async with scene() as it:
        await it.start(10)
        await it.move(num_emitted=6, right_first=right_first)
        await it.holder.froze.wait()
        it.gate.let_one_pass()
        num_moved = await it.moved()
        tokens = await it.ended(it.rights, 2)

    assert num_moved == 11
    assert tokens == dict(enumerate(it.expected()[6:], 6))
    assert it.rights.outputs[it.request_id, 2][0].token_ids[:5] == list(it.expected()[6:11])


async def test_the_worker_that_is_left_runs_on_until_it_is_frozen():
    """Its tokens go on while blocks move, and what they fill moves after them."""
    async with scene(right={"wrap": Gated}) as it:
        await it.start(4)
        await it.move()
        gated = it.right.transports.all[0]
        await gated.entered.wait()
        for wanted in range(5, 16):
            it.gate.let_one_pass()
            await it.lefts.until(lambda ear, n=wanted: len(ear.tokens[it.request_id, 1]) >= n)
        gated.may_pull.set()
        await it.holder.froze.wait()
        it.gate.let_one_pass()
        num_moved = await it.moved()
        tokens = await it.ended(it.rights, 2)

    assert num_moved == 16
    assert tokens == dict(enumerate(it.expected()[4:], 4))
    assert it.right.runner.num_rows == MAX_TOKENS - num_moved


async def test_a_full_worker_lets_the_other_run_on():
    """Nothing stops before there is room; then it moves with all that was generated meanwhile."""
    gate = StepGate()
    async with scene(right={"num_blocks": 30, "gate": gate}) as it:
        busy = decode_submit(prompt(100, variant=1), max_tokens=16)
        await it.rights.session.submit(**busy)
        await asyncio.to_thread(gate.wait_entered)
        await it.start(4)
        await it.move()
        await until(lambda: it.right.engine.load().waiting == 1)
        for wanted in range(5, 20):
            it.gate.let_one_pass()
            await it.lefts.until(lambda ear, n=wanted: len(ear.tokens[it.request_id, 1]) >= n)
        still_waiting = it.right.engine.load().waiting
        gate.open()
        await it.holder.froze.wait()
        it.gate.let_one_pass()
        num_moved = await it.moved()
        tokens = await it.ended(it.rights, 2)

    assert still_waiting == 1
    assert num_moved == 20
    assert tokens == dict(enumerate(it.expected()[4:], 4))


async def test_a_move_that_finds_no_room_in_time_is_given_up():
    """The sequence is frozen before there is more KV than would fit; if there are no blocks for it
    by then, it goes on where it is."""
    gate = StepGate()
    num_tokens = 400
    async with scene(
        left={"num_blocks": 128}, right={"num_blocks": 110, "gate": gate}, num_prompt=5
    ) as it:
        busy = decode_submit(prompt(300, variant=1), max_tokens=40)
        await it.rights.session.submit(**busy)
        await asyncio.to_thread(gate.wait_entered)
        await it.start(4, max_tokens=num_tokens)
        handoff_id = await it.move(max_tokens=num_tokens)
        await until(lambda: it.right.engine.load().waiting == 1)
        it.gate.open()
        name = (it.request_id, 1)
        most = 5 + 4 + 256  # prompt, what was emitted, and the slack for a move
        await it.lefts.until(lambda ear: len(ear.tokens[name]) == most - 5 + 1)
        reason = await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))
        rows = it.left.runner.num_rows
        await it.cancel_move(handoff_id)
        tokens = await it.ended(it.lefts, 1)
        gate.open()

        assert reason == "HANDOFF_LOST"
        assert rows == most
        assert tokens == dict(enumerate(it.expected(num_tokens)))


async def test_a_prefix_that_the_other_knows_is_not_moved():
    """It has served the prompt before: only what was generated, and the prompt's end, comes."""
    async with scene(num_prompt=17) as it:
        fields = decode_submit(it.prompt_ids, max_tokens=1)
        await it.rights.session.submit(**fields)
        await it.rights.until(lambda ear: (fields["request_id"], 1) in ear.finished)
        before = it.right.runner.num_rows
        await it.start(10)
        await it.move()
        await it.holder.froze.wait()
        it.gate.let_one_pass()
        num_moved = await it.moved()
        tokens = await it.ended(it.rights, 2)

    timing = it.rights.outputs[it.request_id, 2][0].handoff
    assert tokens == dict(enumerate(it.expected()[10:], 10))
    assert timing.cached_prompt_tokens == 16
    assert timing.num_bytes == 3 * LAYOUT.block_num_bytes
    assert it.right.runner.num_rows == before + MAX_TOKENS - num_moved


async def test_a_sequence_that_was_handed_over_once_moves_again():
    """Back to where it came from, which computes nothing again either."""
    async with scene() as it:
        await it.start(6)
        await it.move()
        await it.holder.froze.wait()
        it.gate.open()
        num_moved = await it.moved()
        rows = it.left.runner.num_rows
        tokens = await it.ended(it.rights, 2)
        # From the beginning, on the other, and back in the midst of it.
        again = new_id()
        await it.rights.session.submit(
            **decode_submit(it.prompt_ids, request_id=again, max_tokens=150)
        )
        await it.rights.until(lambda ear: len(ear.tokens.get((again, 1), ())) >= 3)
        handoff_id = new_id()
        await hand_over(it.rights, again, 1, handoff_id, it.left)
        ticket = ticket_of(it.right, handoff_id, puller_id="left", puller_epoch="a" * 16)
        known = it.rights.tokens[again, 1]
        await it.lefts.session.submit(
            **decode_submit(
                it.prompt_ids,
                request_id=again,
                attempt=2,
                emitted_token_ids=[known[i] for i in range(len(known))],
                max_tokens=150,
                pull=pull_of(it.right, handoff_id, "shm", ticket=ticket, is_running=True),
            )
        )
        num_moved_back = await it.rights.until(lambda ear: ear.moved.get((again, 1)))
        await it.lefts.until(lambda ear: (again, 2) in ear.finished)

    assert tokens == dict(enumerate(it.expected()[6:], 6))
    merged = it.rights.tokens[again, 1] | it.lefts.tokens[again, 2]
    assert tuple(merged[i] for i in range(150)) == it.expected(150)
    assert it.left.runner.num_rows == rows + 150 - num_moved_back
    assert num_moved == 7


PHASES = ("unknown to the other", "fetching", "in its last step", "frozen")


async def reach(it: Scene, phase: str) -> str:
    """Move until just then; returns the handoff's name."""
    await it.start(6)
    gated = it.right.transports.all[0]
    if phase == "unknown to the other":
        handoff_id = new_id()
        await hand_over(it.lefts, it.request_id, 1, handoff_id, it.right)
        await until(lambda: it.hold(handoff_id))
        return handoff_id
    if phase == "frozen":
        it.holder.may_release.clear()
    handoff_id = await it.move()
    await gated.entered.wait()
    if phase == "fetching":
        return handoff_id
    gated.may_pull.set()
    await it.holder.froze.wait()
    if phase == "in its last step":
        return handoff_id
    it.gate.let_one_pass()
    await it.holder.asked_release.wait()
    assert it.hold(handoff_id).state is HoldState.COMPLETE
    return handoff_id


@pytest.mark.parametrize("phase", PHASES)
async def test_a_move_that_is_called_off_leaves_the_request_where_it_is(phase):
    """In whichever phase: no token is lost, computed again or told by the other."""
    async with scene(right={"wrap": Gated}) as it:
        handoff_id = await reach(it, phase)
        await it.cancel_move(handoff_id)
        await until(lambda: it.left.keeper.holds.is_empty)
        it.right.transports.all[0].may_pull.set()
        it.holder.may_release.set()
        if phase != "unknown to the other":
            await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))
            assert it.rights.failed[it.request_id, 2] == "HANDOFF_LOST"
        await it.require_stays()


@pytest.mark.parametrize("phase", PHASES[1:])
async def test_a_request_that_the_other_drops_stays_where_it_is(phase):
    """The coordinator calls both off, the new attempt first."""
    async with scene(right={"wrap": Gated}) as it:
        handoff_id = await reach(it, phase)
        await it.rights.session.cancel(it.request_id, attempt=2)
        await until(lambda: it.right.engine.is_idle and it.right.lander.num_landing == 0)
        await it.cancel_move(handoff_id)
        await it.require_stays()


@pytest.mark.parametrize("phase", PHASES[1:])
async def test_a_request_whose_caller_left_is_nowhere_any_more(phase):
    """Both attempts are cancelled, in whichever phase of a move, and every block is back."""
    async with scene(right={"wrap": Gated}) as it:
        await reach(it, phase)
        await it.lefts.session.cancel(it.request_id, attempt=1)
        await it.rights.session.cancel(it.request_id, attempt=2)
        it.gate.open()
        it.right.transports.all[0].may_pull.set()
        it.holder.may_release.set()
        await until(lambda: it.left.engine.is_idle and it.right.engine.is_idle)

        assert it.left.num_held_blocks == it.right.num_held_blocks == 0
        assert (it.request_id, 2) not in it.rights.tokens


async def test_a_frozen_request_whose_puller_is_gone_runs_on_by_itself():
    """Nobody said anything: `hold_s` after its puller left, the hold is given up."""
    limits = replace(HOLD_LIMITS, hold_s=0.05)
    async with scene(left={"hold_limits": limits}, right={"wrap": Gated}) as it:
        await reach(it, "frozen")
        it.rights.session.call.cancel()
        await it.require_stays()

        name = "kvrelay_engine_hold_expirations_total"
        assert it.left.registry.get_sample_value(name, {"role": "decode"}) == 1


async def test_a_request_that_ends_before_it_is_frozen_has_just_ended():
    """Its worker tells its last token, and its puller, in the end, that there is nothing."""
    limits = replace(HOLD_LIMITS, unclaimed_hold_s=0.05)
    async with scene(left={"hold_limits": limits}, right={"wrap": Gated}) as it:
        await reach(it, "fetching")
        it.gate.open()
        await it.ended(it.lefts, 1)
        it.right.transports.all[0].may_pull.set()
        reason = await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))
        await it.require_stays()

    assert reason == "HANDOFF_LOST"


async def test_a_request_may_end_in_the_step_that_it_was_to_be_frozen_after():
    """Then it has ended, and nothing is held."""
    limits = replace(HOLD_LIMITS, unclaimed_hold_s=0.05)
    async with scene(left={"hold_limits": limits}) as it:
        await it.start(6, max_tokens=7)
        await it.move(max_tokens=7)
        await it.holder.froze.wait()
        it.gate.let_one_pass()
        tokens = await it.ended(it.lefts, 1)
        reason = await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))

        assert tuple(tokens.values()) == it.expected(7)
        assert reason == "HANDOFF_LOST"
        assert it.left.engine.is_idle


async def test_a_request_that_is_preempted_while_it_moves_stays_and_is_computed_again():
    """Its blocks are given up, which its puller hears at once; no token changes."""
    async with scene(left={"num_blocks": 12}, right={"wrap": Gated}) as it:
        older = decode_submit(prompt(8, variant=1), max_tokens=40)
        await it.lefts.session.submit(**older)
        await asyncio.to_thread(it.gate.wait_entered)
        await it.start(4, max_tokens=32, num_steps_before=1)
        await it.move(max_tokens=32)
        gated = it.right.transports.all[0]
        await gated.entered.wait()
        it.gate.open()
        await until(lambda: it.left.keeper.holds.is_empty)
        num_preemptions = it.left.engine.load().preemptions_total
        gated.may_pull.set()
        reason = await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))
        tokens = await it.ended(it.lefts, 1)
        await it.lefts.until(lambda ear: (older["request_id"], 1) in ear.finished)

        assert reason == "HANDOFF_LOST"
        assert num_preemptions > 0
        assert tuple(tokens.values()) == it.expected(32)


@pytest.mark.parametrize("what", ["unknown", "waits", "lands", "is handed over already"])
async def test_what_cannot_be_handed_over_leaves_nothing_to_pull(what):
    """It goes on where it is; a puller that comes finds no hold in time."""
    limits = replace(HOLD_LIMITS, unclaimed_hold_s=0.2)
    async with scene(left={"hold_limits": limits, "num_blocks": 16}) as it:
        await it.start(2)
        handoff_id, other = new_id(), new_id()
        match what:
            case "waits":
                fields = decode_submit(prompt(40, variant=2), request_id=other, max_tokens=2)
                await it.lefts.session.submit(**fields)
            case "lands":
                source = pull_of(it.right, new_id(), "stream", ticket=b"")
                fields = decode_submit(prompt(5), request_id=other, pull=source)
                await it.lefts.session.submit(**fields)
            case "is handed over already":
                other = it.request_id
                await hand_over(it.lefts, other, 1, new_id(), it.right)
        await hand_over(it.lefts, other, 1, handoff_id, it.right)
        pull = pull_of(it.left, handoff_id, "shm", is_running=True)
        await it.rights.session.submit(
            **decode_submit(
                it.prompt_ids,
                request_id=it.request_id,
                attempt=2,
                emitted_token_ids=it.expected(2),
                max_tokens=MAX_TOKENS,
                pull=pull,
            )
        )
        reason = await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))
        it.gate.open()
        tokens = await it.ended(it.lefts, 1)
        if what == "waits":
            await it.lefts.until(lambda ear: (other, 1) in ear.finished)

    assert reason == "HANDOFF_LOST"
    assert tuple(tokens.values()) == it.expected()


@pytest.mark.parametrize("is_unknown_attempt", [False, True])
async def test_a_call_off_of_something_else_changes_nothing(is_unknown_attempt):
    """Another handoff, or another attempt: the move goes on."""
    async with scene() as it:
        await it.start(6)
        handoff_id = await it.move()
        await it.holder.froze.wait()
        await cancel_hand_over(
            it.lefts,
            it.request_id,
            7 if is_unknown_attempt else 1,
            handoff_id if is_unknown_attempt else new_id(),
        )
        # So both were obeyed before the step ends.
        await it.lefts.session.submit(**decode_submit(prompt(3), max_tokens=0))
        await it.lefts.until(lambda ear: ear.failed)
        it.gate.open()
        assert await it.moved() == 7
        tokens = await it.ended(it.rights, 2)

    assert tokens == dict(enumerate(it.expected()[6:], 6))


async def test_what_moved_lives_without_the_worker_it_left():
    """The session that it came from ends right after the release."""
    async with scene() as it:
        await it.start(6)
        await it.move(num_emitted=3)
        await it.holder.froze.wait()
        it.gate.let_one_pass()
        await it.moved()
        it.lefts.session.call.cancel()
        tokens = await it.ended(it.rights, 2)

    assert tokens == dict(enumerate(it.expected()[3:], 3))


@pytest.mark.parametrize("phase", PHASES[1:])
async def test_a_session_that_breaks_while_a_request_moves_frees_both_sides(phase):
    """The coordinator died: nothing goes on anywhere."""
    async with scene(right={"wrap": Gated}) as it:
        await reach(it, phase)
        it.lefts.session.call.cancel()
        it.rights.session.call.cancel()
        it.gate.open()
        await until(lambda: it.left.engine.is_idle and it.right.engine.is_idle)
        await until(lambda: it.left.keeper.holds.is_empty)

        assert it.left.num_held_blocks == it.right.num_held_blocks == 0


@pytest.mark.parametrize(
    ("changes", "num_emitted", "field"),
    [({"ticket": b"x" * 16}, 2, None), ({}, 0, "emitted_token_ids")],
)
async def test_a_move_that_cannot_be_is_refused_and_nothing_stops(changes, num_emitted, field):
    """A forged ticket, or a running source of which the caller has nothing."""
    async with scene() as it:
        await it.start(4)
        handoff_id = await it.move(num_emitted=num_emitted, **changes)
        reason = await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))
        await it.cancel_move(handoff_id)
        await it.require_stays()

    assert reason == ("PERMISSION_DENIED" if field is None else "INVALID_REQUEST")


async def test_a_block_larger_than_the_landing_area_is_refused_and_nothing_stops():
    """Blocks of another size land there first, and here one alone is larger."""
    huge = replace(LAYOUT, head_dim=40_000)
    async with scene(left={"layout": huge}, right={"layout": replace(huge, block_size=8)}) as it:
        await it.start(4)
        handoff_id = await it.move()
        reason = await it.rights.until(lambda ear: ear.failed.get((it.request_id, 2)))
        await it.cancel_move(handoff_id)
        await it.require_stays()

    assert reason == "INCOMPATIBLE"


class Ticked(StepGate):
    """A step takes until the next tick; a tick that nobody waits for is no credit."""

    def __init__(self) -> None:
        super().__init__()
        self._is_waiting = False

    def pass_through(self, timeout_s: float = 10.0) -> None:
        self._is_waiting = True
        super().pass_through(timeout_s)

    def tick(self) -> None:
        if self._is_waiting:
            self._is_waiting = False
            self.let_one_pass()


class Roamer:
    """A request as its coordinator has it: where it runs, and the tokens of all its attempts."""

    def __init__(self, rng: random.Random, benches, ears: list[Ear], variant: int) -> None:
        self.request_id = new_id()
        self.prompt_ids = prompt(rng.randrange(1, 30), variant=variant)
        self.max_tokens = rng.randrange(60, 160)
        self.num_moves = self.num_lost = 0
        self._rng, self._benches, self._ears = rng, benches, ears
        self._place, self._attempt, self._last_attempt = rng.randrange(2), 1, 1
        self._move: tuple[int, str] | None = None
        """As which attempt, and the handoff's name."""
        self._patience = 0

    @property
    def _here(self) -> Ear:
        return self._ears[self._place]

    @property
    def _there(self) -> Ear:
        return self._ears[1 - self._place]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Merged by position; attempts agree wherever they overlap."""
        merged: dict[int, int] = {}
        for ear in self._ears:
            for (request_id, _), tokens in ear.tokens.items():
                if request_id == self.request_id:
                    assert all(merged.get(i, token) == token for i, token in tokens.items())
                    merged |= tokens
        return tuple(merged[i] for i in range(len(merged)))

    @property
    def has_finished(self) -> bool:
        return (self.request_id, self._attempt) in self._here.finished

    async def submit(self, ear: Ear, **changes) -> None:
        fields = decode_submit(
            self.prompt_ids,
            request_id=self.request_id,
            attempt=self._last_attempt,
            emitted_token_ids=self.tokens,
            max_tokens=self.max_tokens,
            **changes,
        )
        await ear.session.submit(**fields)

    async def turn(self, transport: str) -> None:
        """Begin a move, follow one, call one off, or place it again where it was lost."""
        name = (self.request_id, self._attempt)
        assert name not in self._here.failed
        if self._move is not None:
            await self._follow(*self._move)
        elif name in self._here.moved:  # it was called off as it moved
            self.num_lost += 1
            self._last_attempt += 1
            self._attempt = self._last_attempt
            await self.submit(self._here)
        elif 0 < len(self.tokens) < self.max_tokens and self._rng.random() < 0.05:
            await self._begin(transport)

    async def _begin(self, transport: str) -> None:
        left, right = (self._benches[i] for i in (self._place, 1 - self._place))
        self._last_attempt += 1
        self._move = (self._last_attempt, new_id())
        self._patience = self._rng.choice([10_000, 10_000, self._rng.randrange(300)])
        handoff_id = self._move[1]
        names = {"puller_id": right.worker_id, "puller_epoch": right.epoch}
        ticket = ticket_of(left, handoff_id, **names)
        source = pull_of(left, handoff_id, transport, ticket=ticket, is_running=True)
        await hand_over(self._here, self.request_id, self._attempt, handoff_id, right)
        await self.submit(self._there, pull=source)

    async def _follow(self, attempt: int, handoff_id: str) -> None:
        there = (self.request_id, attempt)
        is_left = (self.request_id, self._attempt) in self._here.moved
        if is_left and there in self._there.tokens:
            self._place, self._attempt, self._move = 1 - self._place, attempt, None
            self.num_moves += 1
            return
        self._patience -= 1
        if there in self._there.failed or self._patience < 0:
            await self._there.session.cancel(self.request_id, attempt=attempt)
            await cancel_hand_over(self._here, self.request_id, self._attempt, handoff_id)
            self._move = None

    async def close(self) -> None:
        """It has finished: a move under way has nothing to move."""
        if self._move is not None:
            await self._there.session.cancel(self.request_id, attempt=self._move[0])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_moves_at_any_moment_lose_no_token_and_leave_nothing(transport, seed):
    """Requests move to and fro between two small workers of other block sizes at random moments,
    some moves are called off, some sequences preempted: every token is right, every block back."""
    print(f"seed={seed}")
    rng = random.Random(seed)
    limits = replace(HOLD_LIMITS, unclaimed_hold_s=0.05)
    gates = (Ticked(), Ticked())
    async with contextlib.AsyncExitStack() as stack:
        benches = [
            await stack.enter_async_context(
                decode_worker(
                    worker_id=f"decode-{i}",
                    epoch=f"{i:016x}",
                    num_blocks=num_blocks,
                    hold_limits=limits,
                    layout=replace(LAYOUT, block_size=block_size),
                    gate=gates[i],
                )
            )
            for i, (num_blocks, block_size) in enumerate([(90, 4), (44, 8)])
        ]
        ears = [Ear(await stack.enter_async_context(decode_session(bench))) for bench in benches]
        roamers = [Roamer(rng, benches, ears, i % 3) for i in range(10)]
        for each in roamers:
            await each.submit(each._here)
        async with asyncio.timeout(60):
            while not all(each.has_finished for each in roamers):
                for each in roamers:
                    if not each.has_finished:
                        await each.turn(transport)
                for gate in gates:
                    if rng.random() < 0.1:
                        gate.tick()
                await asyncio.sleep(0)
        for each in roamers:
            await each.close()
        for gate in gates:
            gate.open()
        await until(lambda: all(bench.engine.is_idle for bench in benches))
        await until(lambda: all(bench.keeper.holds.is_empty for bench in benches))
        for ear in ears:
            await ear.close()

        for each in roamers:
            assert each.tokens == expected_tokens(each.prompt_ids, each.max_tokens)
        print("moved", [r.num_moves for r in roamers], "lost", [r.num_lost for r in roamers])
        print("preempted", [b.engine.load().preemptions_total for b in benches])
        assert sum(each.num_moves for each in roamers) > 0
        assert not any("KV_CORRUPT" in ear.failed.values() for ear in ears)
