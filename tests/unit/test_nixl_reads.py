"""The thread that has reads made: what it does with an agent that fails, stalls or hangs."""

import asyncio
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.clock import MonotonicClock
from kvrelay.errors import KvCorrupt, PeerUnavailable, QuiescenceLost
from kvrelay.transfer.nixl_reads import (
    Pull,
    Ranges,
    ReadFailed,
    Reads,
    batches_of,
    outcome,
)
from kvrelay.transfer.runs import Run

PATIENT = {"patience_s": 5.0, "quiesce_timeout_s": 5.0}


class ScriptedAgent:
    """A read from a peer is over at once, never (`silent`), or fails (`broken`)."""

    def __init__(self) -> None:
        self.silent: set[str] = set()
        self.broken: set[str] = set()
        self.told: list[str] = []
        self.has_begun = threading.Event()
        self.let_close = threading.Event()
        self.let_close.set()
        self._reads: list[str] = []

    def add_peer(self, metadata: bytes) -> str:
        self.told.append(f"add {metadata.decode()}")
        return metadata.decode()

    def remove_peer(self, name: str) -> None:
        self.told.append(f"remove {name}")

    def begin(self, peer: str, *, sources: Ranges, targets: Ranges) -> int:
        if peer in self.broken:
            raise ReadFailed("broken")
        self.told.append(f"read {peer}")
        self.has_begun.set()
        self._reads.append(peer)
        return len(self._reads) - 1

    def is_over(self, handle: int) -> bool:
        return self._reads[handle] not in self.silent

    def forget(self, handle: int) -> None:
        assert self.is_over(handle)

    def close(self) -> None:
        self.let_close.wait()
        self.told.append("close")


def pull_from(peer: str, *, limit_s: float = 5.0, num_batches: int = 1) -> Pull:
    return Pull(
        worker_id=peer,
        peer=peer,
        metadata=peer.encode(),
        batches=batches_of(
            [Run(0, 0, 16 << 20)] * num_batches,
            target_begin=1,
            source_begin=1,
            stall_s=limit_s,
            floor_bytes_per_s=1e12,
        ),
    )


def open_reads(open_agent: Callable[[], ScriptedAgent], *, max_peers: int = 4) -> Reads:
    return Reads(open_agent, clock=MonotonicClock(), max_peers=max_peers, name="test-reads")


async def close(reads: Reads) -> None:
    await asyncio.wrap_future(reads.close())


async def test_a_pull_reads_its_batches_one_after_the_other():
    """The peer is added once, and the agent closed at the end."""
    agent = ScriptedAgent()
    reads = open_reads(lambda: agent)
    pull = pull_from("a", num_batches=3)
    reads.start(pull)
    await outcome(pull, **PATIENT)
    await close(reads)
    assert agent.told == ["add a", *["read a"] * 3, "close"]


async def test_a_stalled_read_is_over_only_once_its_agent_is_closed():
    """Which is when the reads of other pulls are over; they are not cut off."""
    first, second = ScriptedAgent(), ScriptedAgent()
    first.silent = {"dead", "slow"}
    first.let_close.clear()
    agents = iter([first, second])
    reads = open_reads(lambda: next(agents))
    dead, slow = pull_from("dead", limit_s=0.02), pull_from("slow", num_batches=2)
    reads.start(slow)
    reads.start(dead)
    waiting = asyncio.ensure_future(outcome(dead, **PATIENT))
    assert not (await asyncio.wait([waiting], timeout=0.1))[0]  # the limit has passed
    first.silent = {"dead"}
    assert not (await asyncio.wait([waiting], timeout=0.1))[0]  # the agent is not closed
    first.let_close.set()
    with pytest.raises(PeerUnavailable, match="dead by nixl: no answer within"):
        await waiting
    await outcome(slow, **PATIENT)
    assert first.told == ["add slow", "read slow", "add dead", "read dead", "close"]
    assert second.told == ["add slow", "read slow"]
    await close(reads)


async def test_whoever_cannot_be_sure_of_the_end_is_told_so():
    """A thread that hangs in a call gives no answer; `outcome` says that nobody knows."""
    agent = ScriptedAgent()
    agent.silent = {"a"}
    agent.let_close.clear()
    reads = open_reads(lambda: agent)
    pull = pull_from("a", limit_s=0.01)
    reads.start(pull)
    with pytest.raises(QuiescenceLost, match=r"a read from a did not end within 0.05 s"):
        await outcome(pull, patience_s=0.0, quiesce_timeout_s=0.05)
    agent.let_close.set()
    await close(reads)


async def test_a_cancelled_pull_ends_after_the_batch_it_is_in():
    """And the cancellation takes its course only then."""
    agent = ScriptedAgent()
    agent.silent = {"a"}
    reads = open_reads(lambda: agent)
    pull = pull_from("a", num_batches=3)
    reads.start(pull)
    waiting = asyncio.ensure_future(outcome(pull, **PATIENT))
    await asyncio.to_thread(agent.has_begun.wait)
    waiting.cancel()
    await asyncio.sleep(0)
    waiting.cancel()
    done, _ = await asyncio.wait([waiting], timeout=0.05)
    assert not done
    agent.silent = set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await close(reads)
    assert agent.told.count("read a") == 1


async def test_closing_ends_what_is_under_way():
    """As unavailable, after the agent was closed."""
    agent = ScriptedAgent()
    agent.silent = {"a"}
    reads = open_reads(lambda: agent)
    pull = pull_from("a")
    reads.start(pull)
    await asyncio.to_thread(agent.has_begun.wait)
    await close(reads)
    assert agent.told[-1] == "close"
    with pytest.raises(PeerUnavailable):
        await outcome(pull, **PATIENT)


async def test_a_failure_costs_the_pull_it_befell_and_no_other():
    """Afterwards the same peer can be read from again, by a new agent."""
    agents = [ScriptedAgent(), ScriptedAgent()]
    agents[0].broken = {"a"}
    left = iter(agents)
    reads = open_reads(lambda: next(left))
    failing, other = pull_from("a"), pull_from("b")
    for pull in (failing, other):
        reads.start(pull)
    with pytest.raises(PeerUnavailable, match="broken"):
        await outcome(failing, **PATIENT)
    await outcome(other, **PATIENT)
    again = pull_from("a")
    reads.start(again)
    await outcome(again, **PATIENT)
    await close(reads)


async def test_an_agent_that_cannot_be_opened_fails_the_pull():
    """And the next pull tries again."""

    def refuse() -> ScriptedAgent:
        raise ReadFailed("no device")

    reads = open_reads(refuse)
    for _ in range(2):
        pull = pull_from("a")
        reads.start(pull)
        with pytest.raises(PeerUnavailable, match="no device"):
            await outcome(pull, **PATIENT)
    await close(reads)


async def test_a_peer_that_is_described_as_another_is_corrupt():
    """What NIXL reads from the metadata must be what the offer says."""
    reads = open_reads(ScriptedAgent)
    pull = pull_from("a")
    pull.metadata = b"b"
    reads.start(pull)
    with pytest.raises(KvCorrupt, match="described as b"):
        await outcome(pull, **PATIENT)
    await close(reads)


async def test_the_least_recently_used_peer_is_removed():
    """At most `max_peers` are known at a time."""
    agent = ScriptedAgent()
    reads = open_reads(lambda: agent, max_peers=2)
    for peer in ("a", "b", "a", "c", "a", "b"):
        pull = pull_from(peer)
        reads.start(pull)
        await outcome(pull, **PATIENT)
    await close(reads)
    told = [line for line in agent.told if not line.startswith("read")]
    assert told == ["add a", "add b", "remove b", "add c", "remove c", "add b", "close"]


@given(
    st.lists(
        st.tuples(st.integers(0, 99), st.integers(0, 99), st.sampled_from([1, 5 << 20, 16 << 20])),
        max_size=30,
    )
)
def test_batches_are_the_runs_in_order(runs):
    """Every byte is read from where it was announced, and a batch is bounded in bytes and time."""
    batches = batches_of(
        [Run(source, target, num_bytes) for source, target, num_bytes in runs],
        target_begin=1 << 40,
        source_begin=1 << 41,
        stall_s=1.0,
        floor_bytes_per_s=1e6,
    )
    moved = [
        (int(source[0]) - (1 << 41), int(target[0]) - (1 << 40), int(target[1]))
        for batch in batches
        for source, target in zip(batch.sources, batch.targets, strict=True)
        if source[1] == target[1]
    ]
    assert moved == runs
    for batch in batches:
        assert batch.limit_s == 1.0 + float(batch.targets[:, 1].sum()) / 1e6
        assert batch.targets[:-1, 1].sum() < 16 << 20
