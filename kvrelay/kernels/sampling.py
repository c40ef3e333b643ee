"""Choosing tokens on the device, by a draw that the host has made for each row.

In this order: temperature, top-k, top-p, min-p, then one draw from what is left. Cuts are
thresholds on the logits themselves, found by narrowing the range of their bit patterns, so
nothing is sorted and tokens as likely as the last one kept are kept too. Means what
`kvrelay.model.sampler` means, in float32 where that has float64: a draw that falls within
rounding of the border between two tokens may choose the other one.
"""

from dataclasses import dataclass

import torch

from kvrelay.kernels.lang import jit, power_of_2, tl

MAX_BLOCK = 4096
WAYS = 8
"""Thresholds tried in one pass over the logits."""

NOT_FINITE = -1
"""Chosen for a row whose logits are not all finite."""


@dataclass(frozen=True, slots=True)
class Choices:
    """How each row is sampled; all [num_rows]."""

    temperature: torch.Tensor  # float32; 0 is greedy
    top_k: torch.Tensor  # int32; 0 keeps all
    top_p: torch.Tensor  # float32
    min_p: torch.Tensor  # float32
    uniform: torch.Tensor  # float32, in [0, 1)


@jit()
def _ordered(x):
    """Integers that compare as the floats do."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit()
def _masses(at, size, thresholds, top, heat, counts, WAYS: tl.constexpr, BLOCK: tl.constexpr):
    """Weight of the tokens at or above each threshold, or their number."""
    sums = tl.zeros((WAYS, BLOCK), dtype=tl.float32)
    for begin in range(0, size, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        logit = tl.load(at + token, mask=token < size, other=float("-inf"))
        weight = tl.where(counts, 1.0, tl.exp((logit - top) / heat))
        weight = tl.where(token < size, weight, 0.0)
        kept = _ordered(logit)[None, :] >= thresholds[:, None]
        sums += tl.where(kept, weight[None, :], 0.0)
    return tl.sum(sums, axis=1)


@jit()
def _least_kept(at, size, wanted, top, heat, counts, WAYS: tl.constexpr, BLOCK: tl.constexpr):
    """The highest threshold whose tokens still weigh, or number, `wanted`."""
    low = tl.full((), -2147483648, dtype=tl.int64)
    width = tl.full((), 1 << 30, dtype=tl.int64)
    for _ in range(11):  # three bits at a time
        thresholds = low + tl.arange(0, WAYS).to(tl.int64) * width
        reachable = tl.minimum(thresholds, 2147483647).to(tl.int32)
        reached = _masses(at, size, reachable, top, heat, counts, WAYS, BLOCK) >= wanted
        low += tl.maximum(tl.sum(reached.to(tl.int64), axis=0) - 1, 0) * width
        width = width // WAYS
    return low.to(tl.int32)


@jit()
def _sample_kernel(
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    chosen,
    row_stride,
    size,
    WAYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    at = logits + row.to(tl.int64) * row_stride
    tops = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    places = tl.zeros((BLOCK,), dtype=tl.int32)
    bad = tl.zeros((BLOCK,), dtype=tl.int32)
    for begin in range(0, size, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        logit = tl.load(at + token, mask=token < size, other=float("-inf"))
        finite = tl.abs(logit) < float("inf")
        bad += tl.where((token < size) & (finite == 0), 1, 0)
        places = tl.where(logit > tops, token, places)
        tops = tl.maximum(tops, logit)
    top = tl.max(tops, axis=0)
    likeliest = tl.min(tl.where(tops == top, places, size), axis=0)  # the lowest id of equals
    if tl.sum(bad, axis=0) > 0:
        tl.store(chosen + row, -1)
        return
    heat = tl.load(temperatures + row)
    if heat <= 0.0:
        tl.store(chosen + row, likeliest)
        return
    threshold = tl.full((), -2147483648, dtype=tl.int32)
    top_k = tl.load(top_ks + row)
    if (top_k > 0) & (top_k < size):
        threshold = _least_kept(at, size, top_k.to(tl.float32), top, heat, True, WAYS, BLOCK)
    top_p = tl.load(top_ps + row)
    if top_p < 1.0:
        from_top_k = tl.full((WAYS,), 0, dtype=tl.int32) + threshold
        total = tl.max(_masses(at, size, from_top_k, top, heat, False, WAYS, BLOCK), axis=0)
        of_top_p = _least_kept(at, size, top_p * total, top, heat, False, WAYS, BLOCK)
        threshold = tl.maximum(threshold, of_top_p)
    min_p = tl.load(min_ps + row)
    # One sum per block of tokens, oldest first: which block the draw falls into.
    total = 0.0
    for begin in range(0, size, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        logit = tl.load(at + token, mask=token < size, other=float("-inf"))
        weight = tl.exp((logit - top) / heat)
        kept = (token < size) & (_ordered(logit) >= threshold) & (weight >= min_p)
        total += tl.sum(tl.where(kept, weight, 0.0), axis=0)
    drawn = tl.load(uniforms + row) * total
    before = 0.0
    found = likeliest
    is_found = 0
    for begin in range(0, size, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        logit = tl.load(at + token, mask=token < size, other=float("-inf"))
        weight = tl.exp((logit - top) / heat)
        kept = (token < size) & (_ordered(logit) >= threshold) & (weight >= min_p)
        weight = tl.where(kept, weight, 0.0)
        reached = before + tl.cumsum(weight, axis=0)
        here = tl.min(tl.where(kept & (reached > drawn), token, size), axis=0)
        if (is_found == 0) & (here < size):
            found = here
            is_found = 1
        # Should rounding keep every sum below the draw, the last kept token is meant.
        last = tl.max(tl.where(kept, token, -1), axis=0)
        if (is_found == 0) & (last >= 0):
            found = last
        before += tl.sum(weight, axis=0)
    tl.store(chosen + row, found)


def sample(logits: torch.Tensor, choices: Choices, *, out: torch.Tensor) -> None:
    """One token id per row, or `NOT_FINITE`; a row's does not depend on the others.

    Args:
        logits: [num_rows, vocab_size], float32, last dimension contiguous.
        choices: one per row.
        out: [num_rows], int32; written.
    """
    num_rows, size = logits.shape
    block = min(MAX_BLOCK, power_of_2(size))
    _sample_kernel[(num_rows,)](
        logits,
        choices.temperature,
        choices.top_k,
        choices.top_p,
        choices.min_p,
        choices.uniform,
        out,
        logits.stride(0),
        size,
        WAYS=WAYS,
        BLOCK=block,
        num_warps=min(16, max(1, block // 256)),
    )


def sample_reference(logits: torch.Tensor, choices: Choices, *, out: torch.Tensor) -> None:
    """See `sample`; in float64."""
    for row in range(len(logits)):
        out[row] = _sampled(
            logits[row].double(),
            float(choices.temperature[row]),
            int(choices.top_k[row]),
            float(choices.top_p[row]),
            float(choices.min_p[row]),
            float(choices.uniform[row]),
        )


def _sampled(
    logits: torch.Tensor, heat: float, top_k: int, top_p: float, min_p: float, uniform: float
) -> int:
    if not bool(torch.isfinite(logits).all()):
        return NOT_FINITE
    if heat <= 0:
        return int(logits.argmax())
    weights = torch.exp((logits - logits.max()) / heat)
    if 0 < top_k < len(weights):
        weights[weights < weights.topk(top_k).values[-1]] = 0.0
    if top_p < 1.0:
        likeliest = weights.sort(descending=True).values
        reached = likeliest.cumsum(0) >= top_p * weights.sum()
        if bool(reached.any()):
            weights[weights < likeliest[int(reached.int().argmax())]] = 0.0
    weights[weights < min_p] = 0.0
    totals = weights.cumsum(0)
    found = int(torch.searchsorted(totals, uniform * totals[-1], right=True))
    return min(found, int(weights.nonzero()[-1]))
