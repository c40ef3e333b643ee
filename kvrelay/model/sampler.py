"""Choosing the next token from logits, without any state of its own.

In this order, as vLLM and transformers do: temperature, top-k, top-p, min-p. Then one draw
from what is left, by a number that is a function of (seed, absolute position) alone. Tokens
as likely as the last one kept are kept too, so that no cut depends on how a sort breaks ties.
"""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvrelay.types import SamplingParams

_DRAW_BITS = 52
"""One less than a float64 holds, so that a draw times a total stays below the total."""

_FEW = 1024
"""Likeliest tokens looked at before a top-p cut sorts the whole vocabulary."""

Floats = npt.NDArray[np.float64]


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
    if not params:
        return []
    chosen: list[int] = logits.argmax(dim=-1).tolist()  # the lowest id of equals
    for row, (row_params, position) in enumerate(zip(params, positions, strict=True)):
        if row_params.temperature > 0:
            weights = kept_weights(logits[row].double().numpy(), row_params)
            chosen[row] = _pick(weights, draw(row_params.seed, position))
    return chosen


def draw(seed: int, position: int) -> float:
    """Uniform in [0, 1): the same for the same seed and position, on any machine."""
    key = struct.pack("<QQ", seed % 2**64, position)
    digest = hashlib.blake2b(key, digest_size=8, person=b"kvrelay-draw").digest()
    return float(int.from_bytes(digest, "little") >> (64 - _DRAW_BITS)) / 2.0**_DRAW_BITS


def kept_weights(logits: Floats, params: SamplingParams) -> Floats:
    """Probability of each token up to a common factor; 0 where it was cut.

    Args:
        logits: [vocab_size], finite; not written.
        params: with a temperature above 0.
    """
    with np.errstate(over="ignore", under="ignore"):
        weights: Floats = np.exp((logits - logits.max()) / params.temperature)
    if 0 < params.top_k < len(weights):
        least = np.partition(weights, -params.top_k)[-params.top_k]
        weights[weights < least] = 0.0
    if params.top_p < 1.0:
        weights[weights < _least_of_top_p(weights, params.top_p)] = 0.0
    if params.min_p > 0.0:
        weights[weights < params.min_p * weights.max()] = 0.0
    return weights


def _least_of_top_p(weights: Floats, top_p: float) -> float:
    """The smallest weight of the least set that holds `top_p` of the total."""
    wanted = top_p * weights.sum()
    few = min(_FEW, len(weights))
    for candidates in (np.partition(weights, -few)[-few:], weights):
        likeliest = np.sort(candidates)[::-1]
        reached = np.cumsum(likeliest) >= wanted
        if reached.any():
            return float(likeliest[reached.argmax()])
    return 0.0  # rounding kept the whole below its own total


def _pick(weights: Floats, uniform: float) -> int:
    totals = np.cumsum(weights)
    return int(np.searchsorted(totals, uniform * totals[-1], side="right"))
