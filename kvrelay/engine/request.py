"""What the engine is asked for and what it answers: plain values, no tensors.

One engine serves both roles. A worker's service turns wire messages into `EngineRequest`s
and `StepResult`s back into messages; what a worker is *for* is only which origin and goal
it is fed.
"""

from dataclasses import dataclass
from enum import Enum, auto

from kvrelay.types import BlockId, FinishReason, SamplingParams, StopParams


class Origin(Enum):
    """Where the KV of a sequence's prompt comes from."""

    COMPUTE = auto()
    """The engine prefills it (or finds part of it in the prefix index)."""

    LAND = auto()
    """The engine grants blocks, the service copies KV into them and calls `join`."""


class Goal(Enum):
    """When the engine is done with a sequence."""

    FINISH = auto()
    """Generate until the stop parameters say so, then free its blocks."""

    HOLD = auto()
    """Sample the first token, then hold the prompt's blocks until `release`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One attempt of one request, on one engine."""

    seq_id: str
    """Unique on this engine: the request's id and attempt."""

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...] = ()
    """Tokens the caller already has, in order. Replayed as rows of the generation path,
    never sampled again."""

    sampling: SamplingParams
    stop: StopParams
    """`max_tokens` counts `output_ids` too."""

    origin: Origin = Origin.COMPUTE
    goal: Goal = Goal.FINISH
    cache_salt: bytes = b""
    """Sequences share cached blocks only under equal salts."""

    landing_tokens: int = 0
    """Tokens whose KV may land with `Origin.LAND`, if more than the prompt's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """Tokens sampled for one sequence in one step."""

    seq_id: str
    position: int
    """Of the first of `token_ids` among the outputs, from 0."""

    token_ids: tuple[int, ...]
    finish: FinishReason | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkDone:
    """KV that exists now. Reported for `Goal.HOLD` sequences, and for those on offer."""

    seq_id: str
    num_computed: int
    """Tokens whose KV is in the cache, from 0; of a `Goal.HOLD` sequence prompt tokens only."""

    block_table: tuple[BlockId, ...]
    """All its blocks, in order; what is past `num_computed` is not ready."""

    offer: int = 0
    """Which offer of the sequence this is said for, from 1; 0 for `Goal.HOLD`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """A sequence on offer that computes no more until it is released or resumed."""

    done: ChunkDone
    output_ids: tuple[int, ...]
    """All of them; the last has no KV yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """Blocks for a `Origin.LAND` sequence. The first `num_cached_blocks` already hold its
    prefix; the service fills the others, then calls `join`.
    """

    seq_id: str
    block_table: tuple[BlockId, ...]
    num_cached_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTiming:
    """Where a sequence's time went on this engine, by its monotonic clock."""

    seq_id: str
    queue_s: float
    """From `submit` (or `join` for a landed one) to its first step."""

    prefill_s: float
    """From its first step to its first sampled token; the first step's time for a landed one."""

    num_cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """Everything one engine step has to say, delivered in one call from the engine's thread."""

    emitted: tuple[Emitted, ...] = ()
    chunks: tuple[ChunkDone, ...] = ()
    granted: tuple[Granted, ...] = ()
    frozen: tuple[Frozen, ...] = ()
    """After what they emitted in the same result."""

    withdrawn: tuple[str, ...] = ()
    """Sequences on offer whose KV was given up to make room; they are computed again here."""

    timings: tuple[SequenceTiming, ...] = ()
    """Sent once per sequence, with its first emitted token."""
