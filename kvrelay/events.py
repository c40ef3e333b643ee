"""What a generation says while it goes on: the same for a caller's client and the coordinator."""

from dataclasses import dataclass

from kvrelay.obs.ledger import Ledger
from kvrelay.types import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The request was admitted. First and once."""

    request_id: str
    seed: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """Tokens in order, with the text that they complete; either may be empty, not both."""

    position: int
    token_ids: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Nothing follows."""

    reason: FinishReason
    usage: Usage
    ledger: Ledger


Event = Started | Delta | Finished
