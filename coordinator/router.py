"""Which prefill and which decode worker a request goes to, chosen together, with the reason.

Pure. Prompts go where their KV is likely to be complete at the decode worker first: after the work
that stands before them, while what is computed is moved, counting what a worker's prefix index
probably spares. Sequences go where the fewest run. A prompt that is short, or mostly cached where
it will be decoded, skips the handoff: moving its KV would cost more than computing it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Final

from coordinator.prefix_map import PrefixMap
from coordinator.registry import Member
from kvrelay.errors import Incompatible, InvalidRequest
from kvrelay.transfer.select import Way, choose
from kvrelay.types import Role, TransportOffer

ASSUMED_PREFILL_TOKENS_PER_S: Final = 5000.0
"""While no prefill worker has measured itself."""


class Disaggregate(Enum):
    """When a prompt is prefilled apart from its decoding."""

    ALWAYS = "always"
    AUTO = "auto"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRules:
    """What the operator chose."""

    disaggregate: Disaggregate
    local_prefill_max_tokens: int
    """`auto`: a prompt with at most this many uncached tokens is prefilled where it decodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """What routing needs to know of a request."""

    num_prompt: int
    num_slots: int
    """Tokens whose KV it may come to need: the prompt, and all but the last of the output."""

    block_hashes: tuple[bytes, ...]
    """Of the prompt's full blocks, in order."""

    block_size: int
    """Tokens of each of these; workers' own blocks may be larger."""

    avoid: frozenset[str] = frozenset()
    """Workers that lost an attempt of this request: taken only if there is no other."""

    kv_dtype: str | None = None
    """Of the decode worker that had it before. Another of that kind, where there is one, goes on
    with the same tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request goes. Without a holder the decode worker prefills it."""

    prefill: Member | None
    decode: Member
    offer: TransportOffer | None
    """How the decode worker pulls; None without a holder."""

    reason: str
    num_prefill_tokens: int
    """Prompt tokens that will probably have to be computed."""

    running: Member | None = None
    """The decode worker that has the sequence now, if it is to move."""

    @property
    def holder(self) -> Member | None:
        """Who has the KV that the decode worker pulls."""
        return self.prefill or self.running

    @property
    def worker_ids(self) -> frozenset[str]:
        return frozenset(m.worker_id for m in (self.prefill, self.decode) if m is not None)

    def involves(self, worker_ids: frozenset[str]) -> bool:
        """Whether any of those workers is part of it."""
        return bool(self.worker_ids & worker_ids)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A prefill worker, how a decode worker would pull from it, and how long that would take."""

    prefill: Member
    decode: Member
    way: Way
    transfer_s: float


class Router:
    """Places requests on the pool's members."""

    def __init__(self, rules: RouteRules, prefixes: PrefixMap) -> None:
        self._rules = rules
        self._prefixes = prefixes

    def place(self, request: RouteRequest, members: Iterable[Member]) -> Placement | None:
        """Choose workers, or None while no suitable one takes work.

        Raises:
            InvalidRequest: no member could ever hold it.
        """
        members = list(members)
        decodes = _large_enough(members, Role.DECODE, request.num_slots, request)
        candidates = _preferred([m for m in decodes if m.takes_work], request.avoid)
        if not candidates:
            return None
        candidates = sorted(candidates, key=lambda m: self._decode_cost(m, request))
        uncached = self._uncached_tokens(candidates[0], request)
        reason = self._reason_to_stay_local(uncached)
        if reason is None:
            pair = self._best_pair(request, self._prefills(request, members), candidates)
            reason = self._reason_against(pair, candidates[0], uncached)
            if reason is None:
                return None if pair is None else self._paired(pair, request)
        return Placement(
            prefill=None,
            decode=candidates[0],
            offer=None,
            reason=reason,
            num_prefill_tokens=uncached,
        )

    def placed(self, placement: Placement, request: RouteRequest) -> None:
        """Note what the chosen workers will have cached."""
        for member in (placement.prefill, placement.decode):
            if member is not None:
                self._prefixes.add(member.worker_id, request.block_hashes)

    def forget(self, worker_id: str) -> None:
        """Expect nothing cached at a worker that left."""
        self._prefixes.forget(worker_id)

    def _reason_to_stay_local(self, uncached_tokens: int) -> str | None:
        match self._rules.disaggregate:
            case Disaggregate.NEVER:
                return "local: disaggregation is off"
            case Disaggregate.AUTO if uncached_tokens <= self._rules.local_prefill_max_tokens:
                limit = self._rules.local_prefill_max_tokens
                return f"local: {uncached_tokens} uncached tokens <= {limit}"
            case _:
                return None

    def _prefills(self, request: RouteRequest, members: Sequence[Member]) -> Sequence[Member]:
        """Who may prefill it. A handoff that failed is not tried again where it can be avoided,
        by prefilling in the end where the request decodes.
        """
        if self._rules.disaggregate is Disaggregate.ALWAYS:
            large = _large_enough(members, Role.PREFILL, request.num_prompt, request)
            return _preferred([m for m in large if m.takes_work], request.avoid)
        return [
            m
            for m in members
            if m.identity.role is Role.PREFILL
            and m.takes_work
            and m.num_slots >= request.num_prompt
            and m.worker_id not in request.avoid
        ]

    def _reason_against(self, pair: _Pair | None, decode: Member, uncached: int) -> str | None:
        """Why `decode` had better prefill it: nobody hands over, or moving the KV takes longer
        than computing it, both having been measured.
        """
        if self._rules.disaggregate is Disaggregate.ALWAYS:
            return None
        if pair is None:
            return "local: no prefill worker can hand over"
        tokens_per_s = decode.load.prefill_tokens_per_s
        if not (pair.way.is_measured and tokens_per_s > 0):
            return None
        local_s = uncached / tokens_per_s
        if pair.transfer_s <= local_s:
            return None
        return (
            f"local: {uncached} uncached tokens take {local_s:.3f} s to compute, "
            f"{pair.transfer_s:.3f} s to move by {pair.way}"
        )

    def _best_pair(
        self, request: RouteRequest, prefills: Sequence[Member], decodes: Sequence[Member]
    ) -> _Pair | None:
        """The first of `decodes` that can pull from somebody, with the prefill worker from which
        it would have all of the KV first.
        """
        measured = [m.load.prefill_tokens_per_s for m in prefills]
        known = [tokens_per_s for tokens_per_s in measured if tokens_per_s > 0]
        # One figure for all: a worker's own falls with the length of its prompts, and one that was
        # passed over for that would never get to show better.
        tokens_per_s = median(known) if known else ASSUMED_PREFILL_TOKENS_PER_S
        for decode in decodes:
            num_moved = self._uncached_tokens(decode, request)
            pairs = [
                _Pair(prefill, decode, way, num_moved * _kv_num_bytes(prefill) / way.bytes_per_s)
                for prefill in prefills
                if (way := best_way(prefill, decode)) is not None
            ]
            if pairs:
                return min(pairs, key=lambda pair: self._pair_cost(pair, request, tokens_per_s))
        return None

    def _pair_cost(
        self, pair: _Pair, request: RouteRequest, tokens_per_s: float
    ) -> tuple[float, float, str]:
        """When the KV would be complete, moving while it is computed; then the faster way."""
        queue_s = pair.prefill.queued_prompt_tokens / tokens_per_s
        prefill_s = self._uncached_tokens(pair.prefill, request) / tokens_per_s
        done_s = queue_s + max(prefill_s, pair.transfer_s)
        return (done_s, pair.transfer_s, pair.prefill.worker_id)

    def _paired(self, pair: _Pair, request: RouteRequest) -> Placement:
        uncached = self._uncached_tokens(pair.prefill, request)
        return Placement(
            prefill=pair.prefill,
            decode=pair.decode,
            offer=pair.way.offer,
            reason=f"disaggregated: {uncached} uncached tokens, {pair.way}",
            num_prefill_tokens=uncached,
        )

    def _decode_cost(self, member: Member, request: RouteRequest) -> tuple[bool, float, int, str]:
        """The emptiest first, by sequences in its step or by blocks, whichever is fuller; then
        the longest cached prefix. Before all that, the KV dtype that the request began with.
        """
        load = member.load
        sequences = max(len(member.placed), load.running_sequences + load.waiting_sequences)
        fill = max(
            sequences / member.identity.max_sequences,
            load.held_blocks / member.identity.num_blocks,
        )
        is_other = request.kv_dtype not in (None, member.kv_dtype)
        return (is_other, fill, self._uncached_tokens(member, request), member.worker_id)

    def _uncached_tokens(self, member: Member, request: RouteRequest) -> int:
        """Prompt tokens to compute there; at least the last one always is."""
        cached = self._prefixes.match(member.worker_id, request.block_hashes) * request.block_size
        cached -= cached % member.block_size
        return max(1, request.num_prompt - cached)


def _large_enough(
    members: Sequence[Member], role: Role, num_slots: int, request: RouteRequest
) -> Sequence[Member]:
    """Members of a role whose whole pool could hold so many tokens.

    Raises:
        InvalidRequest: there are members of that role, and waiting for them is in vain.
    """
    there = [m for m in members if m.identity.role is role]
    found = [m for m in there if m.num_slots >= num_slots]
    if there and not found:
        largest = max(m.num_slots for m in there)
        raise InvalidRequest(
            "max_tokens",
            f"prompt of {request.num_prompt} tokens and output need KV for {num_slots} tokens, "
            f"the largest {role.value} worker holds {largest}",
        )
    return found


def common_offer(holder: Member, puller: Member) -> TransportOffer | None:
    """How `puller` would pull from `holder`, or None if it cannot."""
    way = best_way(holder, puller)
    return None if way is None else way.offer


def best_way(holder: Member, puller: Member) -> Way | None:
    """The fastest way from `holder` to `puller`, by what `puller` measured of it."""
    try:
        return choose(holder.identity.offers, puller.identity.offers, puller.measured_from(holder))
    except Incompatible:
        return None


def _kv_num_bytes(holder: Member) -> float:
    """Of one token, as it is held; it may be packed to fewer before it is moved."""
    layout = holder.identity.fingerprint.layout
    return layout.block_num_bytes / layout.block_size


def _preferred(members: Sequence[Member], avoid: frozenset[str]) -> Sequence[Member]:
    return [m for m in members if m.worker_id not in avoid] or members
