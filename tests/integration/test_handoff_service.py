"""What a holder answers to whoever asks for KV: tickets, terms, forms, and the early release."""

import asyncio
import contextlib
from dataclasses import replace

import grpc
import pytest

from kvrelay.handoff.desk import TicketDesk
from kvrelay.handoff.holds import HoldState
from kvrelay.handoff.ticket import TICKET_NUM_BYTES, Ticket, sign
from kvrelay.kv import wire
from kvrelay.rpc import convert
from kvrelay.rpc.status import from_grpc
from kvrelay.transfer.digest import block_digest
from kvrelay.types import BlockId
from kvrelay.v1 import handoff_pb2 as pb
from tests.support.builders import prompt
from tests.support.scripted_model import StepGate, expected_tokens
from tests.support.workers import (
    FINGERPRINT,
    LAYOUT,
    PULLER_EPOCH,
    PULLER_ID,
    TICKET_KEY,
    WAIT_S,
    PrefillBench,
    asked,
    handoff_stub,
    new_id,
    prefill_session,
    prefill_submit,
    prefill_worker,
    pull_request,
    until,
)

BFLOAT16 = replace(LAYOUT, head_dim=8, dtype="bfloat16")

RPCS = {
    "Pull": lambda fields: pb.PullRequest(
        fingerprint=convert.fingerprint_to_wire(FINGERPRINT),
        wire_dtype="auto",
        digest_kind="xxh3",
        **fields,
    ),
    "Read": lambda fields: pb.ReadRequest(indexes=[0], **fields),
    "Freeze": lambda fields: pb.FreezeRequest(**fields),
    "Release": lambda fields: pb.ReleaseRequest(generations=[0, 0, 0], **fields),
    "OpenLink": lambda fields: pb.OpenLinkRequest(unique_id=b"u", **fields),
    "Send": lambda fields: pb.SendRequest(link_id="0" * 32, indexes=[0], **fields),
}
STREAMS = ("Pull", "Read")


async def ask(stub, rpc: str, request) -> list:
    """All that comes back, or the error that it ends with."""
    async with asyncio.timeout(WAIT_S):
        if rpc in STREAMS:
            return [message async for message in getattr(stub, rpc)(request)]
        return [await getattr(stub, rpc)(request)]


async def refused(stub, rpc: str, request) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(stub, rpc, request)
    return caught.value.code(), from_grpc(caught.value).reason


class Heard:
    """What a pull has said so far."""

    def __init__(self) -> None:
        self.opened: pb.PullOpened | None = None
        self.blocks: list[pb.HeldBlock] = []
        self.digests: list[int] = []
        self.complete: pb.PullComplete | None = None

    async def hear(self, call, until) -> None:
        async with asyncio.timeout(WAIT_S):
            while not until(self):
                message = await call.read()
                assert message is not grpc.aio.EOF
                if message.HasField("opened"):
                    assert self.opened is None
                    self.opened = message.opened
                if message.HasField("blocks"):
                    assert message.blocks.first_index == len(self.blocks)
                    self.blocks += message.blocks.blocks
                if message.HasField("digests"):
                    assert message.digests.first_index == len(self.digests)
                    self.digests += message.digests.digests
                    assert len(self.digests) <= len(self.blocks)
                if message.HasField("complete"):
                    self.complete = message.complete

    @property
    def generations(self) -> list[int]:
        return [block.generation for block in self.blocks]


@contextlib.asynccontextmanager
async def held(*, layout=LAYOUT, num_tokens: int = 10, **worker):
    """A worker that holds a finished prompt: bench, stub, and the hold's name."""
    async with (
        prefill_worker(layout=layout, **worker) as bench,
        prefill_session(bench) as session,
        handoff_stub(bench) as stub,
    ):
        fields = prefill_submit(prompt(num_tokens))
        await session.submit(**fields)
        await session.one_prefilled()
        yield bench, stub, fields["handoff_id"]


def fingerprint_of(**changes):
    layout = replace(BFLOAT16, **changes)
    return convert.fingerprint_to_wire(replace(FINGERPRINT, layout=layout))


def foreign_tickets(bench: PrefillBench, handoff_id: str) -> dict[str, bytes]:
    """Tickets that are genuine for something else, or for nothing."""
    ours = Ticket(
        handoff_id=handoff_id,
        holder_id=bench.worker_id,
        holder_epoch=bench.epoch,
        puller_id=PULLER_ID,
        puller_epoch=PULLER_EPOCH,
    )
    right = sign(ours, TICKET_KEY)
    return {
        "none": b"",
        "cut": right[:-1],
        "longer": right + b"\0",
        "made up": bytes(TICKET_NUM_BYTES),
        "one bit": bytes([right[0] ^ 1]) + right[1:],
        "another key": sign(ours, bytes(32)),
        "another handoff": sign(replace(ours, handoff_id=new_id()), TICKET_KEY),
        "another holder": sign(replace(ours, holder_id="prefill-2"), TICKET_KEY),
        "the holder before": sign(replace(ours, holder_epoch="0" * 16), TICKET_KEY),
        "another puller": sign(replace(ours, puller_id="decode-2"), TICKET_KEY),
        "the puller before": sign(replace(ours, puller_epoch="0" * 16), TICKET_KEY),
    }


@pytest.mark.parametrize("rpc", RPCS)
@pytest.mark.parametrize("is_held", [False, True])
async def test_a_ticket_that_is_not_genuine_is_refused_before_anything_else(rpc, is_held):
    """By every method, of a hold that stands and of one nobody knows; nothing is remembered."""
    async with held() as (bench, stub, handoff_id):
        handoff_id = handoff_id if is_held else new_id()
        (hold,) = bench.keeper.holds._holds.values()
        for what, ticket in foreign_tickets(bench, handoff_id).items():
            request = RPCS[rpc](asked(bench, handoff_id, ticket=ticket))
            code, reason = await refused(stub, rpc, request)
            assert (code, reason) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "PERMISSION_DENIED",
            ), what

        assert list(bench.keeper.holds._holds.values()) == [hold]
        assert hold.state is HoldState.COMPLETE
        assert (hold.num_pulls, hold.terms) == (0, None)


@pytest.mark.parametrize("rpc", RPCS)
async def test_a_genuine_ticket_is_of_use_to_its_puller_alone(rpc):
    """Whoever shows it under another name, or from another life, is refused."""
    async with held() as (bench, stub, handoff_id):
        right = asked(bench, handoff_id)
        for changes in ({"puller_id": "decode-2"}, {"puller_epoch": "e" * 16}):
            request = RPCS[rpc]({**right, **changes})
            assert (await refused(stub, rpc, request))[0] is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("rpc", RPCS)
async def test_a_holder_that_is_in_no_pool_cannot_tell(rpc):
    """It was given no key yet: whoever asks may come again."""
    async with held() as (bench, stub, handoff_id):
        bench.handoffs._desk = TicketDesk(worker_id=bench.worker_id, epoch=bench.epoch)
        request = RPCS[rpc](asked(bench, handoff_id))
        code, _ = await refused(stub, rpc, request)

    assert code is grpc.StatusCode.UNAVAILABLE


async def test_a_ticket_from_before_the_holder_joined_again_is_genuine_still():
    """Two memberships ago it is not."""
    async with held() as (bench, stub, handoff_id):
        bench.desk.take_key(bytes(32))
        heard = Heard()
        call = stub.Pull(pull_request(bench, handoff_id))
        await heard.hear(call, lambda it: it.complete)
        call.cancel()
        bench.desk.take_key(bytes(32))
        code, _ = await refused(stub, "Pull", pull_request(bench, handoff_id))

    assert code is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("rpc", RPCS)
async def test_another_epoch_or_name_of_the_hold_is_refused(rpc):
    """What is asked of a holder that was restarted, or is no id at all."""
    async with held() as (bench, stub, handoff_id):
        stale = RPCS[rpc](asked(bench, handoff_id, epoch="0" * 16))
        nameless = RPCS[rpc](asked(bench, "x" * 32))
        codes = [(await refused(stub, rpc, each))[0] for each in (stale, nameless)]

    assert codes == [grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT]


@pytest.mark.parametrize("rpc", ["Pull", "Read", "Freeze", "OpenLink", "Send"])
async def test_a_ticket_that_was_used_is_used_up(rpc):
    """Its hold was released: shown again, it finds nothing, and begins nothing."""
    async with held() as (bench, stub, handoff_id):
        heard, call = Heard(), stub.Pull(pull_request(bench, handoff_id))
        await heard.hear(call, lambda it: it.complete)
        release = pb.ReleaseRequest(**asked(bench, handoff_id), generations=heard.generations)
        await stub.Release(release)
        await stub.Release(release)  # said again, it is the same release
        code, reason = await refused(stub, rpc, RPCS[rpc](asked(bench, handoff_id)))

        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "HANDOFF_LOST")
        assert bench.keeper.holds.is_empty
        assert bench.service.load().handoffs_total == 1


@pytest.mark.parametrize("rpc", ["OpenLink", "Send"])
async def test_a_worker_without_such_a_transport_opens_no_link(rpc):
    """Here there is no device to send from."""
    async with held() as (bench, stub, handoff_id):
        heard, call = Heard(), stub.Pull(pull_request(bench, handoff_id))
        await heard.hear(call, lambda it: it.complete)
        code, reason = await refused(stub, rpc, RPCS[rpc](asked(bench, handoff_id)))
        call.cancel()

    assert reason == "INCOMPATIBLE"
    assert code is grpc.StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize(
    ("request_of", "field"),
    [
        (lambda f: pb.SendRequest(link_id="", indexes=[0], **f), "link_id"),
        (lambda f: pb.SendRequest(link_id="g" * 32, indexes=[0], **f), "link_id"),
        (lambda f: pb.SendRequest(link_id="0" * 33, indexes=[0], **f), "link_id"),
        (lambda f: pb.OpenLinkRequest(**f), "unique_id"),
        (lambda f: pb.OpenLinkRequest(unique_id=bytes(257), **f), "unique_id"),
    ],
    ids=["no-link", "not-hex", "long-link", "no-unique-id", "long-unique-id"],
)
async def test_what_cannot_name_a_link_is_refused_by_field(request_of, field):
    """Before any transport sees it."""
    async with held() as (bench, stub, handoff_id):
        request = request_of(asked(bench, handoff_id))
        rpc = type(request).__name__.removesuffix("Request")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(stub, rpc, request)

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_grpc(caught.value).details["field"] == field


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"wire_dtype": "float16"}, "wire_dtype"),
        ({"wire_dtype": ""}, "wire_dtype"),
        ({"digest_kind": "md5"}, "digest_kind"),
        ({"digest_kind": ""}, "digest_kind"),
    ],
)
async def test_a_pull_on_unknown_terms_is_refused_by_field(changes, field):
    """Before anything is made for it."""
    async with prefill_worker() as bench, handoff_stub(bench) as stub:
        request = pull_request(bench, new_id())
        for name, value in changes.items():
            setattr(request, name, value)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(stub, "Pull", request)

        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert from_grpc(caught.value).details["field"] == field
        assert bench.keeper.holds.is_empty


@pytest.mark.parametrize(
    "other", [{"wire_dtype": "int8"}, {"digest_kind": "lanes64"}, {"limit_tokens": 99}]
)
async def test_a_pull_on_other_terms_than_before_is_refused(other):
    """Blocks were packed and digested once; on the same terms it may come as often as it likes."""
    async with held(layout=BFLOAT16) as (bench, stub, handoff_id):
        request = pull_request(bench, handoff_id)
        request.fingerprint.CopyFrom(fingerprint_of())
        heard, call = Heard(), stub.Pull(request)
        await heard.hear(call, lambda it: it.complete)
        call.cancel()
        changed = pb.PullRequest()
        changed.CopyFrom(request)
        for name, value in other.items():
            setattr(changed, name, value)
        code, _ = await refused(stub, "Pull", changed)
        again, call = Heard(), stub.Pull(request)
        await again.hear(call, lambda it: it.complete)
        call.cancel()

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert again.complete == heard.complete
    assert (again.blocks, again.digests) == (heard.blocks, heard.digests)


@pytest.mark.parametrize(
    ("puller_dtype", "asked_dtype", "wire_dtype"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("fp8", "auto", "fp8"),
        ("int8", "auto", "int8"),
        ("bfloat16", "fp8", "fp8"),
        ("bfloat16", "int8", "int8"),
        ("fp8", "bfloat16", "bfloat16"),
    ],
)
async def test_blocks_are_told_where_and_as_they_are_moved(puller_dtype, asked_dtype, wire_dtype):
    """What is announced is what lies there: packed as it must be, digested as it is."""
    async with held(layout=BFLOAT16, num_tokens=9) as (bench, stub, handoff_id):
        request = pull_request(bench, handoff_id)
        request.wire_dtype = asked_dtype
        request.fingerprint.CopyFrom(fingerprint_of(dtype=puller_dtype, block_size=16))
        heard, call = Heard(), stub.Pull(request)
        await heard.hear(call, lambda it: it.complete)
        (hold,) = bench.keeper.holds._holds.values()
        own_blocks = [BlockId(block) for block in hold.block_table]
        layout = convert.layout_from_wire(heard.opened.wire_layout)
        size = layout.block_num_bytes
        moved = [bytes(bench.cache.range_bytes(b.offset_bytes, size)) for b in heard.blocks]
        if layout != BFLOAT16:
            target = bench.staging.landing_offset
            offsets = [target + i * size for i in range(3)]
            wire.pack(bench.cache, own_blocks, layout, offsets)
            wanted = [bytes(bench.cache.range_bytes(offset, size)) for offset in offsets]
        else:
            wanted = [bytes(bench.cache.block_bytes(block)) for block in own_blocks]
        read = pb.ReadRequest(**asked(bench, handoff_id), indexes=[1, 2])
        frames = [frame.data async for frame in stub.Read(read)]
        call.cancel()

    assert layout == replace(BFLOAT16, dtype=wire_dtype)
    assert moved == wanted
    assert frames == wanted[1:]
    assert heard.digests == [block_digest(memoryview(block)) for block in wanted]


async def test_a_release_may_come_before_the_last_digest():
    """A puller that has all bytes asks at once, and is answered when all has been told."""
    gate = StepGate()
    async with (
        prefill_worker(gate=gate) as bench,
        prefill_session(bench) as session,
        handoff_stub(bench) as stub,
    ):
        fields = prefill_submit(prompt(16))
        await session.submit(**fields)
        handoff_id = fields["handoff_id"]
        heard, call = Heard(), stub.Pull(pull_request(bench, handoff_id))
        gate.open()
        await heard.hear(call, lambda it: len(it.blocks) == 4)
        release = pb.ReleaseRequest(**asked(bench, handoff_id), generations=heard.generations)
        await stub.Release(release, timeout=WAIT_S)
        await heard.hear(call, lambda it: it.complete)
        end = await call.read()

        assert end is grpc.aio.EOF  # nothing is said after a release
        assert heard.complete.output_token_ids == [expected_tokens(prompt(16), 1)[0]]
        assert len(heard.digests) == 4
        assert bench.num_held_blocks == 0


async def test_a_release_while_the_prompt_is_computed_is_refused_and_ends_nothing():
    """Nobody can have read it whole; the same puller may still have it."""
    gate = StepGate()
    async with (
        prefill_worker(gate=gate) as bench,
        prefill_session(bench) as session,
        handoff_stub(bench) as stub,
    ):
        fields = prefill_submit(prompt(16))
        await session.submit(**fields)
        handoff_id = fields["handoff_id"]
        heard, call = Heard(), stub.Pull(pull_request(bench, handoff_id))
        gate.let_one_pass()
        await heard.hear(call, lambda it: len(it.blocks) == 2)
        early = pb.ReleaseRequest(**asked(bench, handoff_id), generations=heard.generations)
        code, reason = await refused(stub, "Release", early)
        gate.open()
        await heard.hear(call, lambda it: it.complete)
        whole = pb.ReleaseRequest(**asked(bench, handoff_id), generations=heard.generations)
        await stub.Release(whole, timeout=WAIT_S)
        call.cancel()

    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "HANDOFF_LOST")


async def test_a_freeze_of_a_prompt_stops_nothing():
    """It stops by itself."""
    async with held() as (bench, stub, handoff_id):
        freeze = pb.FreezeRequest(**asked(bench, handoff_id))
        for _ in range(2):
            answer = await stub.Freeze(freeze)
        heard, call = Heard(), stub.Pull(pull_request(bench, handoff_id))
        await heard.hear(call, lambda it: it.complete)
        call.cancel()

        assert answer.header.epoch == bench.epoch
        assert not heard.opened.is_running


async def test_a_finish_while_a_puller_listens_reports_no_loss():
    """The first token was the last: the stream stays silent for its coordinator to end it."""
    gate = StepGate()
    async with (
        prefill_worker(gate=gate) as bench,
        prefill_session(bench) as session,
        handoff_stub(bench) as stub,
    ):
        fields = prefill_submit(prompt(20), max_tokens=1)
        await session.submit(**fields)
        heard, call = Heard(), stub.Pull(pull_request(bench, fields["handoff_id"]))
        gate.let_one_pass()
        await heard.hear(call, lambda it: len(it.blocks) == 2)
        gate.open()
        await session.one_prefilled()
        await until(lambda: bench.engine.is_idle)
        code, _ = await refused(stub, "Read", RPCS["Read"](asked(bench, fields["handoff_id"])))
        still_open = not call.done()
        call.cancel()

    assert code is grpc.StatusCode.NOT_FOUND
    assert still_open
