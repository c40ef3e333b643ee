"""The bytes of a `ReadResponse`, without making one.

A message object costs two copies of every frame on either side, which is as much as everything
else that gRPC does with it. So a holder writes frames as protobuf would (index, offset and data, in
the order of their numbers, zeros left out), copying each byte once, and a puller, which knows what
is due, compares the few bytes before the data with those it would have written itself. Whatever
else a peer may send is for protobuf to read.
"""

from collections.abc import Iterator

FRAME_NUM_BYTES = 1 << 20
"""Most bytes of KV in one frame."""

_INDEX, _OFFSET, _DATA = 0x08, 0x10, 0x1A  # field numbers 1 and 2 as varints, 3 as bytes


def frames_of(index: int, block: memoryview) -> Iterator[bytes]:
    """A block as messages of at most `FRAME_NUM_BYTES` of it, each byte copied once."""
    for offset in range(0, len(block), FRAME_NUM_BYTES):
        data = block[offset : offset + FRAME_NUM_BYTES]
        yield b"".join((_head(index, offset, len(data)), data))


def data_of(frame: bytes, *, index: int, offset: int, left_num_bytes: int) -> memoryview | None:
    """The data of `frame` if it is the one that `frames_of` makes of what is due, else None.

    `left_num_bytes` are to come of the block, from `offset` on.
    """
    num_bytes = min(left_num_bytes, FRAME_NUM_BYTES)
    head = _head(index, offset, num_bytes)
    if len(frame) != len(head) + num_bytes or not frame.startswith(head):
        return None
    return memoryview(frame)[len(head) :]


def _head(index: int, offset: int, num_bytes: int) -> bytes:
    head = bytearray()
    for tag, value in ((_INDEX, index), (_OFFSET, offset)):
        if value:
            head.append(tag)
            head += _varint(value)
    head.append(_DATA)
    return bytes(head + _varint(num_bytes))


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
