"""An intake under every order of events: all that is missing is fetched once, and joined last."""

import hypothesis.strategies as st
from hypothesis import given

from decode_svc.intake import Completion, Expected, Intake, IntakeState, Opened, SourceBlock
from kvrelay.engine.request import Granted
from kvrelay.kv.layout import KvLayout
from kvrelay.types import BlockId


def layout(block_size):
    return KvLayout(
        num_layers=1, block_size=block_size, num_kv_heads=1, head_dim=4, dtype="bfloat16"
    )


@st.composite
def histories(draw):
    """Sizes, the runs a holder announces, and an order in which things happen."""
    own, wire = layout(draw(st.sampled_from([2, 4, 8]))), layout(draw(st.sampled_from([2, 4, 8])))
    num_tokens = draw(st.integers(1, 40))
    num_generated = draw(st.integers(0, num_tokens - 1))
    num_prompt = num_tokens - num_generated
    num_blocks = wire.num_blocks_for(num_tokens)
    cuts = sorted(draw(st.sets(st.integers(1, num_blocks), max_size=4)) | {num_blocks})
    num_cached = draw(st.integers(0, num_prompt // own.block_size))
    max_batch = draw(st.integers(1, 5))
    # Landing may be tried at any time, and as often as it takes.
    events = ["announce"] * len(cuts) + ["grant"] + ["land", "measure"] * draw(st.integers(0, 6))
    events += ["digest"] * draw(st.integers(0, 3))
    order = draw(st.permutations(events))
    return own, wire, num_prompt, num_generated, cuts, num_cached, max_batch, order


@given(histories())
def test_every_missing_block_is_fetched_once_and_then_it_may_join(history):
    """Whatever the order of announcements, digests, grant and landings, of a prompt's handoff and
    of a sequence's that generates, in blocks of our size or another."""
    own, wire, num_prompt, num_generated, cuts, num_cached, max_batch, order = history
    num_tokens, num_blocks, is_running = num_prompt + num_generated, cuts[-1], num_generated > 0
    outputs = tuple(range(num_generated + 1))
    expected = Expected(
        num_prompt=num_prompt,
        emitted_ids=outputs[:1] if is_running else (),
        is_running=is_running,
        limit_tokens=num_tokens + 7 if is_running else 0,
        layout=own,
        wire_dtype="auto",
    )
    intake = Intake("h", expected, max_batch_bytes=max_batch * wire.block_num_bytes)
    num_at_first = num_prompt if is_running else num_tokens
    intake.opened(Opened(num_at_first, wire.num_blocks_for(num_at_first), wire, is_running))
    fetched: list[int] = []
    measuring: list[tuple[int, ...]] = []
    starts = iter(zip([0, *cuts], cuts, strict=False))

    def land() -> bool:
        batch = intake.next_batch()
        assert len(batch) <= max_batch
        if batch:
            intake.landed(batch)
            measuring.append(batch)
            fetched.extend(batch)
        return bool(batch)

    def measure() -> None:
        while measuring:
            batch = measuring.pop()
            intake.measured(batch, [index * 3 for index in batch])

    def digest(num_digests: int) -> None:
        known = len(intake.digests)
        told = range(known, min(known + num_digests, len(intake.announced)))
        if told:
            intake.digested(known, [index * 3 for index in told])

    for event in order:
        assert intake.state not in (IntakeState.VERIFIED, IntakeState.JOINED)
        match event:
            case "announce":
                start, end = next(starts)
                intake.announce(start, [SourceBlock(BlockId(i), 0, i) for i in range(start, end)])
            case "grant":
                if not intake.announced:
                    continue  # nobody asks for blocks before
                grant(intake, own, num_tokens, num_cached)
            case "land":
                land()
            case "measure":
                measure()
            case "digest":
                digest(2)
    if intake.wants_grant:
        grant(intake, own, num_tokens, num_cached)
    digest(num_blocks)
    intake.complete(Completion(outputs, num_tokens, b"d"))
    assert intake.is_announced
    while land():
        pass
    assert intake.state is IntakeState.LANDED
    measure()

    first_missing = num_cached * own.block_size
    is_all_here = not is_running and first_missing == num_prompt
    missing = [] if is_all_here else range(first_missing // wire.block_size, num_blocks)
    assert fetched == list(missing)
    assert intake.state is IntakeState.LANDED
    intake.verify_handoff(b"d")
    assert intake.state is IntakeState.VERIFIED
    intake.joined()
    assert intake.state is IntakeState.JOINED


def grant(intake, own, num_tokens, num_cached):
    table = tuple(BlockId(50 + i) for i in range(own.num_blocks_for(num_tokens + 7)))
    intake.granted(Granted(seq_id="s", block_table=table, num_cached_blocks=num_cached))
