"""What to send and when: mixes of lengths, arrivals, traces, prompts; all of it by a seed.

Pure: generators of random numbers are passed in.

Each thing that is drawn has a generator of its own, keyed by what it is. So two runs with
one seed send the same lengths in the same order and, but for its scale, at the same rhythm,
whatever the rate, the protocol or the number of clients.
"""

import itertools
import json
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kvrelay.errors import InvalidRequest

TRACE_BLOCK_TOKENS = 512
"""Tokens that one of a trace's `hash_ids` stands for."""

MAX_TRACE_LINES = 1_000_000
MAX_TOKENS = 1 << 22
"""Of one prompt or output: above every context in use, and low enough to be a typing error."""


class Rng(Protocol):
    """What is used of `random.Random`."""

    def random(self) -> float: ...

    def expovariate(self, lambd: float) -> float: ...

    def randbytes(self, n: int) -> bytes: ...


MakeRng = Callable[[str], Rng]
"""A generator whose numbers are a function of the text, as `random.Random` is."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The lengths of one request."""

    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Item:
    """One request to send."""

    shape: Shape
    at_s: float = 0.0
    """Since the start of the run. Nothing in a closed loop."""

    hash_ids: tuple[int, ...] = ()
    """Of a trace: equal ids are equal blocks of 512 tokens. Empty: a prompt like no other."""


@dataclass(frozen=True, slots=True)
class Mix:
    """Shapes and how often each occurs."""

    shapes: tuple[Shape, ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        return ",".join(
            f"{shape.prompt_tokens}:{shape.output_tokens}:{weight:g}"
            for shape, weight in zip(self.shapes, self.weights, strict=True)
        )

    @property
    def longest_tokens(self) -> int:
        return max(shape.prompt_tokens + shape.output_tokens for shape in self.shapes)

    def draw(self, rng: Rng) -> Shape:
        """One shape."""
        up_to = list(itertools.accumulate(self.weights))
        return self.shapes[min(bisect_right(up_to, rng.random() * up_to[-1]), len(up_to) - 1)]


def parse_mix(text: str) -> Mix:
    """A mix from `PROMPT:OUTPUT[:WEIGHT],...`, for example `100:64:0.7,1400:16:0.3`.

    Raises:
        InvalidRequest: it is not one.
    """
    parts = [_parse_part(part.strip()) for part in text.split(",")]
    return Mix(tuple(shape for shape, _ in parts), tuple(weight for _, weight in parts))


def _parse_part(part: str) -> tuple[Shape, float]:
    fields = part.split(":")
    if len(fields) not in (2, 3):
        raise InvalidRequest("mix", f"{part!r} is not PROMPT:OUTPUT or PROMPT:OUTPUT:WEIGHT")
    try:
        prompt_tokens, output_tokens = int(fields[0]), int(fields[1])
        weight = float(fields[2]) if len(fields) == 3 else 1.0
    except ValueError:
        raise InvalidRequest("mix", f"{part!r} holds something that is no number") from None
    if not (0 < prompt_tokens <= MAX_TOKENS and 0 < output_tokens <= MAX_TOKENS):
        raise InvalidRequest("mix", f"{part!r}: lengths must be 1 to {MAX_TOKENS} tokens")
    if not 0 < weight < float("inf"):
        raise InvalidRequest("mix", f"{part!r}: the weight must be above 0")
    return Shape(prompt_tokens, output_tokens), weight


def mixed(mix: Mix, make_rng: MakeRng, *, seed: int) -> Iterator[Item]:
    """Requests of a mix, without end."""
    rng = make_rng(f"{seed}/shapes")
    while True:
        yield Item(mix.draw(rng))


def poisson(
    items: Iterable[Item], rate_per_s: float, make_rng: MakeRng, *, seed: int
) -> Iterator[Item]:
    """The same requests with exponential times between them. The first comes at 0."""
    rng = make_rng(f"{seed}/arrivals")
    at_s = 0.0
    for item in items:
        yield replace(item, at_s=at_s)
        at_s += rng.expovariate(1.0) / rate_per_s


def until(items: Iterable[Item], duration_s: float) -> Iterator[Item]:
    """Those due before `duration_s`."""
    return itertools.takewhile(lambda item: item.at_s < duration_s, items)


def parse_trace(lines: Iterable[str]) -> list[Item]:
    """A trace in Mooncake's format, in order of time, the first request at 0.

    One JSON object a line: `timestamp` in ms, `input_length` and `output_length` in tokens, and
    `hash_ids`, one for each 512 tokens of the prompt or part thereof.

    Raises:
        InvalidRequest: a line is not of this format.
    """
    items = []
    for number, line in enumerate(lines, 1):
        if number > MAX_TRACE_LINES:
            raise InvalidRequest("trace", f"more than {MAX_TRACE_LINES} lines")
        if line.strip():
            items.append(_parse_line(line, f"line {number}"))
    if not items:
        raise InvalidRequest("trace", "no requests in it")
    items.sort(key=lambda item: item.at_s)
    first_s = items[0].at_s
    return [replace(item, at_s=item.at_s - first_s) for item in items]


def _parse_line(line: str, where: str) -> Item:
    try:
        fields = json.loads(line)
    except ValueError:
        raise InvalidRequest("trace", f"{where} is not JSON") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("trace", f"{where} is not a JSON object")
    timestamp_ms = fields.get("timestamp")
    if isinstance(timestamp_ms, bool) or not isinstance(timestamp_ms, int | float):
        raise InvalidRequest("trace", f"{where}: timestamp must be a number")
    if not abs(timestamp_ms) < float("inf"):
        raise InvalidRequest("trace", f"{where}: timestamp must be finite")
    shape = Shape(_length(fields, "input_length", where), _length(fields, "output_length", where))
    return Item(shape, timestamp_ms / 1e3, _hash_ids(fields, shape.prompt_tokens, where))


def _length(fields: dict[str, Any], name: str, where: str) -> int:
    value = fields.get(name)
    if type(value) is not int or not 0 < value <= MAX_TOKENS:
        raise InvalidRequest("trace", f"{where}: {name} must be 1 to {MAX_TOKENS}")
    return value


def _hash_ids(fields: dict[str, Any], prompt_tokens: int, where: str) -> tuple[int, ...]:
    value = fields.get("hash_ids", [])
    if not isinstance(value, list) or any(type(hash_id) is not int for hash_id in value):
        raise InvalidRequest("trace", f"{where}: hash_ids must be a list of integers")
    wanted = -(-prompt_tokens // TRACE_BLOCK_TOKENS)
    if value and len(value) != wanted:
        problem = f"{len(value)} hash_ids for {prompt_tokens} tokens, want {wanted}"
        raise InvalidRequest("trace", f"{where}: {problem}")
    return tuple(value)


def stretched(items: Sequence[Item], rate_per_s: float) -> list[Item]:
    """A trace in its own rhythm, at another mean rate."""
    span_s = items[-1].at_s
    if not span_s:
        return list(items)
    scale = (len(items) - 1) / rate_per_s / span_s
    return [replace(item, at_s=item.at_s * scale) for item in items]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The prompts of one run.

    Runs with different `run` share no prompt, so that none profits from the prefix cache
    which another has filled.
    """

    make_rng: MakeRng
    seed: int
    run: str
    vocab_size: int

    def token_ids(self, index: int, item: Item) -> list[int]:
        """The prompt of request number `index`."""
        num_tokens = item.shape.prompt_tokens
        if not item.hash_ids:
            return self._tokens(f"prompt/{index}", num_tokens)
        blocks = (self._tokens(f"block/{i}", TRACE_BLOCK_TOKENS) for i in item.hash_ids)
        return list(itertools.chain.from_iterable(blocks))[:num_tokens]

    def _tokens(self, key: str, num_tokens: int) -> list[int]:
        # Bytes rather than one draw per token: a prompt must be made faster than it is sent.
        rng = self.make_rng(f"{self.seed}/{self.run}/{key}")
        words = memoryview(rng.randbytes(4 * num_tokens)).cast("I")
        return [word % self.vocab_size for word in words]
