"""Telling the control tokens a template wrote from those a caller merely spelled.

Before a template runs, every spelling of a control token in a caller's text is broken up by
a mark; afterwards an unbroken one can only be the template's own. A caller's text that could
become half of a control token at its edge is marked there too. Text without any of this,
which is nearly all text, is left as it is.
"""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ControlToken:
    """A token that no ordinary text may become."""

    token_id: int
    text: str
    eats_left: bool = False
    """Whether white space before it belongs to it."""

    eats_right: bool = False


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokens: Iterable[ControlToken]) -> None:
        # One-character tokens cannot be broken up, nor could text be written without them.
        known = [token for token in tokens if len(token.text.strip()) > 1]
        known.sort(key=lambda token: -len(token.text))  # the longest of several wins
        self._ids = {token.text.strip(): token.token_id for token in known}
        self._pattern = _alternatives(_with_spaces(token) for token in known)
        self._spelled = _alternatives(re.escape(token.text) for token in known)
        self._spelled_anywhere = re.compile(f"(?={self._spelled.pattern})")  # overlaps too
        self._heads = _parts(token.text[:cut] for token in known for cut in _cuts(token))
        self._tails = _parts(token.text[cut:] for token in known for cut in _cuts(token))

    def could_form(self, text: str) -> bool:
        """Whether `text` spells a control token, or could be the edge of one."""
        body = text.strip()
        return (
            self._spelled.search(text) is not None
            or body.startswith(self._tails)
            or body.endswith(self._heads)
        )

    def break_up(self, text: str, mark: str) -> str:
        """`text` with `mark` wherever it keeps a control token from forming.

        White space at the ends stays outside the marks, so a template may still strip it.
        """
        places = {match.start() + 1 for match in self._spelled_anywhere.finditer(text)}
        body = text.strip()
        begin = len(text) - len(text.lstrip())
        if body.startswith(self._tails):
            places.add(begin)
        if body.endswith(self._heads):
            places.add(begin + len(body))
        cuts = [0, *sorted(places), len(text)]
        return mark.join(text[a:b] for a, b in itertools.pairwise(cuts))

    def split(self, rendered: str) -> Iterable[tuple[str, int | None]]:
        """Text and the control token after it, in turn; the last text has None after it."""
        at = 0
        for match in self._pattern.finditer(rendered):
            yield rendered[at : match.start()], self._ids[match.group().strip()]
            at = match.end()
        yield rendered[at:], None


def _alternatives(patterns: Iterable[str]) -> re.Pattern[str]:
    """Any of `patterns`, in their order; nothing at all if there are none."""
    return re.compile("|".join(patterns) or r"(?!)")


def _with_spaces(token: ControlToken) -> str:
    left = r"\s*" if token.eats_left else ""
    right = r"\s*" if token.eats_right else ""
    return f"{left}{re.escape(token.text)}{right}"


def _cuts(token: ControlToken) -> range:
    return range(1, len(token.text))


def _parts(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(parts))
