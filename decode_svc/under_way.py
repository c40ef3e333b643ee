"""One handoff under way: what is known of it besides its policy."""

import asyncio
from dataclasses import dataclass, field

from decode_svc.intake import Intake
from kvrelay.engine.request import EngineRequest
from kvrelay.transfer.base import KvTransport, RemoteHold
from kvrelay.transfer.digest import DigestKind


@dataclass(frozen=True, slots=True)
class Source:
    """Where KV is, and whether it is that of a sequence that runs there."""

    hold: RemoteHold
    is_running: bool


@dataclass(slots=True, eq=False)
class Landing:
    """One handoff under way."""

    request: EngineRequest
    source: Source
    transport: KvTransport
    intake: Intake
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    listener: "asyncio.Task[None] | None" = None
    """Hears the holder; it ends by itself when the hold does, or something went wrong."""

    measuring: "set[asyncio.Task[None]]" = field(default_factory=set)
    is_submitted: bool = False
    """Whether the engine knows the sequence, so that somebody must release it."""

    is_quiet: bool = True
    """Whether it is certain that nothing writes to its blocks once its pull has ended."""

    is_freezing: bool = False
    is_released: bool = False
    """Whether the holder has said that it held everything until we had it."""

    num_cached_tokens: int = 0
    first_announced_s: float | None = None
    granted_s: float | None = None
    announced_s: float | None = None
    """When nothing was left to be announced."""

    landed_s: float = 0.0
    num_overlapped_bytes: int = 0
    """Landed before the last announcement."""

    pull_s: float = 0.0

    @property
    def hold(self) -> RemoteHold:
        return self.source.hold

    @property
    def digest_kind(self) -> DigestKind:
        """By where the bytes land."""
        on_host = self.transport.lands_on == "host"
        return DigestKind.XXH3 if on_host else DigestKind.LANES64

    @property
    def is_waiting_for_blocks(self) -> bool:
        return self.is_submitted and self.granted_s is None

    @property
    def grant_wait_s(self) -> float:
        if self.first_announced_s is None or self.granted_s is None:
            return 0.0
        return max(0.0, self.granted_s - self.first_announced_s)

    @property
    def lost(self) -> BaseException | None:
        """Why the holder is heard no more, if not for a good end."""
        if self.listener is None or not self.listener.done() or self.listener.cancelled():
            return None
        return self.listener.exception()

    def require_holder(self) -> None:
        """Raises whatever ended the listener, our own bugs included."""
        if self.lost is not None:
            raise self.lost
