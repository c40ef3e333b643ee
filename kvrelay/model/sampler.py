"""Choosing the next token from logits, without any state of its own.

In this order, as vLLM and transformers do: temperature, top-k, top-p, min-p. Then one draw
from what is left, by a number that is a function of (seed, absolute position) alone. Tokens
as likely as the last one kept are kept too, so that no cut depends on how a sort breaks ties.

Weights are float64, the likeliest token's is 1. Cuts leave few tokens, so only candidates for
them are weighed; what the others weigh together is bounded. Where the bounds do not settle a
cut, the whole vocabulary is weighed: they save time, and change nothing.
"""

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.types import SamplingParams

_DRAW_BITS = 52
"""One less than a float64 holds, so that a draw times a total stays below the total."""

_FAR_NATS = 32.0
"""Tokens so much less likely than the likeliest weigh, all together, next to nothing."""

_FEW = 1024
"""So many tokens are weighed sooner than the whole vocabulary is summed up."""

_SMALL_SHARES = (2**6, 2**12)
"""A set that holds top_p seldom needs tokens with less than 1 - top_p over one of these."""

_FLOAT32_ERROR = 2.0**-16
"""Relative, of a sum of float32 weights; the true one is below a third of it."""

_LEAST_FLOAT32_TEMPERATURE = 1e-30

_PIECE = 1024
"""Weights a draw runs through one by one; of more than that, first through sums of so many."""

Logits = npt.NDArray[np.floating]
Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
Bounds = tuple[float, float]

_NOTHING: Bounds = (0.0, 0.0)


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]
) -> list[int]:
    """One token id per row; a row's does not depend on the others.

    Args:
        logits: [num_rows, vocab_size], finite.
        params: one per row.
        positions: absolute position of the token to choose, one per row.
    """
    assert len(logits) == len(params) == len(positions)
    rows = logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy()
    return [sample_row(*row) for row in zip(rows, params, positions, strict=True)]


def sample_row(logits: Logits, params: SamplingParams, position: int) -> int:
    """As `sample`, of one row: [vocab_size], float32 or float64."""
    if params.temperature == 0:
        return int(logits.argmax())  # the lowest id of equals
    ids, weights = kept_tokens(logits, params)
    return int(ids[pick(weights, draw(params.seed, position))])


def draw(seed: int, position: int) -> float:
    """Uniform in [0, 1): the same for the same seed and position, on any machine."""
    key = struct.pack("<QQ", seed % 2**64, position)
    digest = hashlib.blake2b(key, digest_size=8, person=b"kvrelay-draw").digest()
    return float(int.from_bytes(digest, "little") >> (64 - _DRAW_BITS)) / 2.0**_DRAW_BITS


def kept_tokens(logits: Logits, params: SamplingParams) -> tuple[Ids, Floats]:
    """Ids of the tokens that no cut took, ascending, and their probability up to a factor.

    Args:
        logits: [vocab_size], finite; not written.
        params: with a temperature above 0.
    """
    row = _Row(logits, params.temperature)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        ids, rest = _candidates(row, params)
        weights = row.weights(ids)
        least = params.min_p
        if params.top_p < 1.0:
            least = max(least, _least_of_top_p(row, weights, rest, params.top_p))
    if least == 0.0:
        return ids, weights
    kept = weights >= least
    return ids[kept], weights[kept]


def _candidates(row: "_Row", params: SamplingParams) -> tuple[Ids, Bounds]:
    """Tokens that hold all which top-p and min-p keep, and what the others of the total weigh."""
    if 0 < params.top_k < row.vocab_size:
        return row.likeliest(params.top_k), _NOTHING
    if params.top_p < 1.0:
        far = row.vocab_size * math.exp(-_FAR_NATS)
        if far < 1.0 - params.top_p and row.count_within(_FAR_NATS) <= _FEW:
            return row.within(_FAR_NATS), (0.0, far)
        return row.holding(params.top_p)
    if params.min_p > 0.0:
        return row.within(-math.log(params.min_p)), _NOTHING
    return row.all_ids(), _NOTHING


def _least_of_top_p(row: "_Row", weights: Floats, rest: Bounds, top_p: float) -> float:
    """The smallest weight of the least set that holds `top_p` of `weights` and the rest."""
    likeliest = np.sort(weights)[::-1]
    sums = np.cumsum(likeliest)
    inside = float(weights.sum())
    first, last = sums.searchsorted([top_p * (inside + rest[0]), top_p * (inside + rest[1])])
    if first != last:
        first = sums.searchsorted(top_p * row.total())
    return float(likeliest[first]) if first < len(sums) else 0.0  # rounding kept all below


class _Row:
    """The logits of one row at one temperature."""

    def __init__(self, logits: Logits, temperature: float) -> None:
        self.vocab_size = len(logits)
        self._logits = logits
        self._temperature = temperature
        self._most = float(logits.max())

    def all_ids(self) -> Ids:
        return np.arange(self.vocab_size)

    def likeliest(self, count: int) -> Ids:
        """The `count` likeliest tokens, and who is as likely as the last of them."""
        place = self.vocab_size - count
        return np.flatnonzero(self._logits >= np.partition(self._logits, place)[place])

    def within(self, nats: float) -> Ids:
        """The tokens whose weight is exp(-nats) or more, and maybe some just below."""
        return np.flatnonzero(self._logits >= self._least_within(nats))

    def count_within(self, nats: float) -> int:
        """How many `within` would return."""
        return int(np.count_nonzero(self._logits >= self._least_within(nats)))

    def holding(self, top_p: float) -> tuple[Ids, Bounds]:
        """The likeliest tokens, enough to hold `top_p`, and bounds of what the others weigh."""
        if self._temperature < _LEAST_FLOAT32_TEMPERATURE:
            return self.all_ids(), _NOTHING
        weights = self._float32_weights()
        total = float(weights.sum())
        error = total * _FLOAT32_ERROR
        # All tokens below the last of these shares hold less than 1 - top_p together.
        for parts in (*_SMALL_SHARES, self.vocab_size):
            ids = self.within(-math.log((1.0 - top_p) * total / parts))
            inside = float(weights[ids].sum(dtype=np.float64))
            if inside >= top_p * total + 2 * error:
                return ids, (max(0.0, total - inside - error), total - inside + error)
        return self.all_ids(), _NOTHING

    def weights(self, ids: Ids) -> Floats:
        return self._weigh(self._logits[ids] if len(ids) < self.vocab_size else self._logits)

    def total(self) -> float:
        """What the whole vocabulary weighs."""
        return float(self._weigh(self._logits).sum())

    def _weigh(self, logits: Logits) -> Floats:
        distance = logits.astype(np.float64)
        distance -= self._most
        distance /= self._temperature
        return np.exp(distance, out=distance)

    def _float32_weights(self) -> npt.NDArray[np.float32]:
        distance = self._logits - self._logits.dtype.type(self._most)
        distance = distance.astype(np.float32, copy=False)
        distance *= np.float32(1.0 / self._temperature)
        return np.exp(distance, out=distance)

    def _least_within(self, nats: float) -> np.floating:
        reach = (nats + 0.01) * self._temperature  # spare for what log and exp round
        least: np.floating = self._logits.dtype.type(self._most - reach)
        return least


def pick(weights: Floats, uniform: float) -> int:
    """The index at which the running sum of `weights` passes `uniform` of their total."""
    if len(weights) <= _PIECE:
        totals = np.cumsum(weights)
        return int(totals.searchsorted(uniform * totals[-1], side="right"))
    totals = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), _PIECE)))
    wanted = uniform * totals[-1]
    piece = int(totals.searchsorted(wanted, side="right"))
    first = piece * _PIECE
    inside = weights[first : first + _PIECE]
    before = totals[piece - 1] if piece else 0.0
    index = int(np.cumsum(inside).searchsorted(wanted - before, side="right"))
    # Two ways to sum may differ in the last bit: then it is the last that has any weight.
    return first + (index if index < len(inside) else int(np.flatnonzero(inside)[-1]))
