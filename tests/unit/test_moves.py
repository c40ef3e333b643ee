"""Which requests move, when, and where to."""

from hypothesis import given
from hypothesis import strategies as st

from coordinator.moves import Movable, Move, MoveOutcome, MovePlanner, MoveReason, MoveRules
from coordinator.registry import Member
from coordinator.router import common_offer
from kvrelay.types import Role, TransportOffer, WorkerLoad
from tests.support.members import LAYOUT, identity, member

NOW_S = 100.0
ROOM = WorkerLoad(free_blocks=64)
DRAINING = WorkerLoad(free_blocks=32, held_blocks=32, running_sequences=4, is_draining=True)
CROWDED = WorkerLoad(free_blocks=2, held_blocks=62, running_sequences=4, waiting_sequences=2)


def worker(name: str, load: WorkerLoad = ROOM, **changes: object) -> Member:
    found: Member = member(name, load=load, **changes)
    found.heard_at_s = NOW_S
    return found


def movable(name: str, source: Member, num_tokens: int = 10, **changes: float) -> Movable:
    fields: dict[str, object] = {
        "num_slots": 100,
        "last_token_at_s": NOW_S,
        "num_relieved": 0,
        "num_failed": 0,
    }
    fields |= changes
    return Movable(request_id=name, source=source, num_tokens=num_tokens, **fields)  # type: ignore[arg-type]


def planner(**changes: object) -> MovePlanner:
    return MovePlanner(MoveRules(**changes), common_offer)  # type: ignore[arg-type]


def named(moves: list[Move]) -> list[tuple[str, str]]:
    return [(move.request_id, move.target.worker_id) for move in moves]


def test_nothing_moves_while_nobody_drains_and_nobody_waits() -> None:
    """A full worker on which all run is a good one; who could move is not even looked at."""

    def nobody() -> list[Movable]:
        raise AssertionError("looked at")
        yield

    full = WorkerLoad(held_blocks=64, running_sequences=8)

    assert planner().plan([worker("d0", full), worker("d1")], nobody(), NOW_S) == []


def test_a_draining_worker_hands_over_all_it_runs() -> None:
    """Spread over those that take work, with how the target pulls from the source."""
    source, others = worker("d0", DRAINING), [worker("d1"), worker("d2")]
    moves = planner().plan([source, *others], [movable(f"r{i}", source) for i in range(4)], NOW_S)

    assert sorted(move.target.worker_id for move in moves) == ["d1", "d1", "d2", "d2"]
    assert {move.reason for move in moves} == {MoveReason.DRAIN}
    assert all(move.source is source and move.offer.name == "stream" for move in moves)


def test_so_many_are_under_way_at_a_time_and_no_more() -> None:
    """One that is over makes room for the next, whatever became of it."""
    source, target = worker("d0", DRAINING), worker("d1")
    movables = [movable(f"r{i}", source) for i in range(5)]
    it = planner(max_under_way=2)
    first = it.plan([source, target], movables, NOW_S)

    assert len(first) == 2
    assert it.plan([source, target], movables, NOW_S) == []
    it.ended(first[0], MoveOutcome.MOVED, NOW_S)
    rest = [m for m in movables if m.request_id != first[0].request_id]
    assert len(it.plan([source, target], rest, NOW_S)) == 1


def test_those_with_most_left_to_generate_leave_first() -> None:
    """They would hold the worker up longest; others may be over by themselves."""
    source = worker("d0", DRAINING)
    movables = [movable("short", source, num_slots=20), movable("long", source, num_slots=90)]

    assert named(planner(max_under_way=1).plan([source, worker("d1")], movables, NOW_S)) == [
        ("long", "d1")
    ]


def test_a_target_must_have_room_for_what_it_takes_over() -> None:
    """Free and cached blocks for the tokens there are, and one more; its sequences keep theirs."""
    source = worker("d0", DRAINING)
    num_blocks = LAYOUT.num_blocks_for(10) + 1
    for free, fits in ((num_blocks, True), (num_blocks - 1, False)):
        load = WorkerLoad(free_blocks=free - 1, cached_blocks=1, held_blocks=20)
        assert (
            bool(planner().plan([source, worker("d1", load)], [movable("r", source)], NOW_S))
            == fits
        )
    full = WorkerLoad(free_blocks=60, running_sequences=8)
    assert not planner().plan([source, worker("d1", full)], [movable("r", source)], NOW_S)
    busy = worker("d1", WorkerLoad(free_blocks=num_blocks + 1, held_blocks=40), placed=(0, 0))
    assert not planner().plan([source, busy], [movable("r", source)], NOW_S)


def test_room_is_promised_once() -> None:
    """Moves of one plan, of earlier ones, and those that the target has not told of yet add up."""
    num_blocks = LAYOUT.num_blocks_for(10) + 1
    source = worker("d0", DRAINING)
    target = worker("d1", WorkerLoad(free_blocks=2 * num_blocks, held_blocks=10))
    it = planner()
    movables = [movable(f"r{i}", source) for i in range(4)]
    moves = it.plan([source, target], movables, NOW_S)

    assert len(moves) == 2
    for move in moves:
        it.ended(move, MoveOutcome.MOVED, NOW_S + 0.1)
    assert it.plan([source, target], movables[2:], NOW_S + 0.2) == []
    target.heard_at_s = NOW_S + 0.3
    source.heard_at_s = NOW_S + 0.3
    assert len(it.plan([source, target], movables[2:], NOW_S + 0.3)) == 2


def test_a_target_must_be_able_to_hold_all_that_may_come() -> None:
    """A pool that is too small for the whole request would only lose it later."""
    source, target = worker("d0", DRAINING), worker("d1")
    too_long = movable("r", source, num_slots=target.num_slots + 1)

    assert planner().plan([source, target], [too_long], NOW_S) == []


def test_a_target_must_be_able_to_pull() -> None:
    """And must take work: one that drains as well, or is not linked, does not."""
    source = worker("d0", DRAINING)
    others = [
        worker("d1", offers=(TransportOffer(name="shm", address="", host="elsewhere"),)),
        worker("d2", WorkerLoad(free_blocks=64, is_draining=True)),
        worker("d3"),
        member("p0", Role.PREFILL),
    ]
    others[2].is_linked = False

    assert planner().plan([source, *others], [movable("r", source)], NOW_S) == []


def test_a_move_that_failed_is_not_tried_again_before_there_is_news() -> None:
    """Elsewhere at once; there when it was heard again; and nowhere any more after so many."""
    source, d1, d2 = worker("d0", DRAINING), worker("d1"), worker("d2")
    it = planner(max_failed=2)
    (move,) = it.plan([source, d1], [movable("r", source)], NOW_S)
    it.ended(move, MoveOutcome.FAILED, NOW_S)

    assert it.plan([source, d1], [movable("r", source, num_failed=1)], NOW_S) == []
    (other,) = it.plan([source, d1, d2], [movable("r", source, num_failed=1)], NOW_S)
    assert other.target is d2
    it.ended(other, MoveOutcome.OVERTAKEN, NOW_S)
    d1.heard_at_s = source.heard_at_s = NOW_S + 1
    assert it.plan([source, d1], [movable("r", source, num_failed=1)], NOW_S + 1)
    assert not planner(max_failed=2).plan([source, d1], [movable("r", source, num_failed=2)], NOW_S)


def test_a_crowded_worker_is_relieved_of_one_request_at_a_time() -> None:
    """The next when its load tells of the last one, and it is still crowded."""
    source, target = worker("d0", CROWDED), worker("d1")
    movables = [movable(f"r{i}", source) for i in range(3)]
    it = planner()
    (move,) = it.plan([source, target], movables, NOW_S)

    assert move.reason is MoveReason.RELIEF
    assert it.plan([source, target], movables, NOW_S) == []
    it.ended(move, MoveOutcome.MOVED, NOW_S + 0.1)
    assert it.plan([source, target], movables[1:], NOW_S + 0.1) == []
    source.heard_at_s = target.heard_at_s = NOW_S + 0.5
    assert len(it.plan([source, target], movables[1:], NOW_S + 0.5)) == 1


def test_relief_goes_only_where_there_is_ample_room() -> None:
    """Half full with what it takes over, so that nothing ever moves back for the same reason."""
    source = worker("d0", CROWDED)
    for running, is_ample in ((3, True), (4, False)):
        target = worker("d1", WorkerLoad(free_blocks=64, running_sequences=running))
        assert bool(planner().plan([source, target], [movable("r", source)], NOW_S)) == is_ample


def test_relief_can_be_turned_off() -> None:
    """Draining cannot: it is asked for each time."""
    crowded, target, draining = worker("d0", CROWDED), worker("d1"), worker("d2", DRAINING)
    movables = [movable("r0", crowded), movable("r2", draining)]

    assert named(planner(relief=False).plan([crowded, target, draining], movables, NOW_S)) == [
        ("r2", "d1")
    ]


def test_relief_moves_who_has_much_left_and_little_to_copy() -> None:
    """And gave a token lately, has something left, and was not moved so twice before."""
    source = worker("d0", CROWDED)
    movables = [
        movable("a-waits-itself", source, last_token_at_s=NOW_S - 5),
        movable("b-has-moved", source, num_relieved=2),
        movable("c-is-nearly-over", source, num_tokens=95),
        movable("d-is-long", source, num_tokens=60, num_slots=120),
        movable("e-is-short", source, num_tokens=5, num_slots=100),
    ]

    assert named(planner().plan([source, worker("d1")], movables, NOW_S)) == [("e-is-short", "d1")]
    assert planner().plan([source, worker("d1")], movables[:3], NOW_S) == []


loads = st.builds(
    lambda held, free, running, waiting, drains: WorkerLoad(
        held_blocks=held,
        free_blocks=min(free, 64 - held),
        running_sequences=running,
        waiting_sequences=waiting,
        is_draining=drains,
    ),
    st.integers(0, 64),
    st.integers(0, 64),
    st.integers(0, 8),
    st.integers(0, 4),
    st.booleans(),
)


@given(st.lists(loads, min_size=1, max_size=5), st.lists(st.integers(0, 4), max_size=20), st.data())
def test_whatever_happens_nobody_is_promised_what_there_is_not(
    given_loads: list[WorkerLoad], placed_on: list[int], data: st.DataObject
) -> None:
    """Under any loads and ends: one move per request, to another worker that has the blocks, and
    no more off one worker at a time than the rule says.
    """
    workers = [worker(f"d{i}", load) for i, load in enumerate(given_loads)]
    movables = [movable(f"r{i}", workers[at % len(workers)]) for i, at in enumerate(placed_on)]
    it = planner(max_under_way=3)
    under_way: dict[str, Move] = {}
    promised = dict.fromkeys([w.worker_id for w in workers], 0)
    for _ in range(4):
        for move in it.plan(workers, movables, NOW_S):
            assert move.request_id not in under_way
            assert move.target is not move.source
            assert not move.target.load.is_draining
            under_way[move.request_id] = move
            promised[move.target.worker_id] += move.num_blocks
        for w in workers:
            assert sum(m.source is w for m in under_way.values()) <= 3
            if promised[w.worker_id]:
                assert promised[w.worker_id] <= w.load.free_blocks + w.load.cached_blocks
        for name in list(under_way):
            outcome = data.draw(st.none() | st.sampled_from(MoveOutcome))
            if outcome is not None:
                move = under_way.pop(name)
                it.ended(move, outcome, NOW_S)
                if outcome is MoveOutcome.MOVED:
                    movables = [m for m in movables if m.request_id != name]
                else:
                    promised[move.target.worker_id] -= move.num_blocks


def test_identity_of_members_is_what_counts() -> None:
    """A worker that joined anew under the same name is another: old promises are not its own."""
    source, target = worker("d0", DRAINING), worker("d1")
    it = planner()
    (move,) = it.plan([source, target], [movable("r", source)], NOW_S)
    it.ended(move, MoveOutcome.FAILED, NOW_S)
    again = worker("d1")
    assert again.identity == identity("d1")

    assert it.plan([source, again], [movable("r", source, num_failed=1)], NOW_S)
