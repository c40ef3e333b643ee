"""What the workers of a control-plane measurement say: real text, by a rule that anyone can check.

Pure. The output of a request is the tokens of one text, over and over, from a place in it that
the prompt decides. So whoever knows the text's tokens knows every answer, and nothing has to
be computed.
"""

from collections.abc import Sequence

TEXT = """\
Where the river leaves the hills it slows down, and the old ferry still crosses it twice a day. \
Nobody needs the ferry any more: there is a bridge, built in 1987, eleven kilometres upstream. \
But the ferryman says that a bridge does not stop for a talk. He charges 2.50 € for a bicycle, \
nothing for dogs, and "whatever seems fair" for a horse, which he has carried only once.

def fare(load: str) -> float:
    return {"bicycle": 2.5, "dog": 0.0}.get(load, 1.0)

On Sundays his daughter Zoë takes over. She has studied hydrology in Kraków, and she measures \
the water at every crossing: depth, temperature, how far one can see into it. Her notebook holds \
more than 4,000 rows by now. The column that she likes best is called "remarks": an otter at \
dawn; ice along the bank; a wedding, 日本 flags, much singing; fog, so thick that the bell had to \
be rung the whole way 🔔. "Numbers say how the river is," she once wrote below a row, "and the \
remarks say whose it is." In spring the meadows flood and the crossing takes twice as long.
"""


class Script:
    """Every answer there can be."""

    def __init__(self, text_ids: Sequence[int]) -> None:
        """`text_ids`: the tokens of `TEXT`, or of any other text."""
        assert text_ids
        self._text_ids = tuple(text_ids)

    def prompt(self, number: int, num_tokens: int) -> list[int]:
        """A prompt, another one for each number below the length of the text."""
        return self._from(number, num_tokens)

    def start(self, prompt_ids: Sequence[int]) -> int:
        """Where in the text the answer to this prompt begins."""
        return sum(prompt_ids) % len(self._text_ids)

    def token(self, start: int, position: int) -> int:
        return self._text_ids[(start + position) % len(self._text_ids)]

    def answer(self, prompt_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The whole output."""
        return self._from(self.start(prompt_ids), num_tokens)

    def _from(self, start: int, num_tokens: int) -> list[int]:
        return [self.token(start, position) for position in range(num_tokens)]
