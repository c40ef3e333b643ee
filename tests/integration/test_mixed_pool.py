"""Workers that differ, and what the coordinator tells of them: dtypes, tickets, transports."""

import asyncio
import contextlib
import dataclasses

from structlog.testing import capture_logs

from coordinator.request import GenerateSpec, TokenPrompt
from kvrelay.handoff.ticket import KEY_NUM_BYTES, Ticket, is_genuine
from kvrelay.types import LinkSpeed, Role, WorkerLoad
from tests.support.members import EPOCH, FINGERPRINT, LAYOUT
from tests.support.scripted_coordinator import scripted_coordinator
from tests.support.scripted_workers import ScriptedWorker

SPEC = GenerateSpec(prompt=TokenPrompt((5, 6, 7, 8, 9)), max_tokens=3, temperature=0.0)


def worker(name, role=Role.DECODE, **layout):
    changed = dataclasses.replace(LAYOUT, **({"dtype": "bfloat16"} | layout))
    fingerprint = dataclasses.replace(FINGERPRINT, layout=changed)
    return ScriptedWorker(name, role, fingerprint=fingerprint)


@contextlib.asynccontextmanager
async def deployment(*workers):
    async with contextlib.AsyncExitStack() as stack:
        for each in workers:
            await stack.enter_async_context(each)
        deployed = await stack.enter_async_context(scripted_coordinator())
        await deployed.join(*workers)
        yield deployed


async def until(condition):
    """Let the loop run until `condition()`."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.001)


async def generate(deployed):
    async with contextlib.aclosing(deployed.relay.generate(SPEC)) as events:
        return [event async for event in events]


async def test_a_pool_that_comes_to_mix_kv_dtypes_says_so_once():
    """
    With what it promises less; block sizes may differ without a word.
    """
    with capture_logs() as logs:
        workers = (
            worker("p0", Role.PREFILL, block_size=16),
            worker("d0"),
            worker("d1", dtype="int8", block_size=8),
            worker("d2", dtype="fp8"),
        )
        async with deployment(*workers) as deployed:
            assert deployed.pool.block_size == 4
            assert {m.kv_dtype for m in deployed.pool.members()} == {"bfloat16", "int8", "fp8"}

    (said,) = [log for log in logs if log["event"] == "pool.mixes_kv_dtypes"]
    assert len(said["kv_dtypes"].split(", ")) > 1  # whoever came first
    assert "tokens depend on which workers serve" in said["promise"]


async def test_the_canary_compares_only_what_must_be_equal():
    """
    Workers that keep KV in another dtype may answer otherwise; those of one dtype may not.
    """
    other, third = worker("d1", dtype="int8"), worker("d2", dtype="int8")
    other.token_offset = 1
    async with third, deployment(worker("p0", Role.PREFILL), worker("d0"), other) as deployed:
        running = asyncio.create_task(deployed.canary.run())
        await until(lambda: deployed.canary.is_ready)
        await deployed.join(third)
        await until(lambda: not deployed.canary.is_ready)

        assert "different tokens" in deployed.canary.not_ready_reason
        running.cancel()


async def test_a_decode_worker_gets_a_ticket_for_exactly_its_handoff():
    """
    Signed with the holder's key, which the decode worker never sees.
    """
    prefill, decode = worker("p0", Role.PREFILL), worker("d0")
    async with deployment(prefill, decode) as deployed:
        await generate(deployed)
        (holder, _) = deployed.pool.members()

    (submit,) = decode.submits
    ticket = Ticket(
        handoff_id=prefill.submits[0].handoff_id,
        holder_id="p0",
        holder_epoch=EPOCH,
        puller_id="d0",
        puller_epoch=EPOCH,
    )
    assert len(holder.ticket_key) == KEY_NUM_BYTES
    assert is_genuine(ticket, submit.pull.ticket, holder.ticket_key)
    assert submit.pull.ticket not in prefill.submits[0].SerializeToString()


async def test_the_transport_of_a_pair_is_told_when_it_is_first_taken():
    """
    Which, how fast, and why no other; not again while it stays the same.
    """
    decode = worker("d0")
    speed = LinkSpeed(holder_id="p0", transport="stream", bytes_per_s=2.5e9)
    decode.load = WorkerLoad(free_blocks=64, links=(speed,))
    with capture_logs() as logs:
        async with deployment(worker("p0", Role.PREFILL), decode) as deployed:
            await generate(deployed)
            finished = (await generate(deployed))[-1]

    (said,) = [log for log in logs if log["event"] == "pool.transport"]
    assert (said["holder"], said["puller"], said["name"]) == ("p0", "d0", "stream")
    assert said["why"].startswith("stream at 2.5 GB/s; not cuda_ipc: ")
    assert finished.ledger.route_reason.endswith("uncached tokens, stream at 2.5 GB/s")
