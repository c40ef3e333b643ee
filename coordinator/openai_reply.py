"""What the HTTP front answers: OpenAI's shapes, of our events and errors.

Pure: values in, JSON-ready values out. `http.py` decides when they are sent.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from coordinator.request import ModelInfo
from kvrelay import errors
from kvrelay.events import Delta, Finished, Usage

Json = dict[str, Any]

# tests/integration/test_http.py holds this table to every leaf of the error tree.
STATUSES: Mapping[type[errors.ServingError], int] = {
    errors.InvalidRequest: 400,
    errors.QueueFull: 429,
    errors.KvPoolExhausted: 429,
    errors.NoWorker: 503,
    errors.PeerUnavailable: 503,
    errors.Draining: 503,
    errors.HandoffLost: 503,
    errors.QuiescenceLost: 503,
    errors.KvCorrupt: 502,
    errors.Incompatible: 503,
    errors.DeadlinePassed: 504,
    errors.Cancelled: 499,
    errors.NotFound: 404,
    errors.ModelInvalid: 500,
    errors.Unauthenticated: 401,
    errors.PermissionDenied: 403,
}

_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}

RETRY_AFTER_S = 1.0
"""Told to callers whose failure is worth another try and names no time of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A failure, as the caller is told of it."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None

    @property
    def body(self) -> Json:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}


def refusal(error: errors.ServingError) -> Refusal:
    """How `error` is told over HTTP."""
    status = STATUSES[type(error)]
    return Refusal(
        status=status,
        message=str(error),
        code=error.reason,
        param=error.field if isinstance(error, errors.InvalidRequest) else None,
        retry_after_s=_retry_after_s(error) if status in (429, 503) else None,
    )


def _retry_after_s(error: errors.ServingError) -> float:
    if isinstance(error, errors.Overloaded | errors.NoWorker):
        return error.retry_after_s
    return RETRY_AFTER_S


def model_card(model: ModelInfo, created_s: int) -> Json:
    return {
        "id": model.name,
        "object": "model",
        "created": created_s,
        "owned_by": "kvrelay",
        "max_model_len": model.context_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The shapes of one request's answer, streamed or whole."""

    request_id: str
    created_s: int
    model: ModelInfo
    is_chat: bool
    with_usage: bool
    with_ledger: bool

    def opening(self) -> list[Json]:
        """What a stream starts with: in a chat, who speaks."""
        if not self.is_chat:
            return []
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

    def delta(self, delta: Delta) -> list[Json]:
        """A chunk of text. Tokens that complete no text yet are not worth one."""
        if not delta.text:
            return []
        return [self._chunk(self._piece(delta.text))]

    def closing(self, finished: Finished) -> list[Json]:
        """What a stream ends with, before `[DONE]`."""
        piece: Json = {"delta": {}} if self.is_chat else self._piece("")
        chunks = [self._chunk(piece, finish_reason=finished.reason.value)]
        if self.with_usage:
            chunks.append(self._envelope([], is_chunk=True) | {"usage": usage(finished.usage)})
        chunks[-1] |= self._extra(finished)
        return chunks

    def whole(self, text: str, finished: Finished) -> Json:
        """The answer in one piece."""
        piece: Json = {"text": text}
        if self.is_chat:
            piece = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **piece, "logprobs": None, "finish_reason": finished.reason.value}
        told = {"usage": usage(finished.usage)} | self._extra(finished)
        return self._envelope([choice], is_chunk=False) | told

    def _piece(self, text: str) -> Json:
        return {"delta": {"content": text}} if self.is_chat else {"text": text}

    def _chunk(self, piece: Json, finish_reason: str | None = None) -> Json:
        choice = {"index": 0, **piece, "logprobs": None, "finish_reason": finish_reason}
        # With usage asked for, OpenAI's every chunk has the key and only the last a value.
        absent = {"usage": None} if self.with_usage else {}
        return self._envelope([choice], is_chunk=True) | absent

    def _envelope(self, choices: list[Json], *, is_chunk: bool) -> Json:
        chat_object = "chat.completion.chunk" if is_chunk else "chat.completion"
        return {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.request_id}",
            "object": chat_object if self.is_chat else "text_completion",
            "created": self.created_s,
            "model": self.model.name,
            "system_fingerprint": f"fp_{self.model.model_digest[:12]}",
            "choices": choices,
        }

    def _extra(self, finished: Finished) -> Json:
        if not self.with_ledger:
            return {}
        return {"kvrelay": {"ledger": asdict(finished.ledger)}}


def usage(usage: Usage) -> Json:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_prompt_tokens},
    }
