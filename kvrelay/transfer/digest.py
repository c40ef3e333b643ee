"""What ties landed bytes to the prompt they were computed from.

A block digest finds corruption and is cheap enough to take of every block on both sides. The
handoff digest binds all of them, in order, to one prompt, so that the right bytes of the wrong
prompt are refused too. Neither is a defence against a peer that lies: peers are authenticated.
"""

import hashlib
import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from kvrelay.types import BlockId

if TYPE_CHECKING:
    from kvrelay.kv.cache import KvCache

HANDOFF_DIGEST_NUM_BYTES = 16

_PERSON = b"kvrelay-handoff1"


def block_digest(view: memoryview) -> int:
    """64 bits of a block's bytes. Lets other threads run meanwhile."""
    return xxhash.xxh3_64_intdigest(view)


def block_digests(cache: "KvCache", blocks: Iterable[BlockId]) -> list[int]:
    """Of blocks as they lie in `cache` now. For a thread: it reads every byte."""
    return [block_digest(cache.block_bytes(block)) for block in blocks]


def handoff_digest(
    *,
    handoff_id: str,
    num_tokens: int,
    first_token_id: int,
    prompt_ids: Sequence[int],
    block_digests: Sequence[int],
) -> bytes:
    """BLAKE2b-128 over everything that must be equal on both sides of a handoff.

    Every part of variable length is preceded by its length, so no two different handoffs
    are written as the same bytes. Little-endian.
    """
    name = handoff_id.encode()
    state = hashlib.blake2b(digest_size=HANDOFF_DIGEST_NUM_BYTES, person=_PERSON)
    state.update(struct.pack("<Q", len(name)) + name)
    state.update(struct.pack("<QQ", num_tokens, first_token_id))
    state.update(struct.pack("<Q", len(prompt_ids)) + np.asarray(prompt_ids, "<u4").tobytes())
    state.update(struct.pack("<Q", len(block_digests)) + np.asarray(block_digests, "<u8").tobytes())
    return state.digest()
