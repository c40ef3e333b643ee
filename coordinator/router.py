"""Which prefill and which decode worker a request goes to, chosen together, with the reason.

Pure. Prompts go where the least work stands before their first token, counting what a
worker's prefix index probably spares; sequences go where the fewest run. A prompt that is
short, or mostly cached where it will be decoded, skips the handoff: moving its KV would
cost more than computing it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from coordinator.registry import Member
from kvrelay.errors import Incompatible, InvalidRequest
from kvrelay.transfer.select import choose_offer
from kvrelay.types import Role, TransportOffer


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
    avoid: frozenset[str] = frozenset()
    """Workers that lost an attempt of this request: taken only if there is no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request goes. Without `prefill` the decode worker prefills it."""

    prefill: Member | None
    decode: Member
    offer: TransportOffer | None
    """How the decode worker pulls; None without `prefill`."""

    reason: str
    num_prefill_tokens: int
    """Prompt tokens that will probably have to be computed."""

    @property
    def worker_ids(self) -> frozenset[str]:
        return frozenset(m.worker_id for m in (self.prefill, self.decode) if m is not None)

    def involves(self, worker_ids: frozenset[str]) -> bool:
        """Whether any of those workers is part of it."""
        return bool(self.worker_ids & worker_ids)


class PrefixMap:
    """What each worker's prefix index probably holds, from what was placed on it.

    A guess that only routing relies on: a wrong one costs time, never a token.
    """

    def __init__(self, *, max_blocks_per_worker: int) -> None:
        self._max_blocks = max_blocks_per_worker
        self._hashes: dict[str, OrderedDict[bytes, None]] = {}

    def add(self, worker_id: str, block_hashes: Iterable[bytes]) -> None:
        """Note that a worker computes, or has pulled, these blocks."""
        seen = self._hashes.setdefault(worker_id, OrderedDict())
        for block_hash in block_hashes:
            seen[block_hash] = None
            seen.move_to_end(block_hash)
        while len(seen) > self._max_blocks:
            seen.popitem(last=False)

    def match(self, worker_id: str, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks that the worker probably has."""
        seen = self._hashes.get(worker_id)
        if not seen:
            return 0
        for i, block_hash in enumerate(block_hashes):
            if block_hash not in seen:
                return i
        return len(block_hashes)

    def forget(self, worker_id: str) -> None:
        """A worker that left, or started anew, has nothing."""
        self._hashes.pop(worker_id, None)


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
            if pair is not None or self._rules.disaggregate is Disaggregate.ALWAYS:
                return pair
            reason = "local: no prefill worker can hand over"
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

    def _best_pair(
        self, request: RouteRequest, prefills: Sequence[Member], decodes: Sequence[Member]
    ) -> Placement | None:
        """The first of `decodes` that can pull from somebody, with the prefill worker that has
        the least work ahead among those it can pull from.
        """
        by_cost = sorted(prefills, key=lambda m: self._prefill_cost(m, request))
        for decode in decodes:
            for prefill in by_cost:
                offer = common_offer(prefill, decode)
                if offer is not None:
                    return self._pair(request, prefill, decode, offer)
        return None

    def _pair(
        self, request: RouteRequest, prefill: Member, decode: Member, offer: TransportOffer
    ) -> Placement:
        uncached = self._uncached_tokens(prefill, request)
        return Placement(
            prefill=prefill,
            decode=decode,
            offer=offer,
            reason=f"disaggregated: {uncached} uncached tokens, {offer.name}",
            num_prefill_tokens=uncached,
        )

    def _prefill_cost(self, member: Member, request: RouteRequest) -> tuple[int, str]:
        ahead = member.queued_prompt_tokens
        return (ahead + self._uncached_tokens(member, request), member.worker_id)

    def _decode_cost(self, member: Member, request: RouteRequest) -> tuple[float, int, str]:
        """The emptiest first, by sequences in its step or by blocks, whichever is fuller; then
        the longest cached prefix.
        """
        load = member.load
        sequences = max(len(member.placed), load.running_sequences + load.waiting_sequences)
        fill = max(
            sequences / member.identity.max_sequences,
            load.held_blocks / member.identity.num_blocks,
        )
        return (fill, self._uncached_tokens(member, request), member.worker_id)

    def _uncached_tokens(self, member: Member, request: RouteRequest) -> int:
        """Prompt tokens to compute there; at least the last one always is."""
        cached = self._prefixes.match(member.worker_id, request.block_hashes) * request.block_size
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


def common_offer(prefill: Member, decode: Member) -> TransportOffer | None:
    """How `decode` would pull from `prefill`, or None if it cannot."""
    try:
        return choose_offer(prefill.identity.offers, decode.identity.offers)
    except Incompatible:
        return None


def _preferred(members: Sequence[Member], avoid: frozenset[str]) -> Sequence[Member]:
    return [m for m in members if m.worker_id not in avoid] or members
