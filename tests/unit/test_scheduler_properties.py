"""Any history of requests, steps, landings, moves and releases keeps the scheduler's promises.

The scripted model computes every step, so a wrong block table or a lost slot shows as a
failed assertion or a token its oracle does not expect. Requests also arrive, join and
leave while a step is computed.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvrelay.engine.plan import StepPlan
from kvrelay.engine.request import EngineRequest, Frozen, Goal, Origin
from kvrelay.engine.sequence import State
from kvrelay.errors import KvPoolExhausted, NotFound, QueueFull
from tests.support.builders import BLOCK_SIZE, prompt, request, scheduler
from tests.support.scripted_model import ScriptedModel, expected_tokens

NUM_BLOCKS = 8
BUDGET_TOKENS = 7
MAX_SEQUENCES = 5
MOST_STEPS_TO_END = 3000
MOST_STEPS_WITHOUT_OLDEST = 20


class SchedulerMachine(RuleBasedStateMachine):
    """Plays the engine and the service around one scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.sched = scheduler(
            num_blocks=NUM_BLOCKS,
            budget_tokens=BUDGET_TOKENS,
            max_chunk_tokens=5,
            max_sequences=MAX_SEQUENCES,
            max_waiting=6,
        )
        self.model = ScriptedModel(block_size=BLOCK_SIZE)
        self.plan: StepPlan | None = None
        self.num_added = 0
        self.requests: dict[str, EngineRequest] = {}
        """Added and neither finished nor released."""
        self.outputs: dict[str, list[int]] = {}
        self.landing: dict[str, tuple] = {}
        self.held: set[str] = set()
        self.offered: dict[str, int] = {}
        """To the most tokens whose KV its puller takes; 0: any."""
        self.frozen: set[str] = set()
        """Offered, and held until it is released or resumed."""
        self.steps_without_oldest = 0

    # What the service does

    @rule(
        num_prompt=st.integers(1, 22),
        variant=st.integers(0, 2),
        max_tokens=st.integers(1, 20),
        num_known=st.integers(0, 8),
        kind=st.sampled_from(["compute", "compute", "land", "hold"]),
    )
    def add(
        self, num_prompt: int, variant: int, max_tokens: int, num_known: int, kind: str
    ) -> None:
        """A request arrives, perhaps with tokens its caller has already."""
        prompt_ids = prompt(num_prompt, variant=variant)
        known = expected_tokens(prompt_ids, min(num_known, max_tokens - 1))
        seq_id = f"s{self.num_added}"
        self.num_added += 1
        new = request(
            seq_id,
            prompt_ids,
            max_tokens=max_tokens,
            output_ids=known,
            origin=Origin.LAND if kind == "land" else Origin.COMPUTE,
            goal=Goal.HOLD if kind == "hold" else Goal.FINISH,
        )
        slots = num_prompt if kind == "hold" else num_prompt + max_tokens - 1
        fits = -(-slots // BLOCK_SIZE) <= NUM_BLOCKS
        try:
            self.sched.add(new)
        except KvPoolExhausted:
            assert not fits
        except QueueFull:
            assert self.sched.count(State.WAITING) >= 6  # preempted ones come on top
        else:
            assert fits
            self.requests[seq_id] = new
            self.outputs[seq_id] = [] if kind == "hold" else list(known)
            self.take_grants(self.sched.grant())

    @precondition(lambda self: self.landing)
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        """The KV of a landing sequence arrives."""
        self.join_one(data.draw(st.sampled_from(sorted(self.landing))))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A caller leaves, wherever its sequence is."""
        self.release_one(data.draw(st.sampled_from(sorted(self.requests))))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        """A sequence is to move."""
        seq_id = data.draw(st.sampled_from(sorted(self.requests)))
        if seq_id in self.frozen:
            return
        try:
            done = self.sched.offer(seq_id)
        except NotFound:
            return
        new = self.requests[seq_id]
        assert new.goal is Goal.FINISH
        assert done.num_computed == len(new.prompt_ids) + len(self.outputs[seq_id]) - 1
        self.offered.setdefault(seq_id, 0)

    @precondition(lambda self: self.offered)
    @rule(data=st.data(), more=st.integers(-2, 6))
    def limit(self, data: st.DataObject, more: int) -> None:
        """Its puller says for how much it has room, perhaps for less than there is."""
        seq_id = data.draw(st.sampled_from(sorted(self.offered)))
        has = len(self.requests[seq_id].prompt_ids) + len(self.outputs[seq_id]) - 1
        most = max(0, has + more)
        if seq_id not in self.frozen:
            self.offered[seq_id] = most
        self.take_frozen(self.sched.limit(seq_id, most))

    @precondition(lambda self: self.offered)
    @rule(data=st.data())
    def freeze(self, data: st.DataObject) -> None:
        """Its puller has what was announced so far."""
        seq_id = data.draw(st.sampled_from(sorted(self.offered)))
        was_frozen = seq_id in self.frozen
        frozen = self.sched.freeze(seq_id)
        is_in_step = self.plan is not None and any(
            seq.seq_id == seq_id for seq in self.plan.sequences
        )
        assert (frozen is None) == (was_frozen or is_in_step)
        self.take_frozen(frozen)

    @precondition(lambda self: self.offered)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """It stays."""
        self.resume_one(data.draw(st.sampled_from(sorted(self.offered))))

    # What the engine does

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_step(self) -> None:
        """Plan; the step is then computed until `end_step`."""
        plan = self.sched.plan()
        self.take_grants(plan.granted)
        for seq_id in plan.withdrawn:
            assert seq_id not in self.frozen
            del self.offered[seq_id]
        self.check_progress(plan)
        assert sum(len(rows.token_ids) for rows in plan.rows) <= BUDGET_TOKENS
        assert len(plan.sequences) == len(set(plan.sequences)) <= MAX_SEQUENCES
        assert not self.frozen.intersection(seq.seq_id for seq in plan.sequences)
        for seq, rows in zip(plan.sequences, plan.rows, strict=True):
            most = self.offered.get(seq.seq_id, 0)
            assert most == 0 or rows.start + len(rows.token_ids) <= most
        if plan.rows:
            self.plan = plan

    @precondition(lambda self: self.plan is not None)
    @rule()
    def end_step(self) -> None:
        """Compute and commit."""
        plan, self.plan = self.plan, None
        outcome = self.sched.commit(self.model.step(plan.rows))
        for chunk in outcome.chunks:
            is_held = self.requests[chunk.seq_id].goal is Goal.HOLD
            assert is_held or chunk.seq_id in self.offered
        for emitted in outcome.emitted:
            outputs = self.outputs[emitted.seq_id]
            assert emitted.position == len(outputs)
            outputs += emitted.token_ids
            prompt_ids = self.requests[emitted.seq_id].prompt_ids
            assert tuple(outputs) == expected_tokens(prompt_ids, len(outputs))
            if self.requests[emitted.seq_id].goal is Goal.HOLD:
                self.held.add(emitted.seq_id)
            elif emitted.finish is not None:
                assert len(outputs) == self.requests.pop(emitted.seq_id).stop.max_tokens
                self.offered.pop(emitted.seq_id, None)
        for frozen in outcome.frozen:
            self.take_frozen(frozen)
        self.take_grants(self.sched.grant())

    # What must hold

    @invariant()
    def blocks_and_sequences_agree(self) -> None:
        self.sched.check()
        assert self.sched.count(State.LANDING) == len(self.landing)
        assert self.sched.count(State.HELD) == len(self.held) + len(self.frozen)
        num_active = self.sched.count(State.RUNNING) + self.sched.count(State.LANDING)
        assert num_active + len(self.frozen) <= MAX_SEQUENCES
        if self.plan is None:
            assert sum(self.sched.count(state) for state in State) == len(self.requests)

    def teardown(self) -> None:
        """Whatever happened, everything ends, and every block is free or cached."""
        for _ in range(MOST_STEPS_TO_END):
            if not self.requests:
                break
            if self.plan is None:
                self.begin_step()
            if self.plan is not None:
                self.end_step()
                continue
            assert self.landing or self.held or self.frozen, "a deadlock"
            for seq_id in sorted(self.landing):
                self.join_one(seq_id)
            for seq_id in sorted(self.held):
                self.release_one(seq_id)
            for seq_id in sorted(self.frozen):
                self.resume_one(seq_id)
        if self.plan is not None:
            self.end_step()
        assert not self.requests, f"never ended: {sorted(self.requests)}"
        assert self.sched.is_empty
        assert self.sched.pool.counts.held == 0
        self.sched.check()

    # Steps of the above

    def take_grants(self, grants: tuple) -> None:
        for granted in grants:
            prompt_ids = self.requests[granted.seq_id].prompt_ids
            assert len(granted.block_table) == -(-len(prompt_ids) // BLOCK_SIZE)
            assert granted.seq_id not in self.landing
            self.landing[granted.seq_id] = granted

    def join_one(self, seq_id: str) -> None:
        granted, new = self.landing.pop(seq_id), self.requests[seq_id]
        self.model.land(granted.block_table, new.prompt_ids, first_block=granted.num_cached_blocks)
        first = expected_tokens(new.prompt_ids, 1)
        done = self.sched.join(seq_id, first, len(new.prompt_ids))
        self.outputs[seq_id] = self.outputs[seq_id] or list(first)
        if done is not None:
            assert new.stop.max_tokens == 1
            del self.requests[seq_id]
            self.take_grants(self.sched.grant())

    def take_frozen(self, frozen: Frozen | None) -> None:
        """It has all its tokens, KV of all but the last, and computes no more."""
        if frozen is None:
            return
        seq_id = frozen.done.seq_id
        assert seq_id in self.offered
        assert seq_id not in self.frozen
        assert frozen.output_ids == tuple(self.outputs[seq_id])
        num_prompt = len(self.requests[seq_id].prompt_ids)
        assert frozen.done.num_computed == num_prompt + len(frozen.output_ids) - 1
        self.frozen.add(seq_id)

    def resume_one(self, seq_id: str) -> None:
        self.sched.resume(seq_id)
        del self.offered[seq_id]
        self.frozen.discard(seq_id)

    def release_one(self, seq_id: str) -> None:
        assert self.sched.release(seq_id)
        assert not self.sched.release(seq_id)
        del self.requests[seq_id]
        self.landing.pop(seq_id, None)
        self.held.discard(seq_id)
        self.offered.pop(seq_id, None)
        self.frozen.discard(seq_id)
        self.take_grants(self.sched.grant())

    def check_progress(self, plan: StepPlan) -> None:
        """Only what is held or lands can stop a step, and the oldest is soon part of one."""
        stoppers = [
            seq_id
            for seq_id, new in self.requests.items()
            if seq_id in self.landing or seq_id in self.frozen or new.goal is Goal.HOLD
        ]
        if stoppers or not self.requests:
            self.steps_without_oldest = 0
            return
        assert plan.rows, "nothing moves"
        oldest = min(self.requests, key=lambda seq_id: int(seq_id[1:]))
        is_in = any(seq.seq_id == oldest for seq in plan.sequences)
        self.steps_without_oldest = 0 if is_in else self.steps_without_oldest + 1
        # A prompt may wait while replays, which are finite, take the budget.
        assert self.steps_without_oldest <= MOST_STEPS_WITHOUT_OLDEST, oldest


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=60, deadline=None)
