"""Who is in the pool and how they are, from what workers said and what we gave them.

Pure: instants are passed in, by one monotonic clock. Membership is a lease that heartbeats
renew; a member is its epoch, so a process restarted at the same address is someone else.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvrelay.errors import Incompatible
from kvrelay.types import Fingerprint, Role, WorkerIdentity, WorkerLoad


@dataclass(slots=True, kw_only=True)
class Member:
    """A worker as the coordinator sees it."""

    identity: WorkerIdentity
    load: WorkerLoad
    heard_at_s: float
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
    def takes_work(self) -> bool:
        return not self.load.is_draining


class Registry:
    """The pool. Every change that may let a waiting request be placed grows `version`."""

    def __init__(self, *, model_digest: str, suspect_after_s: float) -> None:
        self._model_digest = model_digest
        self._suspect_after_s = suspect_after_s
        self._members: dict[str, Member] = {}
        self.version = 0

    def join(self, identity: WorkerIdentity, now_s: float) -> Member | None:
        """Admit a worker. Returns the member of the same name that it replaces, if any.

        Raises:
            Incompatible: it serves another model than this coordinator tokenizes for, or
                could not finish what the rest of the pool began; `details` has each difference.
        """
        self._require_compatible(identity)
        replaced = self._members.pop(identity.worker_id, None)
        load = WorkerLoad(free_blocks=identity.num_blocks)
        self._members[identity.worker_id] = Member(identity=identity, load=load, heard_at_s=now_s)
        self.version += 1
        return replaced

    def heard(self, worker_id: str, epoch: str, load: WorkerLoad, now_s: float) -> bool:
        """Note a heartbeat. False if that worker and epoch are no member (any more)."""
        member = self.get(worker_id, epoch)
        if member is None:
            return False
        member.load, member.heard_at_s = load, now_s
        self.version += 1
        return True

    def leave(self, worker_id: str, epoch: str) -> Member | None:
        """Forget a member; None if that worker and epoch is none."""
        member = self.get(worker_id, epoch)
        if member is None:
            return None
        self.version += 1
        return self._members.pop(worker_id)

    def silent(self, now_s: float) -> list[Member]:
        """Members not heard for the suspicion time."""
        return [m for m in self if now_s - m.heard_at_s >= self._suspect_after_s]

    def next_suspicion_s(self) -> float | None:
        """When the first member will be silent for too long if it says nothing more."""
        if not self._members:
            return None
        return min(m.heard_at_s for m in self) + self._suspect_after_s

    def get(self, worker_id: str, epoch: str) -> Member | None:
        member = self._members.get(worker_id)
        return member if member is not None and member.identity.epoch == epoch else None

    def by_role(self, role: Role) -> list[Member]:
        return [m for m in self if m.identity.role is role]

    def __iter__(self) -> Iterator[Member]:
        return iter(sorted(self._members.values(), key=_by_role_and_name))

    def __len__(self) -> int:
        return len(self._members)

    def _require_compatible(self, identity: WorkerIdentity) -> None:
        theirs = identity.fingerprint
        if theirs.model_digest != self._model_digest:
            raise Incompatible(
                f"{identity.worker_id} serves model {theirs.model_digest[:12]}, "
                f"this coordinator {self._model_digest[:12]}",
                model_digest=f"{theirs.model_digest} != {self._model_digest}",
            )
        ours = self._pool_fingerprint(but=identity.worker_id)
        differences = theirs.differences(ours) if ours is not None else {}
        if differences:
            text = "; ".join(f"{name}: {pair}" for name, pair in differences.items())
            raise Incompatible(
                f"{identity.worker_id} differs from the pool in {text}", **differences
            )

    def _pool_fingerprint(self, *, but: str) -> Fingerprint | None:
        """Of any member but the named one: they are all equal, or they would not be in."""
        return next((m.identity.fingerprint for m in self if m.worker_id != but), None)


def _by_role_and_name(member: Member) -> tuple[bool, str]:
    return (member.identity.role is Role.DECODE, member.worker_id)
