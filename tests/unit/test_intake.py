"""An intake, driven event by event. No sockets, no engine, no bytes."""

from dataclasses import replace

import pytest

from decode_svc.intake import (
    Completion,
    DigestRun,
    Expected,
    Intake,
    IntakeState,
    Opened,
    SourceBlock,
    SourceRun,
)
from kvrelay.engine.request import Granted
from kvrelay.errors import HandoffLost, Incompatible, KvCorrupt
from kvrelay.kv.layout import KvLayout
from kvrelay.types import BlockId

NUM_TOKENS, NUM_BLOCKS = 10, 3
OWN = KvLayout(num_layers=2, block_size=4, num_kv_heads=1, head_dim=8, dtype="bfloat16")
SIZE = OWN.block_num_bytes
LAST = Completion(output_ids=(5,), num_tokens=NUM_TOKENS, digest=b"whole")
OPENED = Opened(NUM_TOKENS, NUM_BLOCKS, OWN, is_running=False)
PROMPT = Expected(
    num_prompt=NUM_TOKENS,
    emitted_ids=(),
    is_running=False,
    limit_tokens=0,
    layout=OWN,
    wire_dtype="auto",
)
RUNNING = replace(PROMPT, emitted_ids=(1, 2), is_running=True, limit_tokens=19)


def intake(
    expected: Expected = PROMPT, *, max_batch: int = 8, opened: Opened | None = OPENED
) -> Intake:
    made = Intake("h", expected, max_batch_bytes=max_batch * SIZE)
    if opened is not None:
        made.opened(opened)
    return made


def blocks(*indexes: int) -> list[SourceBlock]:
    return [SourceBlock(BlockId(100 + i), i, 100 * SIZE + i) for i in indexes]


def digests(*indexes: int) -> list[int]:
    return [1000 + i for i in indexes]


def grant(*, num_cached: int = 0, num_blocks: int = NUM_BLOCKS) -> Granted:
    table = tuple(BlockId(i) for i in range(num_blocks))
    return Granted(seq_id="s", block_table=table, num_cached_blocks=num_cached)


def land_all(made: Intake) -> None:
    while batch := made.next_batch():
        made.landed(batch)
        made.measured(batch, digests(*batch))


def whole(made: Intake, *indexes: int, last: Completion = LAST) -> None:
    """All that a holder says after it opened."""
    made.announce(0, blocks(*indexes))
    made.digested(0, digests(*indexes))
    made.complete(last)


def test_its_states_follow_each_other():
    """From the first announcement to the join, in the order of the class."""
    made = intake(opened=None)
    seen = [made.state]

    made.heard(OPENED)
    made.heard(SourceRun(0, tuple(blocks(0, 1))))
    seen.append(made.state)
    made.granted(grant())
    seen.append(made.state)
    made.heard(SourceRun(2, tuple(blocks(2))))
    seen.append(made.state)
    land_all(made)
    seen.append(made.state)
    made.heard(DigestRun(0, tuple(digests(0, 1, 2))))
    made.heard(LAST)
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
    made.announce(0, blocks(0, 1))
    nothing_yet = made.next_batch()
    made.granted(grant())

    assert nothing_yet == ()
    assert [made.next_batch() for _ in range(3)] == [(0,), (1,), ()]


def test_a_batch_has_at_least_one_block():
    """However small a batch is meant to be."""
    made = Intake("h", PROMPT, max_batch_bytes=1)
    made.opened(OPENED)
    made.announce(0, blocks(0, 1))
    made.granted(grant())

    assert made.next_batch() == (0,)


@pytest.mark.parametrize("num_cached", [0, 1, 2])
def test_cached_blocks_are_not_fetched(num_cached):
    """All others are, and then everything has landed."""
    made = intake()
    whole(made, 0, 1, 2)
    made.granted(grant(num_cached=num_cached))
    land_all(made)

    assert made.num_landed == NUM_BLOCKS - num_cached
    assert made.num_landed_bytes == made.num_landed * SIZE
    assert made.first_token == num_cached * 4
    assert made.state is IntakeState.LANDED
    made.verify_handoff(b"whole")
    assert made.state is IntakeState.VERIFIED


@pytest.mark.parametrize("wire_size", [2, 4, 8, 16])
def test_a_prompt_that_is_cached_whole_fetches_nothing(wire_size):
    """Not even the block that its end shares with nobody, in whatever size blocks come."""
    wire = replace(OWN, block_size=wire_size)
    expected, opened = replace(PROMPT, num_prompt=8), Opened(8, wire.num_blocks_for(8), wire, False)
    made = intake(expected, opened=opened)
    all_of_it = range(opened.num_blocks)
    whole(made, *all_of_it, last=replace(LAST, num_tokens=8))
    made.granted(grant(num_cached=2, num_blocks=2))

    assert made.next_batch() == ()
    assert made.state is IntakeState.LANDED
    made.verify_handoff(b"whole")
    assert made.state is IntakeState.VERIFIED
    assert len(made.generations) == opened.num_blocks


@pytest.mark.parametrize(
    ("own_size", "wire_size", "num_cached", "fetched"),
    [
        (4, 8, 1, (0, 1, 2)),  # the first wire block has tokens that are cached, and others
        (4, 8, 2, (1, 2)),
        (4, 8, 3, (1, 2)),
        (8, 4, 1, (2, 3, 4)),
        (8, 4, 2, (4,)),
        (4, 16, 4, (1,)),
        (4, 16, 3, (0, 1)),
        (16, 4, 1, (4,)),
    ],
)
def test_a_partly_cached_prompt_of_other_block_size(own_size, wire_size, num_cached, fetched):
    """Every wire block with a token that is missing is fetched, and no other."""
    num_tokens = 18
    own, wire = replace(OWN, block_size=own_size), replace(OWN, block_size=wire_size)
    expected = replace(PROMPT, num_prompt=num_tokens, layout=own)
    num_blocks = wire.num_blocks_for(num_tokens)
    made = intake(expected, opened=Opened(num_tokens, num_blocks, wire, False))
    assert not made.is_as_kept
    made.announce(0, blocks(*range(num_blocks)))
    made.granted(grant(num_cached=num_cached, num_blocks=own.num_blocks_for(num_tokens)))

    assert made.first_token == num_cached * own_size
    assert made.next_batch() == fetched


def test_digests_may_come_before_or_after_their_blocks_have_landed():
    """Each is compared once both are there, in whatever order."""
    made = intake()
    made.announce(0, blocks(0, 1, 2))
    made.granted(grant())
    made.digested(0, digests(0))
    batch = made.next_batch()
    made.landed(batch)
    made.measured(batch, digests(*batch))
    made.digested(1, digests(1))
    landed_first = made.state
    made.digested(2, digests(2))
    made.complete(LAST)
    made.verify_handoff(b"whole")

    assert landed_first is IntakeState.LANDED
    assert made.state is IntakeState.VERIFIED


@pytest.mark.parametrize("is_told_first", [False, True])
def test_a_wrong_digest_is_corrupt_and_never_verified(is_told_first):
    """One wrong block of a batch is enough, and it is wrong as soon as both are known."""
    made = intake()
    made.announce(0, blocks(0, 1, 2))
    made.granted(grant())
    batch = made.next_batch()
    made.landed(batch)
    told, measured = digests(0, 1, 2), [1000, 1001, 0]
    if is_told_first:
        made.digested(0, told)
        with pytest.raises(KvCorrupt, match="1 of 3 blocks"):
            made.measured(batch, measured)
    else:
        made.measured(batch, measured)
        with pytest.raises(KvCorrupt, match="1 of 3 blocks"):
            made.digested(0, told)
    assert made.state is IntakeState.LANDED
    with pytest.raises(AssertionError):
        made.joined()


def test_nothing_is_joined_on_digests_that_were_not_told():
    """Bytes that landed and were measured are not verified by that."""
    made = intake()
    made.announce(0, blocks(0, 1, 2))
    made.granted(grant())
    land_all(made)
    assert made.state is IntakeState.LANDED
    with pytest.raises(AssertionError):
        made.joined()


def test_the_right_blocks_of_another_prompt_are_corrupt():
    """What binds the bytes to the prompt must be what we computed ourselves."""
    made = intake()
    whole(made, 0, 1, 2)
    made.granted(grant())
    land_all(made)

    with pytest.raises(KvCorrupt):
        made.verify_handoff(b"other")
    with pytest.raises(AssertionError):
        made.joined()


@pytest.mark.parametrize(
    "opened",
    [
        replace(OPENED, num_tokens=9),
        replace(OPENED, num_tokens=11),
        replace(OPENED, num_blocks=4),
        replace(OPENED, num_blocks=2),
        replace(OPENED, is_running=True),
    ],
)
def test_another_handoff_than_our_prompts_is_corrupt(opened):
    """Refused before a byte is fetched."""
    with pytest.raises(KvCorrupt):
        intake(opened=opened)


@pytest.mark.parametrize(
    ("asked", "wire"),
    [
        ("auto", replace(OWN, num_layers=3)),
        ("auto", replace(OWN, num_kv_heads=2)),
        ("auto", replace(OWN, head_dim=16)),
        ("auto", replace(OWN, dtype="float32")),
    ],
)
def test_a_form_that_cannot_be_ours_is_incompatible(asked, wire):
    """Other shapes, and float32 beside anything else."""
    with pytest.raises(Incompatible):
        intake(replace(PROMPT, wire_dtype=asked), opened=replace(OPENED, wire_layout=wire))


@pytest.mark.parametrize("asked", ["fp8", "int8"])
def test_a_holder_that_does_not_pack_to_what_was_asked_for_is_left_to_others(asked):
    """Its KV would give other tokens than those of holders that do."""
    with pytest.raises(HandoffLost, match=f"does not pack to {asked}"):
        intake(replace(PROMPT, wire_dtype=asked), opened=OPENED)


@pytest.mark.parametrize(
    ("own", "asked", "wire"),
    [
        ("bfloat16", "auto", "bfloat16"),
        ("bfloat16", "auto", "fp8"),
        ("bfloat16", "auto", "int8"),
        ("fp8", "auto", "bfloat16"),
        ("int8", "auto", "int8"),
        ("bfloat16", "fp8", "fp8"),
        ("bfloat16", "int8", "fp8"),  # what the holder keeps is as narrow
        ("bfloat16", "bfloat16", "int8"),
        ("float32", "auto", "float32"),
    ],
)
def test_a_form_that_can_be_ours_is_taken(own, asked, wire):
    """As we keep it, or to be put into that form."""
    expected = replace(PROMPT, layout=replace(OWN, dtype=own), wire_dtype=asked)
    made = intake(expected, opened=replace(OPENED, wire_layout=replace(OWN, dtype=wire)))

    assert made.is_as_kept == (own == wire)


def test_a_holder_that_breaks_the_grammar_is_not_believed():
    """Gaps, repeats, empty runs, too many blocks, anything before `opened` or after `complete`."""
    with pytest.raises(KvCorrupt):
        intake(opened=None).announce(0, blocks(0))
    with pytest.raises(KvCorrupt):
        intake(opened=None).complete(LAST)
    made = intake()
    with pytest.raises(KvCorrupt):
        made.opened(OPENED)
    for first, run in ((1, blocks(1)), (0, []), (0, blocks(0, 1, 2, 3))):
        with pytest.raises(KvCorrupt):
            made.announce(first, run)
    with pytest.raises(KvCorrupt):
        made.digested(0, digests(0))
    made.announce(0, blocks(0, 1))
    with pytest.raises(KvCorrupt):
        made.announce(0, blocks(0))
    for first, run in ((1, digests(1)), (0, []), (0, digests(0, 1, 2))):
        with pytest.raises(KvCorrupt):
            made.digested(first, run)
    made.digested(0, digests(0, 1))
    with pytest.raises(KvCorrupt):
        made.complete(LAST)
    made.announce(2, blocks(2))
    with pytest.raises(KvCorrupt):  # a digest is missing
        made.complete(LAST)
    made.digested(2, digests(2))
    for last in (
        replace(LAST, num_tokens=9),
        replace(LAST, output_ids=()),
        replace(LAST, output_ids=(5, 6)),
    ):
        with pytest.raises(KvCorrupt):
            made.complete(last)
    made.complete(LAST)
    with pytest.raises(KvCorrupt):
        made.complete(LAST)
    with pytest.raises(KvCorrupt):
        made.announce(3, blocks(3))


def test_what_a_holder_is_refused_for_changes_nothing():
    """A good message after a bad one is taken as if the bad one had not been."""
    made = intake()
    made.announce(0, blocks(0))
    for bad in (SourceRun(0, tuple(blocks(0))), DigestRun(0, (1, 2)), LAST):
        with pytest.raises(KvCorrupt):
            made.heard(bad)

    assert made.announced == blocks(0)
    assert (made.digests, made.completion) == ([], None)


def test_a_stream_that_ends_early_is_a_lost_handoff():
    """An end without `complete` is no completion."""
    made = intake()
    made.announce(0, blocks(0))

    with pytest.raises(HandoffLost):
        made.require_complete()
    made.announce(1, blocks(1, 2))
    made.digested(0, digests(0, 1, 2))
    made.complete(LAST)
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


def running(*, num_tokens: int = 11) -> Intake:
    """The intake of a sequence that generates, and had so many tokens when it was opened."""
    num_blocks = OWN.num_blocks_for(num_tokens)
    made = intake(RUNNING, opened=Opened(num_tokens, num_blocks, OWN, is_running=True))
    made.announce(0, blocks(0, 1))
    made.granted(grant(num_blocks=5))
    return made


def test_a_running_handoff_grows_until_it_is_complete():
    """More blocks may come than there were at first; only the last word ends them."""
    made = running()
    land_all(made)
    all_landed = made.state
    made.announce(2, blocks(2, 3))
    told = made.state
    made.digested(0, digests(0, 1, 2, 3))
    land_all(made)
    made.complete(Completion((1, 2, 3, 4, 5), 14, b"whole"))
    made.verify_handoff(b"whole")

    assert (all_landed, told) == (IntakeState.GRANTED, IntakeState.GRANTED)
    assert made.state is IntakeState.VERIFIED
    assert made.num_tokens == 14
    assert made.num_landed == 4


def test_a_running_handoff_of_less_than_our_prompt_is_corrupt():
    """A sequence that generates has its prompt behind it."""
    with pytest.raises(KvCorrupt):
        running(num_tokens=9)


def test_a_running_handoff_that_has_grown_too_long_comes_too_late():
    """It may have generated for a while before its puller came: nothing is wrong with it."""
    with pytest.raises(HandoffLost, match="20 tokens by now, and there is room for 19"):
        running(num_tokens=20)


def test_a_prompt_is_no_running_handoff():
    """A holder that means something else is not believed."""
    with pytest.raises(KvCorrupt):
        intake(RUNNING)


def test_a_running_handoff_is_bounded_by_its_limit():
    """We have blocks for so many tokens, and take no more, whatever is announced."""
    made = running(num_tokens=19)
    with pytest.raises(KvCorrupt):
        made.announce(2, blocks(2, 3, 4, 5))
    made.announce(2, blocks(2, 3, 4))
    made.digested(0, digests(*range(5)))
    with pytest.raises(KvCorrupt):
        made.complete(Completion(tuple(range(1, 12)), 20, b"whole"))
    made.complete(Completion(tuple(range(1, 11)), 19, b"whole"))


@pytest.mark.parametrize(
    "output_ids",
    [
        (1, 9, 3),  # other tokens than the caller has
        (1, 2),  # KV of a token that nobody generated
        (1, 2, 3, 4),  # a token between whose KV is missing
        (),
    ],
)
def test_other_tokens_than_their_kv_are_corrupt(output_ids):
    """All generated tokens but the last have KV, and the caller's are the first of them."""
    made = running()
    made.announce(2, blocks(2))
    made.digested(0, digests(0, 1, 2))

    with pytest.raises(KvCorrupt):
        made.complete(Completion(output_ids, 12, b"whole"))
    made.complete(Completion((1, 2, 3), 12, b"whole"))


def test_the_end_of_a_running_handoffs_last_block_is_known_at_last():
    """Until then it may be full, as far as the limit goes."""
    made = running(num_tokens=19)
    made.announce(2, blocks(2, 3))
    full = made.num_tokens
    made.announce(4, blocks(4))
    limited = made.num_tokens
    made.digested(0, digests(*range(5)))
    made.complete(Completion(tuple(range(1, 10)), 18, b"whole"))

    assert (full, limited, made.num_tokens) == (16, 19, 18)
