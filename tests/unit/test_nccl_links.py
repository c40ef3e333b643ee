"""Which links there are: every state reached, every bound kept, and none lost that is in use."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvrelay.transfer.nccl_links import TRANSITIONS, LinkEvent, LinkState, LinkTable, advance


def ready(table: LinkTable[str], key: str) -> None:
    assert table.ask(key, 0.0).shall_open
    table.joined(key)


def test_every_state_is_reached_and_only_the_last_is_final():
    """A closed link is forgotten; whoever wants one again begins with none."""
    reached = {LinkState.ABSENT}
    for _ in LinkState:
        reached |= {after for state in reached for after in TRANSITIONS[state].values()}
    assert reached == set(LinkState) == set(TRANSITIONS)
    assert [state for state, ways in TRANSITIONS.items() if not ways] == [LinkState.CLOSED]


def test_a_broken_link_is_never_ready_again():
    """Another one is opened in its place."""
    assert TRANSITIONS[LinkState.BROKEN] == {
        LinkEvent.ASKED: LinkState.OPENING,
        LinkEvent.DROPPED: LinkState.CLOSED,
    }


def test_what_cannot_happen_is_a_bug():
    """Not a state of its own."""
    with pytest.raises(AssertionError, match="JOINED in READY"):
        advance(LinkState.READY, LinkEvent.JOINED)


def test_the_first_who_asks_opens_and_the_others_are_told():
    """One link per pair, however many want it."""
    table: LinkTable[str] = LinkTable(max_links=2)
    first, second = table.ask("a", 0.0), table.ask("a", 0.0)
    assert (first.shall_open, first.is_ready, first.give_way) == (True, False, None)
    assert (second.shall_open, second.why_not) == (False, "its link is being opened")
    table.joined("a")
    assert table.ask("a", 0.0).is_ready


def test_the_one_used_longest_ago_gives_way():
    """Using and asking both count as use."""
    table: LinkTable[str] = LinkTable(max_links=3)
    for key in "abc":
        ready(table, key)
    table.take("a")
    table.give_back("a", worked=True)
    assert table.ask("b", 0.0).is_ready
    assert table.ask("d", 0.0).give_way == "c"
    assert table.state("c") is LinkState.ABSENT


def test_neither_a_link_in_use_nor_one_being_opened_gives_way():
    """Who comes is told that all are in use."""
    table: LinkTable[str] = LinkTable(max_links=2)
    ready(table, "a")
    table.take("a")
    assert table.ask("b", 0.0).shall_open
    assert table.ask("c", 0.0).why_not == "all 2 links are in use"
    table.give_back("a", worked=True)
    assert table.ask("c", 0.0).give_way == "a"


def test_each_failure_doubles_the_wait_up_to_a_bound():
    """And one success ends it."""
    table: LinkTable[str] = LinkTable(max_links=1, retry_s=1.0, max_retry_s=3.0)
    now_s = 0.0
    for wait_s in (1.0, 2.0, 3.0, 3.0):
        assert table.ask("a", now_s).shall_open
        table.failed("a", now_s)
        assert "next try in 0.5 s" in table.ask("a", now_s + wait_s - 0.5).why_not
        now_s += wait_s
    assert table.ask("a", now_s).shall_open
    table.joined("a")
    table.take("a")
    table.give_back("a", worked=True)
    table.failed("a", now_s)
    assert table.ask("a", now_s + 1.0).shall_open


def test_a_broken_link_is_not_made_anew_before_its_users_have_left():
    """They still give back the old one."""
    table: LinkTable[str] = LinkTable(max_links=1, retry_s=0.0)
    ready(table, "a")
    table.take("a")
    table.failed("a", 0.0)
    assert table.ask("a", 9.0).why_not == "its link broke just now"
    table.give_back("a", worked=False)
    assert table.ask("a", 9.0).shall_open


def test_a_broken_link_takes_no_room_and_is_forgotten_in_time():
    """Peers come and go for months."""
    table: LinkTable[int] = LinkTable(max_links=1)
    for key in range(100):
        assert table.ask(key, 0.0).shall_open
        table.failed(key, 0.0)
        table.check()
    assert sum(table.state(key) is LinkState.BROKEN for key in range(100)) == 8


class Machine(RuleBasedStateMachine):
    """A table, and beside it what its answers said."""

    def __init__(self):
        super().__init__()
        self.table: LinkTable[int] = LinkTable(max_links=2, retry_s=1.0, max_retry_s=4.0)
        self.now_s = 0.0
        self.live: dict[int, str] = {}
        self.users: dict[int, int] = {}

    @rule(key=st.integers(0, 5))
    def ask(self, key):
        answer = self.table.ask(key, self.now_s)
        assert answer.is_ready == (self.live.get(key) == "ready")
        assert answer.is_ready or answer.why_not
        if answer.give_way is not None:
            assert self.live.pop(answer.give_way) == "ready"
            assert not self.users.get(answer.give_way)
        if answer.shall_open:
            assert key not in self.live
            self.live[key] = "opening"

    @rule(key=st.integers(0, 5), works=st.booleans())
    def open(self, key, works):
        if self.live.get(key) == "opening":
            self.live[key] = "ready"
            self.table.joined(key) if works else self._fail(key)

    @rule(key=st.integers(0, 5))
    def take(self, key):
        if self.live.get(key) == "ready":
            self.table.take(key)
            self.users[key] = self.users.get(key, 0) + 1

    @rule(key=st.integers(0, 5), works=st.booleans())
    def give_back(self, key, works):
        if self.users.get(key):
            self.table.give_back(key, worked=works)
            self.users[key] -= 1
            if not works and key in self.live:
                self._fail(key)

    @rule(seconds=st.floats(0, 5))
    def wait(self, seconds):
        self.now_s += seconds

    @invariant()
    def the_table_agrees(self):
        self.table.check()
        assert self.table.num_links == len(self.live) <= 2
        for key, said in self.live.items():
            assert self.table.state(key).name.lower() == said

    def _fail(self, key):
        self.table.failed(key, self.now_s)
        del self.live[key]


TestTable = Machine.TestCase
