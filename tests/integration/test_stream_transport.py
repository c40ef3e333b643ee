"""What only `stream` promises: every frame is checked before it is written."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.clock import MonotonicClock
from kvrelay.errors import HandoffLost, KvCorrupt, PeerUnavailable
from kvrelay.kv.layout import KvLayout
from kvrelay.transfer.frames import FRAME_NUM_BYTES, data_of, frames_of
from kvrelay.transfer.stream import StreamTransport
from kvrelay.v1 import handoff_pb2
from tests.support.kv_peer import SMALL, copies_of, open_peer

SIZE = SMALL.block_num_bytes


def frame(index: int, offset: int, num_bytes: int) -> handoff_pb2.ReadResponse:
    return handoff_pb2.ReadResponse(index=index, offset_bytes=offset, data=b"\x55" * num_bytes)


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [frame(3, 0, SIZE)],
        [frame(3, 0, SIZE), frame(4, 0, SIZE // 2)],
        [frame(4, 0, SIZE), frame(3, 0, SIZE)],
        [frame(3, 0, SIZE), frame(3, 0, SIZE)],
        [frame(9, 0, SIZE)],
        [frame(3, 4, SIZE - 4)],
        [frame(3, 0, 8), frame(3, 16, SIZE - 16)],
        [frame(3, 0, 8), frame(3, 4, SIZE - 4)],
        [frame(3, 0, SIZE + 1)],
        [frame(3, 0, 8), frame(3, 8, SIZE)],
        [frame(3, 0, 0)],
        [frame(3, 0, SIZE), frame(4, 0, SIZE), frame(5, 0, SIZE)],
        [frame(3, 0, FRAME_NUM_BYTES + 1)],
        [b"\xff" * 40],
        [frame(3, 0, SIZE).SerializeToString()[:-1]],
    ],
    ids=[
        "none", "one-block-of-two", "cut-in-a-block", "other-order", "repeated", "unasked",
        "starts-late", "gap", "overlap", "too-long", "too-long-in-two", "empty-frame",
        "more-than-asked", "too-large-a-frame", "no-message", "cut-message",
    ],
)  # fmt: skip
async def test_frames_other_than_asked_for_are_corrupt(frames):
    """And no byte is written outside of the targets."""
    async with open_peer("stream") as holder, open_peer("stream", worker_id="d") as puller:
        before = [puller.block(i) for i in range(16)]
        holder.reads.frames = frames
        with pytest.raises(KvCorrupt):
            await puller.transport.pull(holder.hold(), copies_of([(3, 0), (4, 1)]))
        assert [puller.block(i) for i in range(2, 16)] == before[2:]
        holder.reads.frames = None
        await puller.transport.pull(holder.hold(), copies_of([(3, 0), (4, 1)]))
        assert [puller.block(0), puller.block(1)] == [holder.block(3), holder.block(4)]


async def test_frames_of_any_size_are_taken():
    """The holder may cut blocks as it likes."""
    async with open_peer("stream") as holder, open_peer("stream", worker_id="d") as puller:
        holder.reads.frames = [frame(3, i, 1) for i in range(100)] + [frame(3, 100, SIZE - 100)]
        await puller.transport.pull(holder.hold(), copies_of([(3, 0)]))
        assert puller.block(0) == b"\x55" * SIZE


async def test_a_lapsed_hold_is_lost():
    """The holder's NOT_FOUND is `HandoffLost`."""
    async with open_peer("stream") as holder, open_peer("stream", worker_id="d") as puller:
        holder.reads.lapsed = True
        with pytest.raises(HandoffLost):
            await puller.transport.pull(holder.hold(), copies_of([(0, 0)]))


async def test_a_pull_of_more_blocks_than_one_read_may_name_is_split():
    """5000 blocks arrive in two reads."""
    tiny = KvLayout(num_layers=1, block_size=16, num_kv_heads=1, head_dim=1, dtype="bfloat16")
    async with (
        open_peer("stream", layout=tiny, num_blocks=5000) as holder,
        open_peer("stream", layout=tiny, num_blocks=5000, seed=2, worker_id="d") as puller,
    ):
        await puller.transport.pull(
            holder.hold(), copies_of([(i, 4999 - i) for i in range(5000)], tiny)
        )
        assert all(puller.block(4999 - i) == holder.block(i) for i in range(5000))


async def test_idle_channels_are_bounded():
    """A puller that met many holders keeps connections to the last few."""
    transport = StreamTransport(worker_id="d", epoch="e", clock=MonotonicClock(), max_channels=1)
    async with (
        open_peer("stream", worker_id="a", seed=1) as a,
        open_peer("stream", worker_id="b", seed=2) as b,
        open_peer("stream", transport=transport) as puller,
    ):
        for holder in (a, b, a, b):
            await puller.transport.pull(holder.hold(), copies_of([(1, 1)]))
            assert puller.block(1) == holder.block(1)


async def test_a_server_that_stops_midway_is_unavailable():
    """Not a cancellation, though gRPC may call it one."""
    async with open_peer("stream", worker_id="d") as puller:
        async with open_peer("stream") as holder:
            holder.reads.stall_at = 1
            pulling = asyncio.create_task(
                puller.transport.pull(holder.hold(), copies_of([(0, 0), (1, 1)]))
            )
            await holder.reads.stalled.wait()
        with pytest.raises(PeerUnavailable):
            await pulling


@given(st.integers(0, 1 << 32), st.integers(0, 3), st.integers(0, 3), st.integers(1, 40))
def test_frames_are_the_messages_that_protobuf_writes(index, num_frames, cut, num_bytes):
    """Byte for byte, so nobody can tell how they were made; and each is known by what is due."""
    index &= (1 << 32) - 1
    block = memoryview(bytes(range(256)) * (num_frames << 12) + b"z" * (num_bytes << cut))
    offset = 0
    for sent in frames_of(index, block):
        due = block[offset : offset + FRAME_NUM_BYTES]
        message = handoff_pb2.ReadResponse(index=index, offset_bytes=offset, data=bytes(due))
        assert sent == message.SerializeToString()
        left = len(block) - offset
        assert data_of(sent, index=index, offset=offset, left_num_bytes=left) == due
        for other in ((index + 1, offset, left), (index, offset + 1, left), (index, offset, 1)):
            is_due = other == (index, offset, left)
            found = data_of(sent, index=other[0], offset=other[1], left_num_bytes=other[2])
            assert (found is not None) == is_due
        offset += len(due)
    assert offset == len(block)
