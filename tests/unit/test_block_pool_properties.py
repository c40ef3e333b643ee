"""Any history of takers and givers leaves every block in exactly one state."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.errors import KvPoolExhausted
from kvrelay.kv.block_pool import BlockPool
from kvrelay.kv.prefix_index import PrefixIndex
from tests.support.builders import SECRET, prompt

NUM_BLOCKS = 7


class PoolMachine(RuleBasedStateMachine):
    """Holders come and go; a model of who holds what is kept beside the pool."""

    def __init__(self) -> None:
        super().__init__()
        self.index = PrefixIndex(block_size=2, key=SECRET)
        self.pool = BlockPool(NUM_BLOCKS, self.index)
        self.tables: list[list] = []
        self.generations = [0] * NUM_BLOCKS

    @rule(num_blocks=st.integers(0, 5), variant=st.integers(0, 2), publishes=st.booleans())
    def take(self, num_blocks: int, variant: int, publishes: bool) -> None:
        """Someone takes a prompt's blocks, sharing what the index has of it."""
        keys = self.index.keys(prompt(2 * num_blocks, variant=variant), b"")
        shared = self.index.match(keys)
        num_new = num_blocks - len(shared)
        if self.pool.num_available_besides(shared) < num_new:
            self.fails_to_allocate(self.pool.num_available + 1)
            return
        self.pool.share(shared)
        table = shared + self.pool.allocate(num_new)
        if publishes:
            for key, block in zip(keys, table, strict=True):
                self.index.insert(key, block)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """Any holder leaves."""
        which = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(which))

    def fails_to_allocate(self, num_blocks: int) -> None:
        before = self.pool.counts
        try:
            self.pool.allocate(num_blocks)
        except KvPoolExhausted:
            assert self.pool.counts == before
        else:
            raise AssertionError("more was given than there is")

    @invariant()
    def every_block_has_one_state(self) -> None:
        self.pool.check()
        held = {block for table in self.tables for block in table}
        assert self.pool.counts.held == len(held)
        for block in range(NUM_BLOCKS):
            assert self.pool.num_holders(block) == sum(block in t for t in self.tables)

    @invariant()
    def generations_never_shrink(self) -> None:
        now = [self.pool.generation(block) for block in range(NUM_BLOCKS)]
        assert all(a >= b for a, b in zip(now, self.generations, strict=True))
        self.generations = now


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
