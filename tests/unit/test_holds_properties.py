"""Holds under random histories: every hold ends once, and no refused puller was ever let in."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.errors import ServingError
from kvrelay.handoff.holds import AnnouncedBlock, HoldLimits, Holds, HoldState, PullTerms
from kvrelay.types import BlockId

BLOCK_SIZE = 4
NAMES = st.sampled_from(["a", "b", "c", "d"])
PULLERS = st.sampled_from(["p", "p", "p", "thief"])
MOST_TOKENS = 40


def terms(limit_tokens):
    return PullTerms(wire_dtype="auto", digest_kind="xxh3", limit_tokens=limit_tokens)


class HoldsMachine(RuleBasedStateMachine):
    """Holds, and beside them the blocks an engine would have given to each."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self.holds = Holds(
            block_size=BLOCK_SIZE,
            limits=HoldLimits(hold_s=5, unclaimed_hold_s=3, max_expected=2, max_remembered=2),
        )
        self.kept = {}  # hold -> computed tokens, of those whose blocks the engine still keeps
        self.pulls = []
        self.generation = {}
        self.num_granted = 0

    def give_back(self, hold):
        del self.kept[hold]
        for block in hold.block_table:
            self.generation[block] += 1

    @rule(name=NAMES, num_tokens=st.integers(1, 14), is_running=st.booleans())
    def begin(self, name, num_tokens, is_running):
        try:
            hold = self.holds.begin(
                name,
                puller_id="p",
                seq_id=name,
                prompt_ids=tuple(range(num_tokens)),
                is_running=is_running,
            )
        except ServingError:
            return
        assert hold not in self.kept
        self.kept[hold] = 0
        if is_running:
            self.advance(hold, num_tokens)

    def advance(self, hold, num_computed):
        """The engine computed so far. Blocks of one name are never those of another."""
        self.kept[hold] = num_computed
        num_blocks = -(-MOST_TOKENS // BLOCK_SIZE) if hold.is_running else hold.num_blocks
        offset = 16 * "abcd".index(hold.handoff_id)
        table = tuple(BlockId(offset + i) for i in range(num_blocks))
        for block in table:
            self.generation.setdefault(block, 0)
        self.holds.advance(hold, table, num_computed)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def compute(self, data):
        hold = data.draw(st.sampled_from(list(self.kept)))
        if hold.state is not HoldState.COMPUTING:
            return
        most = MOST_TOKENS if hold.is_running else hold.num_tokens
        self.advance(hold, data.draw(st.integers(self.kept[hold], most)))
        if self.kept[hold] == hold.num_tokens:
            if data.draw(st.booleans()):
                self.holds.complete(hold, (1,), self.now_s)
            elif data.draw(st.booleans()):
                self.holds.finish(hold)
                self.give_back(hold)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def announce(self, data):
        hold = data.draw(st.sampled_from(list(self.kept)))
        blocks = hold.ready_unannounced
        if blocks:
            self.holds.announce(
                hold, [AnnouncedBlock(block, self.generation[block]) for block in blocks]
            )

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def digest(self, data):
        hold = data.draw(st.sampled_from(list(self.kept)))
        num_digests = data.draw(st.integers(0, len(hold.undigested)))
        self.holds.digested(hold, [0] * num_digests)

    @rule(name=NAMES, puller=PULLERS, limit_tokens=st.sampled_from([0, 0, 0, 9]))
    def connect(self, name, puller, limit_tokens):
        try:
            hold = self.holds.connect(name, puller, terms(limit_tokens), self.now_s)
        except ServingError:
            return
        assert hold.terms == terms(limit_tokens)
        assert puller == "p" or hold.state is HoldState.EXPECTED
        self.pulls.append(hold)

    @precondition(lambda self: self.pulls)
    @rule(data=st.data())
    def disconnect(self, data):
        hold = self.pulls.pop(data.draw(st.integers(0, len(self.pulls) - 1)))
        self.holds.disconnect(hold, self.now_s)

    @rule(name=NAMES, puller=PULLERS, data=st.data())
    def release(self, name, puller, data):
        known = [hold for hold in self.kept if hold.handoff_id == name]
        told = [block.generation for hold in known for block in hold.announced]
        told = data.draw(st.sampled_from([told, [*told, 0], told[:-1]]))
        try:
            hold = self.holds.release(
                name,
                puller,
                generations=told,
                current=lambda blocks: [self.generation[block] for block in blocks],
            )
        except ServingError:
            return
        assert puller == "p"
        if hold is None:
            return
        assert hold in self.kept, "a hold that had ended was granted"
        assert told == [self.generation[block] for block in hold.block_table]
        assert len(told) == -(-self.kept[hold] // BLOCK_SIZE), "more was computed"
        self.num_granted += 1
        self.give_back(hold)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def cancel(self, data):
        hold = data.draw(st.sampled_from(list(self.kept)))
        self.holds.lapse(hold)
        self.give_back(hold)

    @rule(elapsed_s=st.sampled_from([0.5, 3.0, 6.0]))
    def wait(self, elapsed_s):
        self.now_s += elapsed_s
        for hold in self.holds.lapse_overdue(self.now_s):
            if hold.seq_id:
                self.give_back(hold)
        due_s = self.holds.next_due_s()
        assert due_s is None or due_s > self.now_s

    @invariant()
    def what_is_alive_is_what_the_engine_keeps(self):
        self.holds.check()
        assert all(hold.is_alive for hold in self.kept)
        assert self.holds.num_released == self.num_granted


TestHolds = HoldsMachine.TestCase
TestHolds.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
