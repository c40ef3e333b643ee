"""What both kinds of worker check of a submit before their engine sees it.

The coordinator has checked all of this for its callers. A worker checks again because an
engine that meets a token outside the vocabulary, or a position outside the context, fails
for everybody.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvrelay.errors import InvalidRequest
from kvrelay.rpc.session import Attempt
from kvrelay.types import StopParams

MAX_SALT_BYTES = 64

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBounds:
    """What the served model can take."""

    vocab_size: int
    context_tokens: int
    """Most positions of one sequence, prompt and outputs together."""


def id_from_wire(field: str, value: str) -> str:
    if not _ID.fullmatch(value):
        raise InvalidRequest(field, "not 32 lower-case hex digits")
    return value


def attempt_from_wire(request_id: str, number: int) -> Attempt:
    if number < 1:
        raise InvalidRequest("attempt", f"{number}, at least 1")
    return Attempt(id_from_wire("request_id", request_id), number)


def tokens_from_wire(field: str, values: Iterable[int], bounds: ModelBounds) -> tuple[int, ...]:
    token_ids = tuple(values)
    largest = max(token_ids, default=0)
    if largest >= bounds.vocab_size:
        # The token itself is the caller's content and stays out of messages.
        raise InvalidRequest(
            field, f"a token is outside [0, {bounds.vocab_size})", vocab_size=bounds.vocab_size
        )
    return token_ids


def prompt_from_wire(values: Iterable[int], bounds: ModelBounds) -> tuple[int, ...]:
    prompt_ids = tokens_from_wire("token_ids", values, bounds)
    if not prompt_ids:
        raise InvalidRequest("token_ids", "empty, at least one token")
    return prompt_ids


def stop_from_wire(
    *, max_tokens: int, stop_token_ids: Sequence[int], num_prompt: int, bounds: ModelBounds
) -> StopParams:
    room = bounds.context_tokens - num_prompt
    if not 1 <= max_tokens <= room:
        raise InvalidRequest(
            "max_tokens",
            f"{max_tokens} after a prompt of {num_prompt} tokens, "
            f"context of {bounds.context_tokens}",
            max_tokens=max_tokens,
            prompt_tokens=num_prompt,
            context_tokens=bounds.context_tokens,
        )
    stops = tokens_from_wire("stop_token_ids", stop_token_ids, bounds)
    return StopParams(max_tokens=max_tokens, stop_token_ids=frozenset(stops))


def salt_from_wire(salt: bytes) -> bytes:
    if len(salt) > MAX_SALT_BYTES:
        raise InvalidRequest("cache_salt", f"{len(salt)} bytes, at most {MAX_SALT_BYTES}")
    return salt
