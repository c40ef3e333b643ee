"""Which blocks hold which prompt tokens: full blocks, found again by their content.

A block's key names its own tokens and, through its parent's hash, every token before
them, because KV depends on the whole prefix. Only full blocks of *prompt* tokens are
indexed. Generated tokens are computed by the generation path, whose numbers differ
from the prompt path's; KV of theirs in the index would one day serve somebody's prompt
and change that request's tokens with the luck of the cache.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvrelay.types import BlockId

HASH_NUM_BYTES = 32


@dataclass(frozen=True, slots=True)
class BlockKey:
    """The content of one full block. Equal keys mean equal tokens, not just equal hashes."""

    hash: bytes
    parent_hash: bytes
    token_ids: tuple[int, ...]


def block_hashes(
    token_ids: Sequence[int], block_size: int, *, key: bytes, salt: bytes
) -> list[bytes]:
    """One hash per full block of `token_ids`, each covering everything before it.

    `key` is a secret of at most 64 bytes, so that nobody outside can aim for a collision.
    Tokens under different salts never share a hash.
    """
    pack = struct.Struct(f"<{block_size}I").pack
    hashes: list[bytes] = []
    parent = bytes(HASH_NUM_BYTES)
    for end in range(block_size, len(token_ids) + 1, block_size):
        content = parent + pack(*token_ids[end - block_size : end]) + salt
        parent = hashlib.blake2b(content, key=key, digest_size=HASH_NUM_BYTES).digest()
        hashes.append(parent)
    return hashes


class PrefixIndex:
    """A map from content to block, and back.

    It knows nothing of who uses a block: the pool asks it whether a block is worth
    keeping, and tells it when one is evicted. One block per content; the first stays.
    """

    def __init__(self, *, block_size: int, key: bytes) -> None:
        assert block_size > 0, block_size
        self.block_size = block_size
        self._secret = key
        self._blocks: dict[bytes, tuple[BlockKey, BlockId]] = {}
        self._hashes: dict[BlockId, bytes] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._hashes

    def keys(self, prompt_ids: tuple[int, ...], salt: bytes) -> tuple[BlockKey, ...]:
        """The keys of the full blocks of a prompt, in order. Hashes every token: keep them."""
        size = self.block_size
        hashes = block_hashes(prompt_ids, size, key=self._secret, salt=salt)
        parents = [bytes(HASH_NUM_BYTES), *hashes]
        return tuple(
            BlockKey(digest, parents[i], prompt_ids[i * size : (i + 1) * size])
            for i, digest in enumerate(hashes)
        )

    def match(self, keys: Sequence[BlockKey]) -> list[BlockId]:
        """Blocks holding the longest indexed prefix of `keys`."""
        blocks: list[BlockId] = []
        for key in keys:
            found = self._blocks.get(key.hash)
            if found is None or found[0] != key:
                break
            blocks.append(found[1])
        return blocks

    def insert(self, key: BlockKey, block: BlockId) -> bool:
        """Offer `block` as the holder of `key`; False if another block already is."""
        assert len(key.token_ids) == self.block_size, len(key.token_ids)
        if key.hash in self._blocks:
            return False
        assert block not in self._hashes, block
        self._blocks[key.hash] = (key, block)
        self._hashes[block] = key.hash
        return True

    def forget(self, block: BlockId) -> None:
        """The content of an indexed block is gone."""
        del self._blocks[self._hashes.pop(block)]

    def check(self) -> None:
        """Prove that both directions of the map agree."""
        assert len(self._blocks) == len(self._hashes)
        assert all(self._hashes[block] == digest for digest, (_, block) in self._blocks.items())
