"""An intake, driven event by event. No sockets, no engine, no bytes."""

import pytest

from decode_svc.intake import Completion, Intake, IntakeState, SourceBlock
from kvrelay.engine.request import Granted
from kvrelay.errors import HandoffLost, KvCorrupt
from kvrelay.types import BlockId

NUM_TOKENS, NUM_BLOCKS = 10, 3
LAST = Completion(first_token_id=5, num_tokens=NUM_TOKENS, digest=b"whole")


def intake(*, max_batch: int = 8, is_opened: bool = True) -> Intake:
    made = Intake("h", num_tokens=NUM_TOKENS, num_blocks=NUM_BLOCKS, max_batch=max_batch)
    if is_opened:
        made.opened(NUM_TOKENS, NUM_BLOCKS)
    return made


def blocks(*indexes: int) -> list[SourceBlock]:
    return [SourceBlock(BlockId(100 + i), i, 1000 + i) for i in indexes]


def grant(*, num_cached: int = 0) -> Granted:
    table = tuple(BlockId(i) for i in range(NUM_BLOCKS))
    return Granted(seq_id="s", block_table=table, num_cached_blocks=num_cached)


def land_all(made: Intake) -> None:
    while batch := made.next_batch():
        made.landed(batch)
        made.verify(batch, [1000 + copy.index for copy in batch])


def test_its_states_follow_each_other():
    """From the first announcement to the join, in the order of the class."""
    made = intake(is_opened=False)
    seen = [made.state]

    made.opened(NUM_TOKENS, NUM_BLOCKS)
    made.announce(0, blocks(0, 1))
    seen.append(made.state)
    made.granted(grant())
    seen.append(made.state)
    made.announce(2, blocks(2))
    made.complete(LAST)
    seen.append(made.state)
    land_all(made)
    seen.append(made.state)
    made.verify_handoff(b"whole")
    seen.append(made.state)
    made.joined()
    seen.append(made.state)

    assert seen == list(IntakeState)[:7]


def test_blocks_are_wanted_only_once_there_are_bytes():
    """Opening reserves nothing; the first announcement asks for room, the grant ends that."""
    made = intake()
    before = made.wants_grant
    made.announce(0, blocks(0))
    there_are_bytes = made.wants_grant
    made.granted(grant())

    assert (before, there_are_bytes, made.wants_grant) == (False, True, False)


def test_each_announced_block_is_given_out_once_in_batches():
    """Never more than the limit, never twice, never unannounced."""
    made = intake(max_batch=1)
    made.granted(grant())
    nothing_yet = made.next_batch()
    made.announce(0, blocks(0, 1))

    given = [[copy.index for copy in made.next_batch()] for _ in range(3)]

    assert nothing_yet == ()
    assert given == [[0], [1], []]


def test_a_copy_goes_from_the_announced_block_to_the_granted_one():
    """Source, generation and target belong to the same index."""
    made = intake()
    made.announce(0, blocks(0, 1))
    made.granted(grant(num_cached=1))
    (copy,) = made.next_batch()

    assert (copy.index, copy.source, copy.source_generation, copy.target) == (1, 101, 1, 1)


@pytest.mark.parametrize("num_cached", [0, 1, 2, 3])
def test_cached_blocks_are_not_fetched(num_cached):
    """All others are, and then everything has landed."""
    made = intake()
    made.announce(0, blocks(0, 1, 2))
    made.complete(LAST)
    made.granted(grant(num_cached=num_cached))
    land_all(made)

    assert made.num_landed == NUM_BLOCKS - num_cached
    assert made.state is IntakeState.VERIFYING


def test_a_wrong_digest_is_corrupt_and_never_verified():
    """One wrong block of a batch is enough."""
    made = intake()
    made.announce(0, blocks(0, 1, 2))
    made.complete(LAST)
    made.granted(grant())
    batch = made.next_batch()
    made.landed(batch)

    with pytest.raises(KvCorrupt):
        made.verify(batch, [1000, 1001, 0])
    assert made.state is IntakeState.VERIFYING


def test_the_right_blocks_of_another_prompt_are_corrupt():
    """What binds the bytes to the prompt must be what we computed ourselves."""
    made = intake()
    made.announce(0, blocks(0, 1, 2))
    made.complete(LAST)
    made.granted(grant())
    land_all(made)

    with pytest.raises(KvCorrupt):
        made.verify_handoff(b"other")
    with pytest.raises(AssertionError):
        made.joined()


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(9, 3), (10, 4)])
def test_another_size_than_our_prompts_is_corrupt(num_tokens, num_blocks):
    """Refused before a byte is fetched."""
    with pytest.raises(KvCorrupt):
        intake(is_opened=False).opened(num_tokens, num_blocks)


def test_a_holder_that_breaks_the_grammar_is_not_believed():
    """Gaps, repeats, empty runs, too many blocks, anything before `opened` or after `complete`."""
    with pytest.raises(KvCorrupt):
        intake(is_opened=False).announce(0, blocks(0))
    made = intake()
    with pytest.raises(KvCorrupt):
        made.opened(NUM_TOKENS, NUM_BLOCKS)
    for first, run in ((1, blocks(1)), (0, []), (0, blocks(0, 1, 2, 3))):
        with pytest.raises(KvCorrupt):
            made.announce(first, run)
    made.announce(0, blocks(0, 1))
    with pytest.raises(KvCorrupt):
        made.announce(0, blocks(0))
    with pytest.raises(KvCorrupt):
        made.complete(LAST)
    made.announce(2, blocks(2))
    with pytest.raises(KvCorrupt):
        made.complete(Completion(5, 9, b"whole"))
    made.complete(LAST)
    with pytest.raises(KvCorrupt):
        made.complete(LAST)


def test_a_stream_that_ends_early_is_a_lost_handoff():
    """An end without `complete` is no completion."""
    made = intake()
    made.announce(0, blocks(0))

    with pytest.raises(HandoffLost):
        made.require_complete()


def test_a_failed_intake_gives_nothing_out():
    """Whatever is announced or granted later."""
    made = intake()
    made.announce(0, blocks(0))
    made.failed()
    made.granted(grant())

    assert made.next_batch() == ()
    assert not made.wants_grant
    assert made.state is IntakeState.FAILED
