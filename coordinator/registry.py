"""Who is in the pool and how they are, from what workers said and what we gave them.

Pure: instants are passed in, by one monotonic clock. Membership is a lease that heartbeats
renew; a member is its epoch, so a process restarted at the same address is someone else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvrelay.errors import Incompatible
from kvrelay.transfer.select import NOTHING_MEASURED, Measured
from kvrelay.types import PROTOCOL_VERSION, Role, WorkerIdentity, WorkerLoad


@dataclass(slots=True, kw_only=True, eq=False)
class Member:
    """One membership of a worker: it joined once, and leaves once. Known by identity, since a
    worker that joins again, in the same epoch too, is a new member.
    """

    identity: WorkerIdentity
    load: WorkerLoad
    heard_at_s: float
    ticket_key: bytes = field(repr=False)
    """Signs the tickets of what it holds. Known to it and us alone."""

    is_linked: bool = False
    """Whether our session with it stands, so that it can be told anything."""

    is_heard: bool = False
    """Whether it has said how it is: it was welcomed then, and can tell tickets."""

    measured: Mapping[str, Measured] = field(default_factory=dict)
    """How fast it pulled lately, by holder and transport."""

    placed: dict[tuple[str, int], int] = field(default_factory=dict)
    """Prompt tokens that we asked it to compute and it has not, by (request_id, attempt)."""

    @property
    def worker_id(self) -> str:
        return self.identity.worker_id

    @property
    def placed_prompt_tokens(self) -> int:
        return sum(self.placed.values())

    @property
    def queued_prompt_tokens(self) -> int:
        """What stands before a new prompt: our own count is newer, its own is complete."""
        return max(self.placed_prompt_tokens, self.load.queued_prompt_tokens)

    @property
    def block_size(self) -> int:
        return self.identity.fingerprint.layout.block_size

    @property
    def kv_dtype(self) -> str:
        return self.identity.kv_form

    @property
    def num_slots(self) -> int:
        """Tokens whose KV its whole pool can hold."""
        return self.identity.num_blocks * self.block_size

    @property
    def takes_work(self) -> bool:
        return self.is_linked and self.is_heard and not self.load.is_draining

    def measured_from(self, holder: "Member") -> Measured:
        """How fast it pulled from that member lately, by transport."""
        return self.measured.get(holder.worker_id, NOTHING_MEASURED)


class Registry:
    """The members, at most one of each name."""

    def __init__(self, *, model_digest: str, suspect_after_s: float) -> None:
        self._model_digest = model_digest
        self._suspect_after_s = suspect_after_s
        self._members: dict[str, Member] = {}

    def join(
        self, identity: WorkerIdentity, now_s: float, *, ticket_key: bytes
    ) -> tuple[Member, Member | None]:
        """Admit a worker. Returns the new member, and the one of the same name it replaces.

        Raises:
            Incompatible: it serves another model than this coordinator tokenizes for, speaks
                another version, or could not share KV with the rest of the pool; `details` has
                each difference.
        """
        self._require_compatible(identity)
        replaced = self._members.pop(identity.worker_id, None)
        load = WorkerLoad(free_blocks=identity.num_blocks)
        member = Member(identity=identity, load=load, heard_at_s=now_s, ticket_key=ticket_key)
        self._members[identity.worker_id] = member
        return member, replaced

    def heard(self, member: Member, load: WorkerLoad, now_s: float) -> None:
        """Note a heartbeat: it renews the lease."""
        member.load, member.heard_at_s, member.is_heard = load, now_s, True
        member.measured = _by_holder(load)

    def leave(self, member: Member) -> bool:
        """Forget a member; False if it is none (any more)."""
        if member not in self:
            return False
        del self._members[member.worker_id]
        return True

    def silent(self, now_s: float) -> list[Member]:
        """Members not heard for the suspicion time."""
        return [m for m in self if now_s - m.heard_at_s >= self._suspect_after_s]

    def next_suspicion_s(self) -> float | None:
        """When the first member will be silent for too long if it says nothing more."""
        if not self._members:
            return None
        return min(m.heard_at_s for m in self) + self._suspect_after_s

    def excuse(self, now_s: float) -> None:
        """Hear everybody now: it was us who did not listen."""
        for member in self:
            member.heard_at_s = now_s

    @property
    def block_size(self) -> int | None:
        """The smallest of any member, to which the others' can be cut; None of an empty pool."""
        return min((m.block_size for m in self._members.values()), default=None)

    @property
    def kv_dtypes(self) -> frozenset[str]:
        """More than one, and a request's tokens depend on which workers serve it."""
        return frozenset(m.kv_dtype for m in self._members.values())

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._members.values(), key=_by_role_and_name))

    def __contains__(self, member: Member) -> bool:
        return self._members.get(member.worker_id) is member

    def _require_compatible(self, identity: WorkerIdentity) -> None:
        theirs = identity.fingerprint
        if theirs.model_digest != self._model_digest:
            raise Incompatible(
                f"{identity.worker_id} serves model {theirs.model_digest[:12]}, "
                f"this coordinator {self._model_digest[:12]}",
                model_digest=f"{theirs.model_digest} != {self._model_digest}",
            )
        if theirs.protocol_version != PROTOCOL_VERSION:
            raise Incompatible(
                f"{identity.worker_id} speaks version {theirs.protocol_version}, "
                f"this coordinator {PROTOCOL_VERSION}",
                protocol_version=f"{theirs.protocol_version} != {PROTOCOL_VERSION}",
            )
        differences = self._differences(identity)
        if differences:
            text = "; ".join(f"{name}: {pair}" for name, pair in differences.items())
            if "numerics" in differences:
                text += ". DTYPE, DEVICE, CPU_ENGINE and GENERATION_WEIGHTS must be equal in a pool"
            raise Incompatible(
                f"{identity.worker_id} differs from the pool in {text}", **differences
            )

    def _differences(self, identity: WorkerIdentity) -> dict[str, str]:
        """What keeps it from sharing KV with the first of the others that it cannot share with.
        Two that could share with a third might not with each other, so all are asked.
        """
        others = [m.identity.fingerprint for m in self if m.worker_id != identity.worker_id]
        found = (identity.fingerprint.cannot_pair(other) for other in dict.fromkeys(others))
        return next(filter(None, found), {})


def _by_holder(load: WorkerLoad) -> Mapping[str, Measured]:
    found: dict[str, dict[str, float]] = {}
    for link in load.links:
        found.setdefault(link.holder_id, {})[link.transport] = link.bytes_per_s
    return found


def _by_role_and_name(member: Member) -> tuple[bool, str]:
    return (member.identity.role is Role.DECODE, member.worker_id)
