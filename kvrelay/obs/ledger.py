"""Where one request's time went: stages that add up, so nothing hides between them.

Pure: instants are passed in, by one monotonic clock. The last stage of each sum is the
remainder, which is the time on the wire that no single clock can see.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """The record of one ended request. Durations in seconds."""

    request_id: str
    outcome: str
    """`stop`, `length`, or the reason of the failure."""

    ttft_s: float
    ttft_stages: Mapping[str, float]
    """Sum to `ttft_s`."""

    gap1_s: float
    gap1_stages: Mapping[str, float]
    """Sum to `gap1_s` where KV was handed over, else empty. `grant_wait` and `transfer` follow each
    other: bytes travel to blocks."""

    e2e_s: float
    tpot_s: float
    handoff_tax_s: float | None
    attempts: int
    lost_attempts: tuple[str, ...]
    move_gaps_s: tuple[float, ...]
    """One for each time it moved from one decode worker to another: from the last token before to
    the first after."""

    prefill_worker: str
    decode_worker: str
    route_reason: str
    transport: str
    handoff_num_bytes: int
    overlapped_num_bytes: int
    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(slots=True, kw_only=True)
class LedgerBuilder:
    """Collects one request's instants and durations while it lives."""

    request_id: str
    arrived_at_s: float
    tokenized_at_s: float = 0.0
    dispatched_at_s: float = 0.0
    """Of the attempt that gave the first token, or of the latest before it."""

    first_dispatched_at_s: float = 0.0
    token_at_s: list[float] = field(default_factory=list)
    """Of the first two tokens only."""

    last_token_at_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    gap1_stages: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    lost_attempts: list[str] = field(default_factory=list)
    num_lost_before_first_token: int = 0
    move_gaps_s: list[float] = field(default_factory=list)
    has_just_moved: bool = False
    prefill_worker: str = ""
    decode_worker: str = ""
    route_reason: str = ""
    transport: str = ""
    handoff_num_bytes: int = 0
    overlapped_num_bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0

    def dispatched(self, now_s: float) -> None:
        """An attempt was sent to its workers."""
        self.attempts += 1
        if self.attempts == 1:
            self.first_dispatched_at_s = now_s
        if not self.token_at_s:
            self.dispatched_at_s = now_s

    def lost(self, reason: str) -> None:
        """The attempt was given up; the next one starts over."""
        self.lost_attempts.append(reason)
        self.has_just_moved = False
        if not self.token_at_s:
            self.num_lost_before_first_token += 1

    def moved(self) -> None:
        """Another decode worker has gone on with it; nothing was lost, so no attempt was."""
        self.has_just_moved = True

    def tokens(self, now_s: float, num_tokens: int) -> None:
        """`num_tokens` more tokens, at least one, were handed to the caller."""
        if self.has_just_moved:
            self.has_just_moved = False
            self.move_gaps_s.append(now_s - self.last_token_at_s)
        self.completion_tokens += num_tokens
        self.last_token_at_s = now_s
        self.token_at_s += [now_s] * min(num_tokens, 2 - len(self.token_at_s))

    def build(self, outcome: str, now_s: float) -> Ledger:
        """The finished record."""
        first = self.token_at_s[0] if self.token_at_s else None
        ttft_s = first - self.arrived_at_s if first is not None else 0.0
        gap1_s = self.token_at_s[1] - self.token_at_s[0] if len(self.token_at_s) > 1 else 0.0
        n = self.completion_tokens
        tpot_s = (self.last_token_at_s - first) / (n - 1) if first is not None and n > 1 else 0.0
        was_handed_over = bool(self.gap1_stages) and gap1_s > 0
        return Ledger(
            request_id=self.request_id,
            outcome=outcome,
            ttft_s=ttft_s,
            ttft_stages=self._ttft_stages(ttft_s) if first is not None else {},
            gap1_s=gap1_s,
            gap1_stages=self._gap1_stages(gap1_s) if was_handed_over else {},
            e2e_s=now_s - self.arrived_at_s,
            tpot_s=tpot_s,
            handoff_tax_s=gap1_s - tpot_s if was_handed_over and n > 2 else None,
            attempts=self.attempts,
            lost_attempts=tuple(self.lost_attempts),
            move_gaps_s=tuple(self.move_gaps_s),
            prefill_worker=self.prefill_worker,
            decode_worker=self.decode_worker,
            route_reason=self.route_reason,
            transport=self.transport,
            handoff_num_bytes=self.handoff_num_bytes,
            overlapped_num_bytes=self.overlapped_num_bytes,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=n,
            cached_prompt_tokens=self.cached_prompt_tokens,
        )

    def _ttft_stages(self, ttft_s: float) -> dict[str, float]:
        stages = {
            "tokenize": self.tokenized_at_s - self.arrived_at_s,
            "admit": self.first_dispatched_at_s - self.tokenized_at_s,
        }
        if self.num_lost_before_first_token:
            stages["lost_attempts"] = max(0.0, self.dispatched_at_s - self.first_dispatched_at_s)
        stages["queue"] = self.queue_s
        stages["prefill"] = self.prefill_s
        return _with_remainder(stages, "first_token_return", ttft_s)

    def _gap1_stages(self, gap1_s: float) -> dict[str, float]:
        order = ("grant_wait", "transfer", "verify", "release", "join", "first_step")
        known = {name: self.gap1_stages.get(name, 0.0) for name in order}
        stages = _with_remainder(known, "pull_wait", gap1_s)
        return {"pull_wait": stages.pop("pull_wait"), **stages}


def _with_remainder(stages: dict[str, float], name: str, total_s: float) -> dict[str, float]:
    """`stages` and what is left of the total, never negative.

    Workers start their clocks before the coordinator sees their message, so their parts can
    exceed the whole by a hair, or by much when a token travels ahead of its timing; they are
    then scaled to fit, since a sum that does not add up helps nobody.
    """
    known_s = sum(stages.values())
    if known_s > total_s and known_s > 0:
        return {k: v * total_s / known_s for k, v in stages.items()} | {name: 0.0}
    return stages | {name: total_s - known_s}
