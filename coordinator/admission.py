"""Whether there is room for one more request, decided before any work is done for it.

Pure. The bounds are in requests and in tokens, since ten long prompts weigh more than a
hundred short ones.
"""

from dataclasses import dataclass

from kvrelay.errors import Draining, QueueFull


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """Most that may be under way at once."""

    max_requests: int
    max_tokens: int
    """Prompt and output tokens of all admitted requests together."""


class Admission:
    """Counts what is under way. Whoever admits a request releases it, on every path."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._tokens: dict[str, int] = {}
        self._num_tokens = 0
        self._is_draining = False

    @property
    def num_requests(self) -> int:
        return len(self._tokens)

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def admit(self, request_id: str) -> None:
        """Take room for one more request, before so much as its tokens are counted.

        Raises:
            QueueFull: there are as many as there may be.
            Draining: nothing new is taken.
        """
        assert request_id not in self._tokens
        if self._is_draining:
            raise Draining(f"draining, {self.num_requests} requests to finish")
        if self.num_requests >= self._limits.max_requests:
            raise QueueFull(
                what="requests", queued=self.num_requests, limit=self._limits.max_requests
            )
        self._tokens[request_id] = 0

    def weigh(self, request_id: str, num_tokens: int) -> None:
        """Take room for the tokens of an admitted request: its prompt and most of its output.

        One request alone is never too heavy: bounds on single requests are elsewhere.

        Raises:
            QueueFull: the bound would be crossed; the request is still to be released.
        """
        assert self._tokens[request_id] == 0
        if self._num_tokens and self._num_tokens + num_tokens > self._limits.max_tokens:
            raise QueueFull(what="tokens", queued=self._num_tokens, limit=self._limits.max_tokens)
        self._tokens[request_id] = num_tokens
        self._num_tokens += num_tokens

    def release(self, request_id: str) -> None:
        """Give the room back."""
        self._num_tokens -= self._tokens.pop(request_id)

    def drain(self) -> None:
        """Refuse everything from now on."""
        self._is_draining = True
