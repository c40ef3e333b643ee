"""Tokens to text as they come: whole characters only, and never past a stop string.

`tokenizers` has a `DecodeStream` for the first half. It is not used: a byte-fallback
vocabulary makes it fail with a bare `Exception` once invalid bytes follow valid ones, and
primed with a prompt that ends inside a character it repeats the prompt as output.
"""

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"

CONTEXT_TOKENS = 8
"""Prompt tokens the first output is read after: a word's leading space depends on them."""

MAX_UNSETTLED_TOKENS = 64
"""Tokens held for the rest of a character before they are sent as U+FFFD. A character has
four bytes at most, so only a model that emits rubbish comes near."""


class Decoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def special_token_ids(self) -> frozenset[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """One request's output. Pure but for the tokenizer it reads.

    A stop string ends the output at the token that completes it; of several completed by the
    same character the longest counts. So the text does not depend on how tokens are grouped.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        prompt_ids: Sequence[int],
        stop_strings: Sequence[str],
        *,
        skip_special_tokens: bool = True,
    ) -> None:
        """Start after the prompt; its last few tokens are enough."""
        assert all(stop_strings)
        self._characters = _Characters(
            tokenizer, prompt_ids[-CONTEXT_TOKENS:], skip_special_tokens=skip_special_tokens
        )
        self._stop_strings = tuple(stop_strings)
        self._longest_stop = max(map(len, stop_strings), default=0)
        self._held = ""
        self.stopped: str | None = None
        """The stop string that ended the output."""

        self.num_used = 0
        """Tokens of all pushes that belong to the output, the one that stopped it included."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that may be sent now. Nothing follows once `stopped`."""
        sendable = ""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_used += 1
            sendable += self._settle(self._characters.push(token_id), is_last=False)
        return sendable

    def finish(self) -> str:
        """What was held back, at the end of the tokens. A cut-off character is U+FFFD."""
        if self.stopped is not None:
            return ""
        return self._settle(self._characters.flush(), is_last=True)

    def _settle(self, text: str, *, is_last: bool) -> str:
        self._held += text
        found = _first_completed(self._held, self._stop_strings)
        if found is not None:
            start, self.stopped = found
            sendable, self._held = self._held[:start], ""
            return sendable
        num_kept = 0 if is_last else self._num_maybe_stop()
        cut = len(self._held) - num_kept
        sendable, self._held = self._held[:cut], self._held[cut:]
        return sendable

    def _num_maybe_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        for num_chars in range(min(self._longest_stop - 1, len(self._held)), 0, -1):
            tail = self._held[-num_chars:]
            if any(stop.startswith(tail) for stop in self._stop_strings):
                return num_chars
        return 0


class _Characters:
    """Tokens in, whole characters out.

    The window is some settled tokens, whose text has been sent, and the unsettled ones after
    them. Text is settled when it does not end inside a character; the window then moves on.
    """

    def __init__(
        self, tokenizer: Decoder, context_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window = [token_id for token_id in context_ids if token_id not in self._skipped]
        # The prompt's last character may be cut off; its bytes are the prompt's, not output.
        while self._window and self._decode(self._window).endswith(REPLACEMENT):
            self._window.pop()
        self._num_settled = len(self._window)
        self._sent = self._decode(self._window)

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_cut_off = text.endswith(REPLACEMENT)
        num_unsettled = len(self._window) - self._num_settled
        if num_unsettled < MAX_UNSETTLED_TOKENS and (is_cut_off or text == self._sent):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        unsettled = self._window[self._num_settled :]
        # Invalid bytes can make a decoder think again about characters that have been sent.
        agrees = text.startswith(self._sent)
        new = text[len(self._sent) :] if agrees else self._decode(unsettled)
        self._window = unsettled
        self._num_settled = len(unsettled)
        self._sent = self._decode(unsettled)
        return new

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)


def _first_completed(text: str, stop_strings: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop string begins whose last character comes first, and which it is."""
    found = [(start, stop) for stop in stop_strings if (start := text.find(stop)) >= 0]
    return min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None)
