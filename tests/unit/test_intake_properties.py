"""An intake under every order of events: all that is missing is fetched once, and joined last."""

import hypothesis.strategies as st
from hypothesis import given

from decode_svc.intake import Completion, Intake, IntakeState, SourceBlock
from kvrelay.engine.request import Granted
from kvrelay.types import BlockId


@st.composite
def histories(draw):
    """Sizes, the runs a holder announces, and an order in which things happen."""
    num_blocks = draw(st.integers(1, 12))
    cuts = sorted(draw(st.sets(st.integers(1, num_blocks), max_size=4)) | {num_blocks})
    num_cached = draw(st.integers(0, num_blocks))
    max_batch = draw(st.integers(1, 5))
    events = ["announce"] * len(cuts) + ["grant"]
    # Landing may be tried at any time, and as often as it takes.
    order = draw(st.permutations(events + ["land"] * draw(st.integers(0, 6))))
    return num_blocks, cuts, num_cached, max_batch, order


@given(histories())
def test_every_missing_block_is_fetched_once_and_then_it_may_join(history):
    """Whatever the order of announcements, grant and landings."""
    num_blocks, cuts, num_cached, max_batch, order = history
    intake = Intake("h", num_tokens=num_blocks * 4, num_blocks=num_blocks, max_batch=max_batch)
    intake.opened(num_blocks * 4, num_blocks)
    fetched: list[int] = []
    starts = iter(zip([0, *cuts], cuts, strict=False))

    def land() -> bool:
        batch = intake.next_batch()
        assert len(batch) <= max_batch
        if batch:
            intake.landed(batch)
            intake.verify(batch, [copy.index * 3 for copy in batch])
            fetched.extend(copy.index for copy in batch)
            assert all(copy.target == 50 + copy.index for copy in batch)
        return bool(batch)

    for event in order:
        assert intake.state not in (IntakeState.RELEASING, IntakeState.JOINED)
        if event == "announce":
            start, end = next(starts)
            intake.announce(start, [SourceBlock(BlockId(i), 0, i * 3) for i in range(start, end)])
            if end == num_blocks:
                intake.complete(Completion(1, num_blocks * 4, b"d"))
        elif event == "grant":
            table = tuple(BlockId(50 + i) for i in range(num_blocks))
            intake.granted(Granted(seq_id="s", block_table=table, num_cached_blocks=num_cached))
        else:
            land()
    while land():
        pass

    assert fetched == list(range(num_cached, num_blocks))
    assert intake.state is IntakeState.VERIFYING
    intake.verify_handoff(b"d")
    assert intake.state is IntakeState.RELEASING
    intake.joined()
    assert intake.state is IntakeState.JOINED
