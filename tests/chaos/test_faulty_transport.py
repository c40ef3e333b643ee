"""Injected faults: each does what it says, by seed, and the digest finds what it did to bytes."""

import asyncio
import random

import pytest

from kvrelay.errors import PeerUnavailable
from kvrelay.transfer.digest import block_digest
from kvrelay.transfer.faulty import Fault, FaultPlan, FaultRates, FaultScript, FaultyTransport
from tests.support.kv_peer import Peer, copies_of, make_transport, open_peer

COPIES = copies_of([(i, 15 - i) for i in range(12)])


def faulty(plan: FaultPlan, *, seed: int = 0) -> FaultyTransport:
    inner = make_transport("shm", worker_id="decode-0", epoch="e9")
    return FaultyTransport(inner, plan=plan, seed=seed, delay_s=0.0)


def always(*faults: Fault) -> FaultRates:
    return FaultRates(dict.fromkeys(faults, 1.0))


def wrong_blocks(holder: Peer, puller: Peer) -> list[int]:
    """Indexes whose digest is not the holder's, as a puller finds them."""
    return [
        copy.index
        for copy in COPIES
        if block_digest(puller.cache.block_bytes(copy.target))
        != block_digest(holder.cache.block_bytes(copy.source))
    ]


async def pulled(plan: FaultPlan, *, seed: int = 0) -> list[int]:
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=2, transport=faulty(plan, seed=seed)) as puller,
    ):
        stats = await puller.transport.pull(holder.hold(), COPIES)
        assert stats.num_bytes == len(COPIES) * holder.cache.layout.block_num_bytes
        return wrong_blocks(holder, puller)


async def test_without_faults_every_block_is_right():
    """The wrapper itself changes nothing."""
    assert await pulled(FaultRates({})) == []


async def test_delayed_or_repeated_bytes_are_right():
    """These faults cost time only."""
    assert await pulled(always(Fault.DELAY, Fault.DUPLICATE)) == []


@pytest.mark.parametrize("seed", range(8))
async def test_corruption_is_found_in_one_block(seed):
    """Flipped bits of one block, named by its digest."""
    assert len(await pulled(always(Fault.CORRUPT), seed=seed)) == 1, f"seed={seed}"


@pytest.mark.parametrize("seed", range(8))
async def test_truncation_is_found_at_the_tail(seed):
    """The last blocks are wrong, at least one, and all before them right."""
    wrong = await pulled(always(Fault.TRUNCATE), seed=seed)
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


async def test_a_script_strikes_the_pull_it_names():
    """So a test can fail the first, then the second, until it passes untouched."""
    for struck in range(4):
        transport = faulty(FaultScript({struck: frozenset({Fault.DROP})}))
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
        assert transport.injected == {Fault.DROP: 1}


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
    transport = faulty(FaultRates(dict.fromkeys(Fault, 0.3)), seed=seed)
    async with (
        open_peer("shm", seed=1) as holder,
        open_peer("shm", seed=2, transport=transport) as puller,
    ):
        num_right = 0
        for _ in range(60):
            puller.cache.tensor.zero_()
            bad_before = transport.injected[Fault.CORRUPT] + transport.injected[Fault.TRUNCATE]
            try:
                await puller.transport.pull(holder.hold(), COPIES)
            except PeerUnavailable:
                continue
            bad = transport.injected[Fault.CORRUPT] + transport.injected[Fault.TRUNCATE]
            assert bool(wrong_blocks(holder, puller)) == (bad > bad_before), f"seed={seed}"
            num_right += bad == bad_before
        assert num_right, f"seed={seed}"
