"""The values every part speaks of: who a worker is, what it serves, what a request asks for."""

import hashlib
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from kvrelay.kv.layout import DTYPE_NUM_BYTES, KvLayout

BlockId = NewType("BlockId", int)

PROTOCOL_VERSION = 2
"""Grows when P, D and coordinator of different versions could misunderstand each other."""


class Role(Enum):
    """What a worker is fed. A weight in routing, not a mode of its engine."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(Enum):
    """Why a request ended well."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Fully resolved: nothing here is optional.

    Noise is a function of (`seed`, absolute position) alone, so a request replayed
    anywhere draws the same tokens.
    """

    temperature: float = 0.0
    """0 is greedy; otherwise logits are divided by it."""

    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probability reaches this; in (0, 1]."""

    min_p: float = 0.0
    """Drop tokens less likely than this times the likeliest; in [0, 1)."""

    seed: int = 0
    """64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopParams:
    """When a sequence ends by itself. Stop strings are the coordinator's business."""

    max_tokens: int
    stop_token_ids: frozenset[int] = frozenset()

    def finish(self, token_id: int, num_output: int) -> FinishReason | None:
        """Whether `token_id`, being output number `num_output` (from 1), is the last."""
        if token_id in self.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= self.max_tokens else None


_KV_PART = re.compile(r"-kv-[a-z0-9]+|-[0-9a-f]{8}$")
"""What the KV's dtype does to a name of numerics: a part of its own, and other bits of the rows
whose digest may end the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """What a worker serves and how. Equal ones finish each other's requests token-exactly."""

    model_digest: str
    """Hex digest over weights, config and tokenizer files."""

    numerics: str
    """Name of the numeric paths, e.g. `cpu-bfloat16-v1`."""

    layout: KvLayout
    protocol_version: int = PROTOCOL_VERSION

    @property
    def digest(self) -> str:
        return hashlib.blake2b(repr(self).encode(), digest_size=16).hexdigest()

    def cannot_pair(self, other: "Fingerprint") -> dict[str, str]:
        """Field by field, `ours != theirs`, what keeps two workers from sharing KV; empty if
        nothing does.

        Block size and KV dtype may differ, since KV travels in a form that both can read; only
        float32, which is for checking, stays among itself. With the dtype, tokens come to depend
        on who served.
        """
        ours, theirs = self.layout, other.layout
        names = (self.numerics, other.numerics)
        dtypes = (ours.dtype, theirs.dtype)
        is_one_dtype = ours.dtype == theirs.dtype
        pairs = {
            "model_digest": (self.model_digest, other.model_digest),
            "numerics": names if is_one_dtype else tuple(_KV_PART.sub("", n) for n in names),
            "dtype": dtypes if "float32" in dtypes else ("", ""),
            "num_layers": (ours.num_layers, theirs.num_layers),
            "num_kv_heads": (ours.num_kv_heads, theirs.num_kv_heads),
            "head_dim": (ours.head_dim, theirs.head_dim),
            "protocol_version": (self.protocol_version, other.protocol_version),
        }
        return {name: f"{a} != {b}" for name, (a, b) in pairs.items() if a != b}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportOffer:
    """One way KV can be pulled from a worker."""

    name: str
    """`shm`, `stream`, ..."""

    address: str
    """Meaning depends on the transport; never dialled unless the transport is known."""

    host: str
    """Identifies the machine and its boot; same-host transports need it equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerIdentity:
    """A worker, for as long as one process lives. The address is not the identity."""

    worker_id: str
    epoch: str
    """Random per start."""

    role: Role
    address: str
    """HOST:PORT of its gRPC server."""

    pid: int
    fingerprint: Fingerprint
    num_blocks: int
    """Size of its block pool."""

    max_sequences: int
    """Most sequences in one step."""

    offers: tuple[TransportOffer, ...] = field(default=())
    wire_dtype: str = "auto"
    """D: what it asks holders to pack KV to, at the price of other logits."""

    @property
    def kv_form(self) -> str:
        """What becomes of KV here, in a word: tokens are equal where this is."""
        kept, moved = self.fingerprint.layout.dtype, self.wire_dtype
        if moved == "auto" or DTYPE_NUM_BYTES[moved] >= DTYPE_NUM_BYTES[kept]:
            return kept
        return f"{kept} by {moved}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """How fast KV came lately from one worker by one transport, as its puller measured."""

    holder_id: str
    transport: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What a worker said of itself last. All counts are gauges unless named `_total`."""

    free_blocks: int = 0
    cached_blocks: int = 0
    held_blocks: int = 0
    """Held by running, landing or waiting sequences and by handoffs."""

    waiting_sequences: int = 0
    running_sequences: int = 0
    handoff_holds: int = 0
    """P: finished prefills waiting for their release. D: pulls under way."""

    queued_prompt_tokens: int = 0
    """Prompt tokens still to be computed, running ones included."""

    prefill_tokens_per_s: float = 0.0
    """Measured lately; 0 before the first prompt."""

    step_s: float = 0.0
    """Median step lately."""

    handoffs_total: int = 0
    """P: released by their puller. D: landed and joined."""

    preemptions_total: int = 0
    is_draining: bool = False
    waiting_handoffs: int = 0
    """P: finished holds that were not released. D: handoffs that have bytes to fetch and wait for
    blocks."""

    links: tuple[LinkSpeed, ...] = ()
    """Of pulls to this worker."""
