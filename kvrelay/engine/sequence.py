"""One request on this engine: the tokens it has and the blocks that hold their KV.

Tokens are the prompt and then the outputs. `[0, num_computed)` have their KV in place;
the first of the others is the next row to compute. A sequence decodes when exactly one
token is left, replays when several generated ones are, and prefills before that.
"""

from enum import Enum, auto

from kvrelay.engine.batch import Path, Rows
from kvrelay.engine.request import EngineRequest, Goal, Origin
from kvrelay.kv.prefix_index import BlockKey
from kvrelay.types import BlockId


class State(Enum):
    """What a sequence is waiting for."""

    WAITING = auto()
    """Blocks."""

    LANDING = auto()
    """Its prompt's KV, written by somebody else."""

    RUNNING = auto()
    """Its share of the next step."""

    HELD = auto()
    """Its release; it is not computed until then, and only one that was to move ever again."""


class Sequence:
    """A request and its progress. Mutated by the scheduler only."""

    __slots__ = (
        "arrival",
        "block_size",
        "block_table",
        "is_freezing",
        "is_offered",
        "is_released",
        "keys",
        "limit_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_offers",
        "num_published",
        "origin",
        "output_ids",
        "request",
        "state",
    )

    def __init__(
        self,
        request: EngineRequest,
        *,
        arrival: int,
        block_size: int,
        keys: tuple[BlockKey, ...],
    ) -> None:
        self.request = request
        self.block_size = block_size
        self.arrival = arrival
        self.keys = keys
        self.state = State.WAITING
        self.origin = request.origin
        # A hold ends with the first token, so it never has outputs to replay.
        self.output_ids = [] if request.goal is Goal.HOLD else list(request.output_ids)
        self.block_table: list[BlockId] = []
        self.num_computed = 0
        self.num_published = 0
        """Leading blocks that the prefix index has been offered, or gave."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the prefix index at its first admission; None before."""
        self.is_released = False
        """Released while in a step; forgotten when that step ends."""
        self.is_offered = False
        """To move to another engine: what it computes is reported."""
        self.num_offers = 0
        self.is_freezing = False
        """To be held as soon as it is in no step."""
        self.limit_tokens = 0
        """It is held before it has KV for more; 0: no limit."""

    @property
    def seq_id(self) -> str:
        return self.request.seq_id

    @property
    def goal(self) -> Goal:
        return self.request.goal

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.request.prompt_ids

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_slots(self) -> int:
        return len(self.block_table) * self.block_size

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed < len(self.prompt_ids)

    @property
    def num_prompt_left(self) -> int:
        """Prompt tokens this engine has still to compute, as far as it knows."""
        return max(0, len(self.prompt_ids) - self.num_computed) * (self.origin is Origin.COMPUTE)

    @property
    def num_tokens_admitted(self) -> int:
        """Tokens whose slots are taken at admission.

        A landing sequence takes those its handoff may fill; the others take all they have,
        or a preempted one would be preempted again while it replays.
        """
        if self.origin is Origin.LAND:
            return max(len(self.prompt_ids), self.request.landing_tokens)
        return self.num_tokens

    @property
    def can_move(self) -> bool:
        """Whether all its KV but the last token's is here, and is going to stay."""
        is_generating = self.state is State.RUNNING and self.goal is Goal.FINISH
        return is_generating and self.num_computed == self.num_tokens - 1 >= len(self.prompt_ids)

    @property
    def is_to_freeze(self) -> bool:
        return self.is_offered and (
            self.is_freezing or 0 < self.limit_tokens < self.num_computed + 1
        )

    @property
    def matchable_keys(self) -> tuple[BlockKey, ...]:
        """Keys of the blocks that may come from the prefix index.

        Whoever is to sample from the prompt's last row must compute that row.
        """
        if self.output_ids or self.origin is Origin.LAND:
            return self.keys
        return self.keys[: (len(self.prompt_ids) - 1) // self.block_size]

    def next_rows(self, limit_tokens: int) -> Rows:
        """The next at most `limit_tokens` tokens, all of one path."""
        assert limit_tokens > 0, limit_tokens
        start, prompt_end = self.num_computed, len(self.prompt_ids)
        if self.is_prefilling:
            path, token_ids = Path.PROMPT, self.prompt_ids[start : start + limit_tokens]
        else:
            first = start - prompt_end
            path = Path.GENERATION
            token_ids = tuple(self.output_ids[first : first + limit_tokens])
        assert token_ids, "every token is computed already"
        end = start + len(token_ids)
        return Rows(
            path=path,
            token_ids=token_ids,
            start=start,
            block_table=tuple(self.block_table),
            sample=self.request.sampling if end == self.num_tokens else None,
        )

    def forget_kv(self) -> None:
        """Back to tokens only, to be computed here. The blocks must be released already."""
        self.block_table = []
        self.num_computed = 0
        self.origin = Origin.COMPUTE
        self.is_offered = self.is_freezing = False
        self.limit_tokens = 0
