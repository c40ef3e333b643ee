"""Injected faults: each does what it says, by seed, and the digest finds what it did to bytes."""

import asyncio
import random

import pytest

from kvrelay.errors import PeerUnavailable
from kvrelay.transfer.base import BlockCopy
from kvrelay.transfer.chaos_spec import Damage, Fault
from kvrelay.transfer.digest import block_digest
from kvrelay.transfer.faulty import FaultPlan, FaultRates, FaultScript, FaultyTransport
from tests.support.kv_peer import SMALL, Peer, make_transport, open_peer

BLOCK_NUM_BYTES = SMALL.block_num_bytes
COPIES = [
    BlockCopy(
        index=i,
        source_offset=i * BLOCK_NUM_BYTES,
        target_offset=(15 - i) * BLOCK_NUM_BYTES,
        num_bytes=BLOCK_NUM_BYTES,
    )
    for i in range(12)
]


def faulty(plan: FaultPlan, *, seed: int = 0, **options) -> FaultyTransport:
    inner = make_transport("shm", worker_id="decode-0", epoch="e9")
    return FaultyTransport(inner, plan=plan, seed=seed, **{"delay_s": 0.0, **options})


def always(*faults: Fault) -> FaultRates:
    return FaultRates(dict.fromkeys(faults, 1.0))


def wrong_blocks(holder: Peer, puller: Peer) -> list[int]:
    """Indexes whose digest is not the holder's, as a puller finds them."""
    return [
        copy.index
        for copy in COPIES
        if block_digest(puller.cache.range_bytes(copy.target_offset, copy.num_bytes))
        != block_digest(holder.cache.range_bytes(copy.source_offset, copy.num_bytes))
    ]


async def pulled(transport: FaultyTransport) -> list[int]:
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=2, transport=transport) as puller,
    ):
        stats = await puller.transport.pull(holder.hold(), COPIES)
        assert stats.num_bytes == len(COPIES) * BLOCK_NUM_BYTES
        return wrong_blocks(holder, puller)


async def test_without_faults_every_block_is_right():
    """The wrapper itself changes nothing."""
    assert await pulled(faulty(FaultRates({}))) == []


async def test_delayed_repeated_or_reordered_bytes_are_right():
    """These faults cost time only."""
    assert await pulled(faulty(always(Fault.DELAY, Fault.DUPLICATE, Fault.REORDER))) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", Damage)
async def test_corruption_is_found_in_the_blocks_it_struck(kind, seed):
    """One block, or two that were exchanged; named by their digests."""
    transport = faulty(always(Fault.CORRUPT), seed=seed, damages=[kind])
    wrong = await pulled(transport)

    assert len(wrong) == (2 if kind is Damage.SWAPPED else 1), f"seed={seed}"
    assert transport.injected.damages == {kind: 1}


@pytest.mark.parametrize("kind", Damage)
async def test_even_a_block_alone_is_damaged(kind):
    """Where there is nothing else to put there, a bit is flipped."""
    copies = COPIES[:1]
    transport = faulty(always(Fault.CORRUPT), damages=[kind])
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=1, transport=transport) as puller,
    ):
        puller.cache.bytes[:] = holder.cache.bytes[0]
        puller.cache.block_bytes(15)[:] = holder.cache.block_bytes(0)  # stale, yet right
        for _ in range(3):
            await puller.transport.pull(holder.hold(), copies)
            assert puller.block(15) != holder.block(0)


@pytest.mark.parametrize("seed", range(8))
async def test_truncation_is_found_at_the_tail(seed):
    """The last blocks are wrong, at least one, and all before them right."""
    wrong = await pulled(faulty(always(Fault.TRUNCATE), seed=seed))
    assert wrong, f"seed={seed}"
    assert wrong == list(range(wrong[0], len(COPIES))), f"seed={seed}"


async def test_a_dropped_pull_writes_nothing():
    """It ends as if the holder had gone."""
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=2, transport=faulty(always(Fault.DROP))) as puller,
    ):
        before = [puller.block(i) for i in range(16)]
        with pytest.raises(PeerUnavailable):
            await puller.transport.pull(holder.hold(), COPIES)
        assert [puller.block(i) for i in range(16)] == before


async def test_a_stalled_pull_ends_when_it_is_cancelled():
    """Until then it is silent, with half of its blocks landed."""
    transport = faulty(always(Fault.STALL), stall_s=3600.0)
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=2, transport=transport) as puller,
    ):
        pull = asyncio.create_task(puller.transport.pull(holder.hold(), COPIES))
        async with asyncio.timeout(10):
            while len(wrong_blocks(holder, puller)) > 6:  # noqa: ASYNC110 - bytes tell nobody
                await asyncio.sleep(0.001)
        assert not pull.done()
        pull.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pull


async def test_a_stalled_pull_is_given_up_in_the_end():
    """As a transport with a deadline of its own does it."""
    with pytest.raises(PeerUnavailable, match="stalled for 0"):
        await pulled(faulty(always(Fault.STALL), stall_s=0.0))


async def test_a_reordered_pull_lets_the_next_one_overtake():
    """Two pulls asked for one after the other end the other way round, both right."""
    ends: list[int] = []
    transport = faulty(FaultScript({0: frozenset({Fault.REORDER})}), delay_s=30.0)
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=2, transport=transport) as puller,
    ):

        async def pull(number: int, copies) -> None:
            await puller.transport.pull(holder.hold(), copies)
            ends.append(number)

        await asyncio.gather(pull(0, COPIES[:6]), pull(1, COPIES[6:]))

        assert wrong_blocks(holder, puller) == []
    assert ends == [1, 0]


async def test_a_script_strikes_the_pull_it_names():
    """So a test can fail the first, then the second, until it passes untouched."""
    for struck in range(4):
        told: list[Fault] = []
        plan = FaultScript({struck: frozenset({Fault.DROP})})
        transport = faulty(plan, on_injected=told.append)
        async with (
            open_peer("shm", seed=1) as holder,
            open_peer("shm", seed=2, transport=transport) as puller,
        ):
            outcomes = []
            for _ in range(4):
                (outcome,) = await asyncio.gather(
                    puller.transport.pull(holder.hold(), COPIES), return_exceptions=True
                )
                outcomes.append(isinstance(outcome, PeerUnavailable))
        assert outcomes == [i == struck for i in range(4)]
        assert transport.injected.faults == {Fault.DROP: 1}
        assert told == [Fault.DROP]


def test_a_seed_decides_and_rates_only_thin_out():
    """Equal seeds strike equally; a lower rate strikes a subset."""

    def struck(rate: float, seed: int) -> list[frozenset[Fault]]:
        rates, rng = FaultRates(dict.fromkeys(Fault, rate)), random.Random(seed)
        return [rates.faults(i, rng) for i in range(200)]

    assert struck(0.3, seed=1) == struck(0.3, seed=1)
    assert struck(0.3, seed=1) != struck(0.3, seed=2)
    few, many = struck(0.1, seed=1), struck(0.5, seed=1)
    assert all(a <= b for a, b in zip(few, many, strict=True))
    assert few != many


@pytest.mark.parametrize("seed", range(4))
async def test_under_every_fault_at_once_no_wrong_byte_passes_unseen(seed):
    """A puller that checks digests ends with right bytes or knows that it has not."""
    transport = faulty(FaultRates(dict.fromkeys(Fault, 0.3)), seed=seed, stall_s=0.0)
    injected = transport.injected.faults
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=2, transport=transport) as puller,
    ):
        num_right = 0
        for _ in range(60):
            puller.cache.bytes[:] = 0
            bad_before = injected[Fault.CORRUPT] + injected[Fault.TRUNCATE]
            try:
                await puller.transport.pull(holder.hold(), COPIES)
            except PeerUnavailable:
                continue
            bad = injected[Fault.CORRUPT] + injected[Fault.TRUNCATE]
            assert bool(wrong_blocks(holder, puller)) == (bad > bad_before), f"seed={seed}"
            num_right += bad == bad_before
        assert num_right, f"seed={seed}"
