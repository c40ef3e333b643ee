"""What the next step computes, and for whom there is room: first come, first served, almost.

There is no prefill phase. A step has one token budget: sequences that generate take a
row each, what is left goes to chunks of prompts, oldest first, and what is left then
admits from the one waiting line. Only a brief prompt, one of a single chunk, may pass a
longer one: it would wait for many times what it takes itself. The oldest long one keeps a
part of every step meanwhile, and its place in the line for blocks.

A sequence is admitted with all blocks of the tokens it has; only growing by generated
tokens can run out of blocks, and then the youngest gives its KV up and starts again from
its tokens. So the oldest always makes progress, and every sequence becomes the oldest.
"""

from bisect import insort
from collections import Counter
from collections.abc import Sequence as Seq

from kvrelay.engine.plan import Draft, StepLimits, StepOutcome, StepPlan
from kvrelay.engine.request import (
    ChunkDone,
    Emitted,
    EngineRequest,
    Frozen,
    Goal,
    Granted,
    Origin,
)
from kvrelay.engine.sequence import Sequence, State
from kvrelay.errors import InvalidRequest, KvPoolExhausted, NotFound, QueueFull
from kvrelay.kv.block_pool import BlockPool
from kvrelay.kv.prefix_index import PrefixIndex
from kvrelay.types import BlockId

LONG_PROMPT_SHARE = 4
"""One in so many rows of a step is kept for long prompts while brief ones pass."""


class Scheduler:
    """Owns every sequence of an engine, and decides; synchronous, deterministic, no I/O.

    `plan` and `commit` alternate. Everything else may be called between the two, while
    the step is computed: a sequence that is in the step then keeps its blocks until
    `commit`, even if it is released.
    """

    def __init__(self, pool: BlockPool, index: PrefixIndex, *, limits: StepLimits) -> None:
        self._pool = pool
        self._index = index
        self._limits = limits
        self._sequences: dict[str, Sequence] = {}
        # Each line is ordered by arrival, so a preempted sequence waits ahead of all that
        # were never admitted.
        self._lines: dict[State, list[Sequence]] = {state: [] for state in State}
        self._in_step: StepPlan | None = None
        self._pinned: Counter[BlockId] = Counter()
        self._num_arrived = 0
        self.num_preemptions = 0

    @property
    def pool(self) -> BlockPool:
        return self._pool

    @property
    def is_empty(self) -> bool:
        return not self._sequences and not self._pinned.total()

    @property
    def queued_prompt_tokens(self) -> int:
        """Prompt tokens still to be computed here, by running sequences too."""
        return sum(seq.num_prompt_left for seq in self._sequences.values())

    def count(self, state: State) -> int:
        return len(self._lines[state])

    def add(self, request: EngineRequest) -> None:
        """Put a request at the end of the line.

        Raises:
            InvalidRequest: a field makes no sense here.
            QueueFull: too many wait already.
            KvPoolExhausted: the whole pool could not hold it.
        """
        self._refuse_invalid(request)
        waiting, limit = self.count(State.WAITING), self._limits.max_waiting
        if waiting >= limit:
            raise QueueFull(what="sequences", queued=waiting, limit=limit)
        wanted = self._num_blocks_for(_most_slots(request))
        if wanted > self._pool.num_blocks:
            raise KvPoolExhausted(wanted_blocks=wanted, free_blocks=self._pool.num_blocks)
        seq = Sequence(
            request,
            arrival=self._num_arrived,
            block_size=self._index.block_size,
            keys=self._index.keys(request.prompt_ids, request.cache_salt),
        )
        self._num_arrived += 1
        self._sequences[seq.seq_id] = seq
        self._lines[State.WAITING].append(seq)

    def join(self, seq_id: str, output_ids: tuple[int, ...], num_landed: int) -> Emitted | None:
        """The KV of a landing sequence's first `num_landed` tokens is in its blocks: let it run.

        `output_ids` are those its holder knows, and seed it unless the request brought more.
        Returns a finish without tokens if the outputs already end it; it is then forgotten.

        Raises:
            NotFound: no such sequence is landing (any more).
            InvalidRequest: there is no output to go on from.
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.state is not State.LANDING:
            raise NotFound(f"no sequence {seq_id} is landing", seq_id=seq_id)
        outputs = max(seq.output_ids, list(output_ids), key=len)
        if not outputs:
            raise InvalidRequest("output_ids", "empty, and the request has no outputs")
        seq.output_ids = outputs
        assert len(seq.prompt_ids) <= num_landed < seq.num_tokens, (num_landed, seq.num_tokens)
        assert num_landed <= seq.num_slots, (num_landed, seq.num_slots)
        seq.num_computed = num_landed
        self._publish(seq)
        finish = seq.request.stop.finish(outputs[-1], len(outputs))
        if finish is None:
            self._move(seq, State.RUNNING)
            return None
        self._forget(seq)
        return Emitted(seq_id=seq_id, position=len(outputs), token_ids=(), finish=finish)

    def release(self, seq_id: str) -> bool:
        """Forget a sequence in whatever state; False if there is none.

        Its blocks are given back now, or by `commit` if it is in the step being computed.
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.is_released:
            return False
        if self._is_in_step(seq):
            seq.is_released = True
        else:
            self._forget(seq)
        return True

    def offer(self, seq_id: str) -> ChunkDone:
        """From now on report what a generating sequence computes: it is to move.

        Raises:
            NotFound: no such sequence generates (now).
        """
        seq = self._sequences.get(seq_id)
        if seq is None or seq.is_released or not seq.can_move:
            raise NotFound(f"no sequence {seq_id} generates", seq_id=seq_id)
        seq.is_offered = True
        seq.num_offers += 1
        return _chunk_done(seq)

    def limit(self, seq_id: str, limit_tokens: int) -> Frozen | None:
        """Hold a sequence on offer before it has KV for more; 0: no limit. As `freeze`."""
        seq = self._offered(seq_id)
        if seq is None:
            return None
        seq.limit_tokens = limit_tokens
        return self._freeze_if_due(seq)

    def freeze(self, seq_id: str) -> Frozen | None:
        """Hold a sequence on offer: now, or by `commit` if it is in the step being computed.

        None if it is not held now: it will be, or it is on offer no more, or it was before.
        """
        seq = self._offered(seq_id)
        if seq is None:
            return None
        seq.is_freezing = True
        return self._freeze_if_due(seq)

    def resume(self, seq_id: str) -> None:
        """It does not move after all. Without effect on what is not on offer."""
        seq = self._offered(seq_id)
        if seq is None:
            return
        seq.is_offered = seq.is_freezing = False
        seq.limit_tokens = 0
        if seq.state is State.HELD:
            self._move(seq, State.RUNNING)

    def pin(self, blocks: Seq[BlockId]) -> None:
        """Keep blocks from being reused while somebody outside reads them."""
        self._pool.share(blocks)
        self._pinned.update(blocks)

    def unpin(self, blocks: Seq[BlockId]) -> None:
        self._pinned.subtract(blocks)
        self._pool.release(blocks)

    def grant(self) -> tuple[Granted, ...]:
        """Give blocks to landing sequences whose turn it is; possible during a step."""
        return self._admit(None)

    def plan(self) -> StepPlan:
        """Decide the next step.

        Empty if nothing can move until something is added, joined or released; then
        there is nothing to commit.
        """
        assert self._in_step is None, "the last step was not committed"
        draft = Draft(self._limits.budget_tokens)
        self._continue_generating(draft)
        self._let_brief_prompts_pass(draft)
        self._continue_prompts(draft)
        granted = self._admit(draft)
        plan = StepPlan(
            sequences=tuple(draft.sequences),
            rows=tuple(draft.rows),
            granted=granted,
            withdrawn=tuple(draft.withdrawn),
        )
        self._in_step = plan if plan.rows else None
        return plan

    def commit(self, sampled: Seq[int | None]) -> StepOutcome:
        """Take in what the planned step computed: one entry per `Rows`, in order."""
        plan, self._in_step = self._in_step, None
        assert plan is not None, "no step was planned"
        emitted: list[Emitted] = []
        chunks: list[ChunkDone] = []
        frozen: list[Frozen] = []
        for seq, rows, token_id in zip(plan.sequences, plan.rows, sampled, strict=True):
            assert (token_id is None) == (rows.sample is None), (rows.start, token_id)
            seq.num_computed += len(rows.token_ids)
            self._publish(seq)
            if seq.is_released:
                self._forget(seq)
                continue
            if seq.goal is Goal.HOLD or seq.is_offered:
                chunks.append(_chunk_done(seq))
            if token_id is not None:
                emitted.append(self._accept(seq, token_id))
            if (stopped := self._freeze_if_due(seq)) is not None:
                frozen.append(stopped)
        return StepOutcome(emitted=tuple(emitted), chunks=tuple(chunks), frozen=tuple(frozen))

    def check(self) -> None:
        """Prove that blocks and sequences agree: every holder is a sequence we know."""
        self._pool.check()
        holders: Counter[BlockId] = Counter(self._pinned)
        for seq in self._sequences.values():
            assert seq in self._lines[seq.state], seq.seq_id
            assert seq.num_computed <= seq.num_slots, seq.seq_id
            assert len(set(seq.block_table)) == len(seq.block_table), seq.seq_id
            assert (seq.state is State.WAITING) == (not seq.block_table), seq.seq_id
            holders.update(seq.block_table)
        for block in map(BlockId, range(self._pool.num_blocks)):
            assert self._pool.num_holders(block) == holders[block], block
        for line in self._lines.values():
            assert line == sorted(line, key=_arrival), "a line is out of order"
        assert sum(map(len, self._lines.values())) == len(self._sequences)

    # Planning

    def _continue_generating(self, draft: Draft) -> None:
        generating = [seq for seq in self._lines[State.RUNNING] if not seq.is_prefilling]
        for i, seq in enumerate(generating):
            if seq.state is not State.RUNNING:
                continue  # preempted for the sake of an older one
            # A replay may take many rows, but leaves one for everybody after it.
            room = draft.budget_left - (len(generating) - i - 1)
            wanted = min(room, seq.num_tokens - seq.num_computed, self._limits.max_chunk_tokens)
            count = self._make_slots(seq, wanted, draft)
            if count:
                draft.add(seq, count)

    def _let_brief_prompts_pass(self, draft: Draft) -> None:
        """While a long prompt is computed, those of one chunk go first, admitted or waiting."""
        prompts = [seq for seq in self._lines[State.RUNNING] if seq.is_prefilling]
        if all(map(self._is_brief, prompts)):
            return
        kept = -(-draft.budget_left // LONG_PROMPT_SHARE)
        for seq in filter(self._is_brief, prompts):
            if draft.budget_left > kept:
                draft.add(seq, draft.budget_left - kept)
        num_blocks_ahead = 0
        for seq in tuple(self._lines[State.WAITING]):
            if draft.budget_left <= kept:
                return
            if seq.origin is Origin.LAND or not self._is_brief(seq):
                num_blocks_ahead += self._num_blocks_for(seq.num_tokens_admitted)
            elif self._take_blocks(seq, besides=num_blocks_ahead):
                self._move(seq, State.RUNNING)
                draft.add(seq, draft.budget_left - kept)
            else:
                return

    def _continue_prompts(self, draft: Draft) -> None:
        for seq in self._lines[State.RUNNING]:
            if draft.budget_left == 0:
                return
            if seq.is_prefilling and seq not in draft.sequences:
                draft.add(seq, self._limits.max_chunk_tokens)

    def _is_brief(self, seq: Sequence) -> bool:
        num_left = seq.num_tokens_admitted - seq.num_computed
        return num_left <= self._limits.max_chunk_tokens

    def _make_slots(self, seq: Sequence, num_tokens: int, draft: Draft) -> int:
        """Grow a block table for the next `num_tokens` rows; returns how many rows fit."""
        while (num_ready := seq.num_slots - seq.num_computed) < num_tokens:
            if self._pool.num_available:
                seq.block_table += self._pool.allocate(1)
            elif num_ready > 0:
                return num_ready
            elif not self._preempt_youngest(seq, draft) or seq.state is State.WAITING:
                return 0
        return num_tokens

    def _preempt_youngest(self, besides: Sequence, draft: Draft) -> bool:
        """Take the blocks of the youngest that can start again; perhaps of `besides` itself.

        False if only `besides` could: then it sits this step out, because giving its
        own blocks up would gain it nothing. Holds and landings will give theirs back.
        """
        candidates = [seq for seq in self._lines[State.RUNNING] if seq.goal is Goal.FINISH]
        if candidates == [besides]:
            others = sum(self.count(s) for s in State if s is not State.WAITING) - 1
            assert others, "a sequence that fits the pool alone found no block"
            return False
        youngest = candidates[-1]
        if youngest.is_offered:
            draft.withdrawn.append(youngest.seq_id)
        self._pool.release(youngest.block_table)
        youngest.forget_kv()
        self._move(youngest, State.WAITING)
        self.num_preemptions += 1
        return True

    def _admit(self, draft: Draft | None) -> tuple[Granted, ...]:
        """Admit from the head of the line until the head must wait.

        A sequence to be computed waits for budget as well as for blocks, so it needs a
        `draft`; by then those before it may have put their common prefix into the index.
        """
        granted: list[Granted] = []
        while waiting := self._lines[State.WAITING]:
            seq = waiting[0]
            lands = seq.origin is Origin.LAND
            if not lands and (draft is None or draft.budget_left == 0):
                break
            if not self._take_blocks(seq):
                break
            self._move(seq, State.LANDING if lands else State.RUNNING)
            if lands:
                granted.append(_grant_of(seq))
            elif draft is not None:
                draft.add(seq, self._limits.max_chunk_tokens)
        return tuple(granted)

    def _take_blocks(self, seq: Sequence, *, besides: int = 0) -> bool:
        """Take every block of the tokens a sequence has, shared or new; or none.

        So many must be left then, `besides`, for those who came before it.
        """
        num_frozen = sum(held.is_offered for held in self._lines[State.HELD])
        num_active = self.count(State.RUNNING) + self.count(State.LANDING) + num_frozen
        if num_active >= self._limits.max_sequences:
            return False
        shared = self._index.match(seq.matchable_keys)
        num_new = self._num_blocks_for(seq.num_tokens_admitted) - len(shared)
        # One block left for each that may grow, or admitting would soon mean preempting.
        reserve = sum(other.goal is Goal.FINISH for other in self._lines[State.RUNNING])
        if self._pool.num_available_besides(shared) < num_new + reserve + besides:
            return False
        self._pool.share(shared)
        seq.block_table = shared + self._pool.allocate(num_new)
        seq.num_published = len(shared)
        seq.num_computed = len(shared) * self._index.block_size
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed
        return True

    # Bookkeeping

    def _is_in_step(self, seq: Sequence) -> bool:
        return self._in_step is not None and seq in self._in_step.sequences

    def _offered(self, seq_id: str) -> Sequence | None:
        seq = self._sequences.get(seq_id)
        return seq if seq is not None and seq.is_offered and not seq.is_released else None

    def _freeze_if_due(self, seq: Sequence) -> Frozen | None:
        """Hold a sequence if it is to be held and is in no step."""
        if not (seq.is_to_freeze and seq.can_move) or self._is_in_step(seq):
            return None
        self._move(seq, State.HELD)
        return Frozen(done=_chunk_done(seq), output_ids=tuple(seq.output_ids))

    def _accept(self, seq: Sequence, token_id: int) -> Emitted:
        position = len(seq.output_ids)
        seq.output_ids.append(token_id)
        finish = seq.request.stop.finish(token_id, len(seq.output_ids))
        if seq.goal is Goal.HOLD:
            self._move(seq, State.HELD)
        elif finish is not None:
            self._forget(seq)
        return Emitted(seq_id=seq.seq_id, position=position, token_ids=(token_id,), finish=finish)

    def _publish(self, seq: Sequence) -> None:
        """Offer every full prompt block that exists now to the prefix index."""
        num_full = min(seq.num_computed // self._index.block_size, len(seq.keys))
        for i in range(seq.num_published, num_full):
            self._index.insert(seq.keys[i], seq.block_table[i])
        seq.num_published = max(seq.num_published, num_full)

    def _move(self, seq: Sequence, state: State) -> None:
        self._lines[seq.state].remove(seq)
        seq.state = state
        insort(self._lines[state], seq, key=_arrival)

    def _forget(self, seq: Sequence) -> None:
        self._lines[seq.state].remove(seq)
        del self._sequences[seq.seq_id]
        seq.is_offered = False  # nobody pulls what has ended
        self._pool.release(seq.block_table)
        seq.block_table = []

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._index.block_size)

    def _refuse_invalid(self, request: EngineRequest) -> None:
        if request.seq_id in self._sequences:
            raise InvalidRequest("seq_id", "already here", seq_id=request.seq_id)
        if not request.prompt_ids:
            raise InvalidRequest("prompt_ids", "empty")
        if request.stop.max_tokens < 1:
            raise InvalidRequest("max_tokens", f"{request.stop.max_tokens}, at least 1")
        if request.goal is Goal.HOLD and request.origin is Origin.LAND:
            raise InvalidRequest("goal", "a landed sequence cannot be held")
        outputs = request.output_ids
        if request.goal is Goal.HOLD or not outputs:
            return
        if request.stop.finish(outputs[-1], len(outputs)) is not None:
            raise InvalidRequest("output_ids", f"{len(outputs)} tokens end it already")


def _arrival(seq: Sequence) -> int:
    return seq.arrival


def _most_slots(request: EngineRequest) -> int:
    """Slots a request may come to need. The last token of all is never computed."""
    if request.goal is Goal.HOLD:
        return len(request.prompt_ids)
    return len(request.prompt_ids) + request.stop.max_tokens - 1


def _chunk_done(seq: Sequence) -> ChunkDone:
    return ChunkDone(
        seq_id=seq.seq_id,
        num_computed=(
            min(seq.num_computed, len(seq.prompt_ids))
            if seq.goal is Goal.HOLD
            else seq.num_computed
        ),
        block_table=tuple(seq.block_table),
        offer=seq.num_offers,
    )


def _grant_of(seq: Sequence) -> Granted:
    return Granted(
        seq_id=seq.seq_id,
        block_table=tuple(seq.block_table),
        num_cached_blocks=seq.num_published,
    )
