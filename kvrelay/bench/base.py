"""What a load generator and the ways to a server say to each other, and what is kept of it.

Pure. Instants are seconds since the start of a run, all by one monotonic clock.
"""

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request. Its output has exactly `max_tokens` tokens where a server plays along."""

    token_ids: list[int]
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Arrived:
    """Tokens came, just now and together."""

    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """What a server says of one prompt whose KV was handed over."""

    tax_s: float | None
    """None if there were too few tokens to tell."""

    stages: Mapping[str, float]
    """Parts of the gap between the first two tokens, in seconds."""

    transport: str
    num_bytes: int
    overlapped_num_bytes: int
    """Of these, bytes that landed before the prefill ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The answer is whole. None means that the server did not say."""

    output_tokens: int | None
    cached_prompt_tokens: int | None = None
    handoff: Handoff | None = None
    attempts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What answers. None means that the server does not say."""

    model: str
    context_tokens: int | None
    vocab_size: int | None


class Failed(Exception):
    """The request ended badly, for a `reason` in UPPER_SNAKE."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Source(Protocol):
    """A way to a server."""

    async def served(self) -> Served:
        """What answers there.

        Raises:
            ServingError: nothing does.
        """

    def ask(self, ask: Ask) -> AsyncGenerator[Arrived | Ended, None]:
        """Send a request: `Arrived` after `Arrived`, then one `Ended`. Closing it cancels.

        Raises:
            Failed: the request ended badly.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One request as its caller saw it."""

    index: int
    scheduled_s: float
    """When it was due. Every latency counts from here, so a late generator hides nothing."""

    sent_s: float
    ended_s: float
    prompt_tokens: int
    max_tokens: int
    token_at_s: tuple[float, ...] = ()
    """When each token came, as far as the protocol shows single tokens."""

    output_tokens: int = 0
    cached_prompt_tokens: int | None = None
    handoff: Handoff | None = None
    attempts: int = 1
    error: str = ""
    """Why it failed; empty if it did not."""

    @property
    def lag_s(self) -> float:
        """How late it was sent."""
        return self.sent_s - self.scheduled_s

    @property
    def ttft_s(self) -> float | None:
        return self.token_at_s[0] - self.scheduled_s if self.token_at_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between neighbouring tokens; tokens that came together are 0 apart."""
        return [later - earlier for earlier, later in pairwise(self.token_at_s)]

    @property
    def gap1_s(self) -> float | None:
        """From the first token to the second, where a handoff would show."""
        return self.token_at_s[1] - self.token_at_s[0] if len(self.token_at_s) > 1 else None

    @property
    def handoff_tax_s(self) -> float | None:
        """What the handoff added to the gap between the first two tokens, as the server saw it."""
        return self.handoff.tax_s if self.handoff is not None else None

    @property
    def handoff_tax_of_ttft(self) -> float | None:
        """The same as a share of the time to the first token."""
        return _ratio(self.handoff_tax_s, self.ttft_s)

    @property
    def handoff_tax_steps(self) -> float | None:
        """The same in decode steps, each as long as a token took on average."""
        return _ratio(self.handoff_tax_s, self.tpot_s)

    @property
    def max_stall_s(self) -> float | None:
        """The longest gap after the second token."""
        return max(self.gaps_s[1:], default=None)

    @property
    def tpot_s(self) -> float | None:
        if len(self.token_at_s) < 2 or self.output_tokens < 2:
            return None
        return (self.token_at_s[-1] - self.token_at_s[0]) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """To the end of the stream."""
        return self.ended_s - self.scheduled_s


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
