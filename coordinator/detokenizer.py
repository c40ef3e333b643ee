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


_State = tuple[list[int], int, str]


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
        if self.stopped is not None:
            return ""
        before = self._characters.mark()
        text = self._characters.push(token_ids)
        if not self._stop_strings:
            self.num_used += len(token_ids)
            return text
        if len(token_ids) > 1 and self._first_completed(text) is not None:
            # Which token completes it decides what counts as used.
            self._characters.go_back(before)
            return self._push_each(token_ids)
        self.num_used += len(token_ids)
        return self._settle(text, is_last=False)

    def _push_each(self, token_ids: Sequence[int]) -> str:
        sendable = ""
        for token_id in token_ids:
            if self.stopped is not None:
                break
            self.num_used += 1
            sendable += self._settle(self._characters.push((token_id,)), is_last=False)
        return sendable

    def finish(self) -> str:
        """What was held back, at the end of the tokens. A cut-off character is U+FFFD."""
        if self.stopped is not None:
            return ""
        return self._settle(self._characters.flush(), is_last=True)

    def _settle(self, text: str, *, is_last: bool) -> str:
        found = self._first_completed(text)
        self._held += text
        if found is not None:
            start, self.stopped = found
            sendable, self._held = self._held[:start], ""
            return sendable
        num_kept = 0 if is_last else self._num_maybe_stop()
        cut = len(self._held) - num_kept
        sendable, self._held = self._held[:cut], self._held[cut:]
        return sendable

    def _first_completed(self, text: str) -> tuple[int, str] | None:
        """Where in what is held and `text` the stop string begins whose last character comes
        first, and which it is.
        """
        whole = self._held + text
        found = [(at, stop) for stop in self._stop_strings if (at := whole.find(stop)) >= 0]
        return min(found, key=lambda hit: (hit[0] + len(hit[1]), hit[0]), default=None)

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

    def mark(self) -> _State:
        """Where we are, for `go_back`."""
        return self._window, self._num_settled, self._sent

    def go_back(self, mark: _State) -> None:
        self._window, self._num_settled, self._sent = mark

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that these complete: the same, whether they come together or singly."""
        heard = [token_id for token_id in token_ids if token_id not in self._skipped]
        if len(heard) > 1:
            window = self._window + heard
            text = self._decode(window)
            if self._is_plain(text):
                self._window = window
                return self._advance(text)
        return "".join(map(self._push_one, heard))

    def _is_plain(self, text: str) -> bool:
        """Whether what follows the text that was sent is whole characters and nothing else."""
        num_sent = len(self._sent)
        return (
            len(text) > num_sent
            and text.startswith(self._sent)
            and text.find(REPLACEMENT, num_sent) < 0
        )

    def _push_one(self, token_id: int) -> str:
        self._window = [*self._window, token_id]
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
