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
from kvrelay.errors import Incompatible, KvPoolExhausted
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
            KvPoolExhausted: there are decode workers, and none could ever hold it.
        """
        able = [m for m in members if m.takes_work]
        decodes = [m for m in able if m.identity.role is Role.DECODE]
        if not decodes:
            return None
        candidates = _preferred(_large_enough(decodes, request), request.avoid)
        decode = min(candidates, key=lambda m: self._decode_cost(m, request))
        uncached = self._uncached_tokens(decode, request)
        local = self._reason_to_stay_local(uncached)
        if local is not None:
            return Placement(
                prefill=None, decode=decode, offer=None, reason=local, num_prefill_tokens=uncached
            )
        prefills = [m for m in able if m.identity.role is Role.PREFILL]
        pair = self._best_pair(request, _preferred(prefills, request.avoid), decode)
        if pair is None and self._rules.disaggregate is Disaggregate.AUTO:
            reason = "local: no prefill worker can hand over to it"
            return Placement(
                prefill=None, decode=decode, offer=None, reason=reason, num_prefill_tokens=uncached
            )
        return pair

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

    def _best_pair(
        self, request: RouteRequest, prefills: Sequence[Member], decode: Member
    ) -> Placement | None:
        """The prefill worker with the least work ahead among those that `decode` can pull from."""
        for prefill in sorted(prefills, key=lambda m: self._prefill_cost(m, request)):
            if prefill.identity.num_blocks * request.block_size < request.num_prompt:
                continue
            try:
                offer = choose_offer(prefill.identity.offers, decode.identity.offers)
            except Incompatible:
                continue
            uncached = self._uncached_tokens(prefill, request)
            return Placement(
                prefill=prefill,
                decode=decode,
                offer=offer,
                reason=f"disaggregated: {uncached} uncached tokens, {offer.name}",
                num_prefill_tokens=uncached,
            )
        return None

    def _prefill_cost(self, member: Member, request: RouteRequest) -> tuple[int, str]:
        ahead = member.queued_prompt_tokens
        return (ahead + self._uncached_tokens(member, request), member.worker_id)

    def _decode_cost(self, member: Member, request: RouteRequest) -> tuple[float, int, str]:
        """Fewest sequences first, by its step's size; then the longest cached prefix."""
        sequences = max(
            len(member.placed), member.load.running_sequences + member.load.waiting_sequences
        )
        fill = sequences / max(1, member.identity.max_sequences)
        return (fill, self._uncached_tokens(member, request), member.worker_id)

    def _uncached_tokens(self, member: Member, request: RouteRequest) -> int:
        """Prompt tokens to compute there; at least the last one always is."""
        cached = self._prefixes.match(member.worker_id, request.block_hashes) * request.block_size
        return max(1, request.num_prompt - cached)


def _large_enough(members: Sequence[Member], request: RouteRequest) -> Sequence[Member]:
    """Those whose whole pool could hold the request; waiting for others is in vain."""
    wanted = -(-request.num_slots // request.block_size)
    found = [m for m in members if m.identity.num_blocks >= wanted]
    if not found:
        largest = max(m.identity.num_blocks for m in members)
        raise KvPoolExhausted(wanted_blocks=wanted, free_blocks=largest)
    return found


def _preferred(members: Sequence[Member], avoid: frozenset[str]) -> Sequence[Member]:
    return [m for m in members if m.worker_id not in avoid] or members
