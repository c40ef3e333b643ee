"""What ties landed bytes to the tokens they were computed from.

A block digest finds corruption and is cheap enough to take of every block on both sides. The
handoff digest binds all of them, in order, to one request's tokens, so that the right bytes of
the wrong prompt are refused too. Neither is a defence against a peer that lies: peers are
authenticated.
"""

import hashlib
import struct
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
import xxhash

if TYPE_CHECKING:
    from kvrelay.kv.cache import KvCache

HANDOFF_DIGEST_NUM_BYTES = 16

_PERSON = b"kvrelay-handoff2"


class DigestKind(Enum):
    """How a block's bytes become 64 bits. The puller chooses, by where its bytes land."""

    XXH3 = "xxh3"
    """For bytes in host memory."""

    LANES64 = "lanes64"
    """For bytes that land on a device, which computes it as fast as it reads."""


def block_digest(view: memoryview) -> int:
    """64 bits of a block's bytes, as XXH3. Lets other threads run meanwhile."""
    return xxhash.xxh3_64_intdigest(view)


class BlockDigest:
    """`block_digest` of bytes that come in pieces."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()

    def update(self, piece: memoryview) -> None:
        self._state.update(piece)

    @property
    def value(self) -> int:
        digest: int = self._state.intdigest()
        return digest


def range_digests(
    cache: "KvCache", ranges: Sequence[tuple[int, int]], kind: DigestKind
) -> list[int]:
    """Of (offset, number of bytes) in the memory of `cache` now. For a thread: it reads all."""
    if kind is DigestKind.LANES64:
        return cache.lanes64(ranges)
    return [block_digest(cache.range_bytes(offset, num_bytes)) for offset, num_bytes in ranges]


def handoff_digest(
    *,
    handoff_id: str,
    num_tokens: int,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    block_digests: Sequence[int],
) -> bytes:
    """BLAKE2b-128 over everything that must be equal on both sides of a handoff.

    Every part of variable length is preceded by its length, so no two different handoffs
    are written as the same bytes. Little-endian.
    """
    name = handoff_id.encode()
    state = hashlib.blake2b(digest_size=HANDOFF_DIGEST_NUM_BYTES, person=_PERSON)
    state.update(struct.pack("<Q", len(name)) + name)
    state.update(struct.pack("<Q", num_tokens))
    for ids in (prompt_ids, output_ids):
        state.update(struct.pack("<Q", len(ids)) + np.asarray(ids, "<u4").tobytes())
    state.update(struct.pack("<Q", len(block_digests)) + np.asarray(block_digests, "<u8").tobytes())
    return state.digest()
