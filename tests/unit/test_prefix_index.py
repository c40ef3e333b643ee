"""The prefix index: full blocks of prompt tokens, found by content."""

from dataclasses import replace

from kvrelay.kv.prefix_index import PrefixIndex, block_hashes
from kvrelay.types import BlockId
from tests.support.builders import SECRET, index, prompt

FOUR_BLOCKS = prompt(16)


def _indexed(token_ids: tuple[int, ...], *, salt: bytes = b"") -> PrefixIndex:
    known = index(block_size=4)
    for i, key in enumerate(known.keys(token_ids, salt)):
        assert known.insert(key, BlockId(i))
    return known


def test_a_prompt_matches_itself_block_by_block():
    """
    Every full block comes back, in order; a partial last block has no key.
    """
    known = _indexed(FOUR_BLOCKS)

    assert known.match(known.keys((*FOUR_BLOCKS, 5, 6), b"")) == [0, 1, 2, 3]
    known.check()


def test_a_match_ends_at_the_first_different_token():
    """
    Blocks after a difference hold the same tokens but other KV, and do not match.
    """
    known = _indexed(FOUR_BLOCKS)
    other = (*FOUR_BLOCKS[:5], 996, *FOUR_BLOCKS[6:])

    assert known.match(known.keys(other, b"")) == [0]


def test_a_match_ends_where_a_block_was_forgotten():
    """
    A chain with a hole is no prefix.
    """
    known = _indexed(FOUR_BLOCKS)
    known.forget(BlockId(1))

    assert known.match(known.keys(FOUR_BLOCKS, b"")) == [0]
    assert BlockId(1) not in known
    known.check()


def test_other_salts_never_match():
    """
    Equal prompts under different salts share nothing.
    """
    known = _indexed(FOUR_BLOCKS, salt=b"one")

    assert known.match(known.keys(FOUR_BLOCKS, b"two")) == []
    assert len(known.match(known.keys(FOUR_BLOCKS, b"one"))) == 4


def test_equal_hashes_with_other_tokens_do_not_match():
    """
    Token ids are compared on a hit, so a collision costs a prefill and not a wrong answer.
    """
    known = _indexed(FOUR_BLOCKS)
    first = known.keys(FOUR_BLOCKS, b"")[0]

    assert known.match([replace(first, token_ids=(9, 9, 9, 9))]) == []


def test_the_first_block_of_a_content_stays():
    """
    A second block with the same content is refused and remains unknown.
    """
    known = _indexed(FOUR_BLOCKS)
    first = known.keys(FOUR_BLOCKS, b"")[0]

    assert not known.insert(first, BlockId(9))
    assert BlockId(9) not in known
    known.check()


def test_hashes_need_the_key_and_cover_the_whole_prefix():
    """
    Hashes change with the secret, and with any token before the block.
    """
    hashes = block_hashes(FOUR_BLOCKS, 4, key=SECRET, salt=b"")
    changed = block_hashes((996, *FOUR_BLOCKS[1:]), 4, key=SECRET, salt=b"")

    assert hashes == [key.hash for key in index(block_size=4).keys(FOUR_BLOCKS, b"")]
    assert len(set(hashes)) == 4
    assert not set(hashes) & set(changed)
    assert not set(hashes) & set(block_hashes(FOUR_BLOCKS, 4, key=b"other", salt=b""))
    assert block_hashes(FOUR_BLOCKS[:3], 4, key=SECRET, salt=b"") == []
